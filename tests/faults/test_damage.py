"""A damaged buffer serves: what is readable is carried over, the rest is counted, the evidence is kept.

The long form (`-m slow`) flips a thousand bytes, and puts each named case before a real agent.
"""

import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import trio
from damaged import LOG, Case, Sample, beside, cases, chunk_of, events, events_in, flip, lived, uuids, write
from processes import Running, configure, started
from sources import line
from test_buffer_contract import assert_balanced, chunk, put, take, total
from test_sqlite import CHILDS, opened

from agent.buffer import BufferBroken, Kept, Limits, leased
from agent.buffer.evidence import disk_bytes, kept
from agent.buffer.file import PAGE_BYTES
from agent.buffer.pages import Pages
from agent.sink import Sink, serving

# In which a host that begins has its agent.
READY_SECONDS = 5.0
# As many as one takes in a delivery, roughly.
SOME = Limits(1000, 2**24)
MIB = 2**20

NEW = events(random.Random(0), 3, 20)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """One buffer, damaged anew for each case."""
    return trio.run(lived, tmp_path_factory.mktemp("sample"))


def laid(sample: Sample, folder: Path, *, killed: bool) -> Path:
    """The sample's files in a folder."""
    shutil.copytree(sample.killed if killed else sample.rest, folder, dirs_exist_ok=True)
    return folder / "buffer.db"


async def drained(buffer: Kept) -> dict[str, bytes]:
    """What a delivery gets, each chunk opened: the events by uuid."""
    got: dict[str, bytes] = {}
    while (lease := await buffer.take(SOME, "default")) is not None:
        async with leased(buffer, lease):
            for one in lease.chunks:
                got |= uuids(events_in(one))
            await buffer.settle(lease)
    return got


async def examined(path: Path, sample: Sample, case: Case) -> int:
    """Open it, use it, open it again; how many events were lost."""
    begun = time.monotonic()
    async with opened(path) as buffer:
        assert time.monotonic() - begun < READY_SECONDS
        assert_balanced(buffer)
        assert await put(buffer, chunk_of(NEW)) == len(NEW)
        got = await drained(buffer)
        assert_balanced(buffer)
        assert buffer.stats().events == 0
        assert len(await buffer.letters(0, 100)) == buffer.stats().dead_letters <= sample.letters
        damaged, received = total(buffer, "shed", "damaged"), total(buffer, "received", label="app")
    known = sample.owed | sample.settled | uuids(NEW)
    assert {uuid: known.get(uuid) for uuid in got} == got, "something was sent that nobody gave"
    assert uuids(NEW).keys() <= got.keys()
    lost = sample.owed.keys() - got.keys()
    again = sample.settled.keys() & got.keys()
    if case.most is not None:
        assert len(lost) <= case.most
        assert not again
    # Where the books were destroyed too, they begin anew, with what there is.
    if not case.silent and received >= len(sample.owed) + len(sample.settled):
        assert damaged == len(lost) - len(again), "what was lost was not counted"
    async with opened(path) as buffer:
        assert_balanced(buffer)
    return len(lost)


async def test_the_named_cases(sample: Sample, tmp_path: Path) -> None:
    """Each serves within five seconds, loses no more than it must, and counts that."""
    wrong: list[str] = []
    number = 0
    for number, case in enumerate(cases(sample), 1):
        path = laid(sample, tmp_path / str(number), killed=case.killed)
        case.change(path)
        try:
            await examined(path, sample, case)
        except* Exception as error:
            wrong.append(f"{case.name}: {error.exceptions!r:.300}")
        shutil.rmtree(path.parent)
    assert not wrong
    assert number >= 40


async def flipped(sample: Sample, folder: Path, seed: int) -> int:
    """A few bytes anywhere in the files are others; how many events were lost."""
    chance = random.Random(seed)
    killed = chance.random() < 0.5
    path = laid(sample, folder, killed=killed)
    end = LOG if killed and chance.random() < 0.5 else ""
    size = Path(f"{path}{end}").stat().st_size
    for _ in range(chance.choice((1, 1, 2, 5))):
        flip(chance.randrange(size), chance.choice((1, 1, 8)), end, bits=chance.randrange(1, 256))(path)
    # The last commit of a log that is broken is taken for one that a power cut tore.
    lost = await examined(path, sample, Case(f"seed {seed}", lambda _: None, most=None, silent=bool(end)))
    shutil.rmtree(folder)
    return lost


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 1040), marks=pytest.mark.slow)])
async def test_random_flips(
    sample: Sample, tmp_path: Path, seeds: range, record_property: Callable[[str, object], None]
) -> None:
    """Whatever byte it is: it serves, sends nothing that was not given, and the books balance."""
    lost = [await flipped(sample, tmp_path / str(seed), seed) for seed in seeds]
    record_property("told", f"{len(seeds)} flips, {sum(map(bool, lost))} with events lost: {sum(lost)}")
    # Of 2,000 events in 150 pages one byte costs those of a chunk, or none.
    assert sum(lost) / len(seeds) < 0.1 * len(sample.owed)


@pytest.mark.parametrize("step", [40, pytest.param(1, marks=pytest.mark.slow)])
async def test_names_in_the_schema_that_are_no_text(
    sample: Sample, tmp_path: Path, step: int, record_property: Callable[[str, object], None]
) -> None:
    """Nor can Python read then what SQLite says of it: all the same it serves, and all is there."""
    data = (sample.rest / "buffer.db").read_bytes()
    begin = data.index(b"CREATE ") // PAGE_BYTES * PAGE_BYTES
    places = [at for at in range(begin, begin + PAGE_BYTES, step) if data[at]]
    for number, at in enumerate(places):
        path = laid(sample, tmp_path / str(number), killed=False)
        flip(at, bits=0x80)(path)
        await examined(path, sample, Case(f"schema: {at}", lambda _: None))
        shutil.rmtree(path.parent)
    record_property("told", f"{len(places)} bytes of the schema, one at a time: nothing lost")


async def young(folder: Path, *, one_page: bool) -> tuple[Path, dict[str, bytes]]:
    """A buffer that was killed before its first checkpoint, and its events; or as older agents made it."""
    (made := folder / "made").mkdir(parents=True)
    (killed := folder / "killed").mkdir()
    some = [events(random.Random(seed), 20, 200) for seed in range(3)]
    async with opened(made / "buffer.db") as buffer:
        for each in some:
            await put(buffer, chunk_of(each))
        if not one_page:
            for name in ("buffer.db", f"buffer.db{LOG}"):
                shutil.copy(made / name, killed)
    if one_page:
        (slow := folder / "slow").mkdir()
        with sqlite3.connect(made / "buffer.db") as whole:
            pragmas = [f"PRAGMA {name} = {whole.execute(f'PRAGMA {name}').fetchone()[0]}" for name in SHAPING]
            script = [*pragmas[1:], "PRAGMA journal_mode = WAL", *whole.iterdump(), pragmas[0]]
        whole.close()
        with sqlite3.connect(slow / "buffer.db", isolation_level=None) as again:
            again.execute("PRAGMA wal_autocheckpoint = 0")
            again.executescript(";\n".join(script))
            for name in ("buffer.db", f"buffer.db{LOG}"):
                shutil.copy(slow / name, killed)
        again.close()
        assert (killed / "buffer.db").stat().st_size == PAGE_BYTES
    return killed / "buffer.db", uuids([event for each in some for event in each])


# The first is set last: by it a start knows that nothing is to be migrated.
SHAPING = ("user_version", "page_size", "auto_vacuum", "application_id")


@pytest.mark.parametrize("one_page", [False, True], ids=["now", "before"])
async def test_a_log_whose_header_is_damaged(tmp_path: Path, *, one_page: bool) -> None:
    """Before the first checkpoint too: whatever byte of it is another, all is there, and it is told."""
    path, owed = await young(tmp_path / "young", one_page=one_page)
    for number, at in enumerate((0, 2, 3, 5, 9, 17, 22, 27)):
        (folder := tmp_path / str(number)).mkdir()
        for name in ("", LOG):
            shutil.copy(f"{path}{name}", folder)
        flip(at, 1, LOG)(folder / "buffer.db")
        async with opened(folder / "buffer.db") as buffer:
            assert_balanced(buffer)
            assert total(buffer, "shed", "damaged") == 0
            assert await drained(buffer) == owed, at
        assert len(kept(folder / "buffer.db")) == 1


@pytest.mark.parametrize("part", [0, 0.4, 0.8, 1], ids=["header", "some", "more", "all"])
async def test_a_log_that_begins_with_a_hole(tmp_path: Path, part: float) -> None:
    """What stands behind the hole is found, what stood in it is missed in the books where these are left."""
    path, owed = await young(tmp_path / "young", one_page=False)
    size = Path(f"{path}{LOG}").stat().st_size
    write(0, bytes(max(512, int(size * part))), LOG)(path)
    async with opened(path) as buffer:
        assert_balanced(buffer)
        lost = total(buffer, "shed", "damaged")
        got = await drained(buffer)
        assert got.items() <= owed.items()
        assert len(got) + lost == (len(owed) if part < 1 else 0)
        assert part or not lost
    assert len(kept(path)) == 1


async def test_the_tables_are_in_the_database_before_an_event_is(tmp_path: Path) -> None:
    """A log that is lost altogether takes no more with it than the events that it had."""
    path = tmp_path / "buffer.db"
    async with opened(path):
        assert not Path(f"{path}{LOG}").stat().st_size
        with sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True) as still:
            assert still.execute("SELECT count(*) FROM chunk").fetchone() == (0,)
        still.close()


def untouched(folder: Path) -> dict[str, bytes]:
    """All files but the lock, byte for byte."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith(".lock")}


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
        database.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('capture-agent', 'later')"
        )
    database.close()


def _another(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
        database.executemany("INSERT INTO theirs VALUES (?)", [("x" * 5000,) for _ in range(20)])
    database.close()


def _another_damaged(path: Path) -> None:
    _another(path)
    flip(0, 100)(path)


def _another_with_a_log(path: Path) -> None:
    place = path.with_name("place")
    place.mkdir()
    path.unlink()
    with sqlite3.connect(place / "db", isolation_level=None) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE theirs (x)")
        shutil.copy(place / "db", path)
        shutil.copy(place / "db-wal", f"{path}{LOG}")
    database.close()
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_newer, "newer capture-agent"),
        (_another, "another program's"),
        (_another_damaged, "not a database of"),
        (_another_with_a_log, "not a database of"),
        (lambda path: path.write_text("a letter to somebody\n" * 50), "not a database of"),
        (lambda path: path.write_bytes(b"\x7fELF" + bytes(999_999)), "not a database of"),
    ],
)
async def test_what_is_not_ours_stays_as_it_is(
    sample: Sample, tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    """A newer agent's file and another program's are refused, and no byte of them is changed."""
    path = laid(sample, tmp_path / "b", killed=False)
    change(path)
    before = untouched(path.parent)
    with pytest.raises(BufferBroken, match=said) as caught:
        async with opened(path):
            pass
    assert caught.value.hint
    assert untouched(path.parent) == before


# A process of another user than root: all that it needs is loaded before.
AS_NOBODY = """
import os, sys, trio
from agent import AgentError, config
from agent.buffer import schema
from agent.buffer.sqlite import open_sqlite
from agent.metrics import Metrics

async def main():
    async with open_sqlite(config.Buffer(path=sys.argv[1]), Metrics()):
        print("open")

os.setgid(65534)
os.setuid(65534)
try:
    trio.run(main)
except AgentError as error:
    print(error, "/", error.hint)
"""
NOBODY = 65534


def opened_by_nobody(path: Path) -> str:
    """What an agent of the user nobody says, or `open`."""
    command = [sys.executable, "-c", AS_NOBODY, str(path)]
    done = subprocess.run(command, env=CHILDS, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or done.stderr


def owned(path: Path) -> None:
    """Give a buffer and its folder to the user nobody."""
    for file in (path, *path.parent.iterdir()):
        os.chown(file, NOBODY, NOBODY)
        file.chmod(0o600)
    os.chown(path.parent, NOBODY, NOBODY)
    path.parent.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ([owned], "open"),
        ([lambda path: path.parent.chmod(0o755)], "Permission denied"),
        ([owned, lambda path: os.chown(path, 0, 0)], "it is user 0's, and the agent runs as"),
        ([owned, lambda path: path.chmod(0o400)], "chmod u+rw"),
        ([owned, lambda path: os.chown(f"{path}-wal", 0, 0)], "chown or chmod"),
        ([owned, lambda path: path.parent.chmod(0o500)], "write permission in"),
    ],
    ids=[
        "its own",
        "folder of another",
        "file of another",
        "read-only file",
        "log of another",
        "read-only folder",
    ],
)
def test_rights(sample: Sample, prepare: Sequence[Callable[[Path], None]], said: str) -> None:
    """What the agent's user may not write is told, with what to do; nothing is set aside for it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = laid(sample, Path(folder) / "b", killed=True)
        for step in prepare:
            step(path)
        assert said in opened_by_nobody(path)
        assert not kept(path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (_directory, "this is a directory"),
        (_pipe, "this is no file"),
        (lambda path: Path(f"{path}.lock").mkdir(), "lock: this is a directory"),
        (beside(LOG, None), "wal: this is no file"),
    ],
    ids=["directory", "pipe", "lock is a directory", "log is a directory"],
)
async def test_what_is_no_file_is_told(
    sample: Sample, tmp_path: Path, prepare: Callable[[Path], object], said: str
) -> None:
    """In the place of the buffer or beside it."""
    path = laid(sample, tmp_path / "b", killed=False)
    prepare(path)
    with pytest.raises(BufferBroken, match=said) as caught:
        async with opened(path):
            pass
    assert caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a filesystem")
async def test_a_read_only_filesystem_is_told(sample: Sample, tmp_path: Path) -> None:
    """Nothing can be made there, not even the lock."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("no filesystem may be mounted here")
    try:
        path = laid(sample, place / "b", killed=False)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(BufferBroken, match="read-only file system") as caught:
            async with opened(path):
                pass
        assert "mount it for writing" in caught.value.hint
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


async def test_damage_while_it_runs(tmp_path: Path) -> None:
    """Pages are destroyed under a running buffer: it goes on, and loses nothing that is out on lease."""
    chance = random.Random(1)
    path = tmp_path / "buffer.db"
    owed: dict[str, bytes] = {}
    async with opened(path) as buffer:
        for _ in range(60):
            some = events(chance, 100, 900)
            owed |= uuids(some)
            await put(buffer, chunk_of(some))
    async with opened(path) as buffer:
        first, second = await take(buffer, Limits(300, 2**30)), await take(buffer, Limits(300, 2**30))
        pages = Pages(path)
        leaves = [sheet.page for sheet in pages.sheets() if any(len(row.values) == 14 for row in sheet.rows)]
        pages.close()
        for page in leaves[::2]:  # the ways to what is out on lease among them
            write((page - 1) * PAGE_BYTES, bytes(PAGE_BYTES))(path)
        some = events(chance, 100, 900)
        owed |= uuids(some)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, buffer, chunk_of(some))
            got = await drained(buffer)
        got |= await drained(buffer)
        for lease in (first, second):
            got |= {uuid: event for one in lease.chunks for uuid, event in uuids(events_in(one)).items()}
        await buffer.settle(first)
        await buffer.release(second)
        assert await drained(buffer) == {
            uuid: event for one in second.chunks for uuid, event in uuids(events_in(one)).items()
        }
        assert_balanced(buffer)
        assert buffer.stats().events == 0
        lost = len(owed) - len(got)
        assert owed.items() >= got.items()
        assert 0 < lost == total(buffer, "shed", "damaged") <= 4000
    assert len(kept(path)) == 1


async def test_damage_that_cannot_be_booked_waits(tmp_path: Path) -> None:
    """Where a chunk is damaged and nothing can be written, delivery waits, and goes on by itself."""
    path = tmp_path / "buffer.db"
    chance = random.Random(4)
    async with opened(path) as buffer:
        for _ in range(4):
            await put(buffer, chunk_of(events(chance, 100, 900)))
    pages = Pages(path)
    rows = [row for sheet in pages.sheets() for row in sheet.rows if len(row.pages) > 3]
    pages.close()
    flip((rows[0].pages[-1] - 1) * PAGE_BYTES + 50)(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with opened(path) as buffer:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, hard))  # two pages of the log
            with trio.move_on_after(0.5) as patience:
                await take(buffer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert patience.cancelled_caught
        assert "I/O" in buffer.trouble
        with trio.fail_after(5):
            got: dict[str, bytes] = {}
            while buffer.stats().events:  # what was taken for a caller that left comes back
                got |= await drained(buffer)
        assert len(got) == 300
        assert total(buffer, "shed", "damaged") == 100
        assert not buffer.trouble
        assert_balanced(buffer)


RESCUE = """
import sys, trio
from pathlib import Path
from test_sqlite import opened

async def main():
    async with opened(Path(sys.argv[1]), max_size=int(sys.argv[2])):
        print("open", flush=True)

trio.run(main)
"""


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 206), marks=pytest.mark.slow)])
async def test_a_kill_while_it_carries_over(tmp_path: Path, seeds: range) -> None:
    """Whenever it is killed, the next start goes on; also where the old file is given back piece by piece."""
    chance = random.Random(2)
    path = tmp_path / "made" / "buffer.db"
    path.parent.mkdir()
    owed: dict[str, bytes] = {}
    async with opened(path) as buffer:
        for _ in range(300):
            some = events(chance, 40, 500)
            owed |= uuids(some)
            await put(buffer, chunk_of(some))
    write(0, bytes(PAGE_BYTES))(path)
    for seed in seeds:
        folder = tmp_path / str(seed)
        shutil.copytree(path.parent, folder)
        place = folder / path.name
        # The smaller bound has no room for evidence as large as the whole.
        bound = 2**30 if seed % 2 else 32 * MIB
        with subprocess.Popen(
            [sys.executable, "-c", RESCUE, str(place), str(bound)], env=CHILDS, stdout=subprocess.DEVNULL
        ) as child:
            until = time.monotonic() + 20
            while not Path(f"{place}.new").exists() and child.poll() is None and time.monotonic() < until:
                await trio.sleep(0.001)
            await trio.sleep(random.Random(seed).uniform(0, 0.4))  # it takes about so long
            child.send_signal(signal.SIGKILL)
        async with opened(place, max_size=bound) as buffer:
            assert await drained(buffer) == owed
            assert_balanced(buffer)
        assert sum(map(disk_bytes, kept(place))) <= bound // 4
        shutil.rmtree(folder)


async def test_evidence_is_bounded_and_makes_room(tmp_path: Path) -> None:
    """Of much damage a quarter of the bound is kept as evidence, and less where the buffer fills."""
    path = tmp_path / "buffer.db"
    chance = random.Random(3)
    for _ in range(6):
        async with opened(path, max_size=32 * MIB) as buffer:
            for _ in range(30):
                await put(buffer, chunk_of(events(chance, 10, 8000)))
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 32 * MIB
            assert sum(map(disk_bytes, kept(path))) <= 8 * MIB
            await drained(buffer)
        write(PAGE_BYTES * 4, bytes(PAGE_BYTES * 3))(path)
    async with opened(path, max_size=32 * MIB, when_full="drop_newest") as buffer:
        assert kept(path)
        while total(buffer, "shed", "full_newest") == 0:
            await put(buffer, chunk(0, size=MIB // 2))
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 32 * MIB
        assert not kept(path)


async def acknowledged(agent: Running) -> None:
    """An event is on disk, sent as soon as somebody takes it."""
    while True:
        assert agent.process.poll() is None, agent.log()
        with socket.socket(socket.AF_UNIX) as stream:
            try:
                stream.connect(agent.stream)
            except OSError:
                await trio.sleep(0.01)
                continue
            stream.sendall(b'{"ack":true}\n' + line(7))
            stream.settimeout(READY_SECONDS)
            assert b'"accepted":1' in await trio.to_thread.run_sync(stream.recv, 100)
            return


async def emptied(agent: Running) -> None:
    """All is delivered, and the books balance."""
    with trio.fail_after(30):
        while True:
            with suppress(httpx.TransportError):
                books = (await agent.status())["books"]
                if not books["buffered"]:
                    assert books["balanced"]
                    return
            await trio.sleep(0.02)


@pytest.mark.slow
async def test_the_named_cases_before_a_real_agent(
    sample: Sample, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Each file under an agent's process: ready within five seconds, and all that is left is delivered."""
    wrong: list[str] = []
    slowest = 0.0
    for number, case in enumerate(cases(sample), 1):
        folder = tmp_path / str(number)
        path = laid(sample, folder, killed=case.killed)
        case.change(path)
        sink = Sink(keep=10**5)
        try:
            async with serving(sink) as url:
                begun = time.monotonic()
                async with started(configure(folder, url)) as agent:
                    await acknowledged(agent)
                    slowest = max(slowest, took := time.monotonic() - begun)
                    assert took < READY_SECONDS, f"{took} s"
                    await emptied(agent)
                known = sample.owed.keys() | sample.settled.keys()
                came = {str(event.uuid) for event in sink.events} - known
                assert len(came) == 1
                assert case.most is None or len(sink.events) >= len(sample.owed) + 1 - case.most
        except* Exception as error:
            wrong.append(f"{case.name}: {error.exceptions!r:.300}")
        shutil.rmtree(folder)
    record_property("told", f"{number} files, ready after {slowest:.2f} s at most")
    assert not wrong
