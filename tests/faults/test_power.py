"""Power loss: whatever a cut leaves of the writes that no sync had reached, what was promised is there.

Each story is lived once, with every write and sync recorded; then the disk is cut off anywhere in it. The
long form (`-m slow`) does so thousands of times.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import msgspec
import pytest
import trio
from damaged import LOG, chunk_of, events, flip, uuids
from living import MIB
from power import NOTHING, Before, Cut, Step, cuts, laid, mark, marks, replayed, states, steps
from processes import Running, configure, running
from sources import line
from test_buffer_contract import ALL, assert_balanced, chunk, put, total
from test_sqlite import CHILDS, opened

from agent.buffer.evidence import kept
from agent.buffer.log import FRAME, HEADER
from agent.events import Chunk
from agent.pack import crc32, inflate
from agent.sink import Reply, Sink, serving

HERE = Path(__file__).parent
# A file system in memory, where there is one: no state needs a real sync.
QUICK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
SIZE = 16 * MIB

Tell = Callable[[str, object], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    """One by its true name, as the recorder compares names."""
    with tempfile.TemporaryDirectory(dir=QUICK) as place:
        yield Path(place).resolve()


def recorded(recorder: Path, folder: Path, name: str = "buffer.db") -> dict[str, str]:
    """The environment of a process whose files of this name in this folder are recorded beside them."""
    (folder / "recording").touch()
    return {
        "LD_PRELOAD": str(recorder),
        "RECORDED": str(folder / name),
        "RECORDING": str(folder / "recording"),
    }


def whole(folder: Path, before: Before = NOTHING, name: str = "buffer.db") -> list[Step]:
    """The recording, sure to be all that was done: played again, it makes the files that are there."""
    found = steps(folder / "recording")
    files = {file.name: file.read_bytes() for file in folder.glob(f"{name}*")}
    told = replayed(found, before)
    assert told.keys() == files.keys()
    assert [name for name in told if told[name] != files[name]] == []
    return found


def lived(
    recorder: Path,
    folder: Path,
    story: str,
    durability: str,
    before: Before = NOTHING,
    shim: Path | None = None,
) -> list[Step]:
    """The recording of a story, in which `shim` fails what it is told to."""
    env = {**CHILDS, **recorded(recorder, folder), "PYTHONPATH": f"{CHILDS['PYTHONPATH']}:{HERE}"}
    if shim is not None:  # behind the recorder, so that failures are recorded as such
        env["LD_PRELOAD"] += f":{shim}"
    command = [sys.executable, str(HERE / "living.py"), str(folder / "buffer.db")]
    command += [str(folder / "recording"), durability, story]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return whole(folder, before)


Known = dict[str, list[object]]


class Owed:
    """What must be there after a cut before a step, by what was said; at first it was as `places`."""

    def __init__(
        self, recording: list[Step], known: Known | None = None, places: dict[str, str] | None = None
    ) -> None:
        self._marks = list(marks(recording))
        log = {step.file for step in recording if step.kind == "C" and step.names[0].endswith("-wal")}
        self._synced = [at for at, step in enumerate(recording) if step.kind == "S" and step.file in log]
        self.known = dict(known or {})
        self._places = dict(places or {})
        for _, said in self._marks:
            self.known |= said["known"]

    def at(self, cut: int, *, full: bool) -> dict[str, str]:
        """Where each event may be: now, or where not every commit is synced, at any time since a sync."""
        since = cut if full else max((at for at in self._synced if at < cut), default=0)
        places = dict.fromkeys(self.known, "n") | self._places
        for at, said in self._marks:
            if at >= cut:
                break
            for uuid in said["uuids"]:
                places[uuid] = said["places"] + (places[uuid] if at > since else "")
        return places


# What of an event must not change: its bytes, its key and when it came; or what its client said of it.
Facts = Callable[[bytes, str | None, int], list[object]]


def exactly(event: bytes, key: str | None, received_at: int) -> list[object]:
    """Of an event that is put."""
    return [crc32(event), key, received_at]


def roughly(event: bytes, key: str | None, _received_at: int) -> list[object]:
    """Of one that is sent."""
    said = msgspec.json.decode(event)
    return [said["event"], said["distinct_id"], said["timestamp"], key]


def parts(one: Chunk) -> list[bytes]:
    """A chunk's events, each as it stands there."""
    data = inflate(one.packed, one.size, one.crc)
    return [bytes(event) for event in msgspec.json.decode(b"[" + data + b"]", type=list[msgspec.Raw])]


class Found(NamedTuple):
    """What a start after a cut finds."""

    places: dict[str, str]
    facts: dict[str, list[object]]
    damaged: int  # events that are counted as such
    evidence: int


async def found(path: Path, durability: str, facts_of: Facts) -> Found:
    """Open it, read all of it, and see that it serves."""
    places: dict[str, str] = {}
    facts: dict[str, list[object]] = {}

    def see(place: str, some: list[bytes], key: str | None, received_at: int) -> None:
        for uuid, event in uuids(some).items():
            assert uuid not in places, "an event is there twice"
            places[uuid] = place
            facts[uuid] = facts_of(event, key, received_at)

    async with opened(path, max_size=SIZE, durability=durability, when_full="drop_oldest") as buffer:
        assert_balanced(buffer)
        while (lease := await buffer.take(ALL, "default")) is not None:
            for one in lease.chunks:
                see("w", parts(one), one.key, one.received_at)
        for letter in await buffer.letters(0, 10**6):
            see("d", [letter.event], letter.key, letter.received_at)
        damaged = total(buffer, "shed", "damaged")
        assert await put(buffer, chunk(1)) == 10
        lease = await buffer.take(ALL, "default")
        assert lease is not None
        await buffer.settle(lease)
        assert_balanced(buffer)
    return Found(places, facts, damaged, len(kept(path)))


class Verdict(NamedTuple):
    """What the states came to: sums for people, and what is wrong."""

    sums: Counter[str]
    wrong: list[str]


def judged(
    recording: list[Step],
    chosen: list[Cut],
    durability: str,
    *,
    owed: Owed | None = None,
    before: Before = NOTHING,
    evidence: int = 0,
    facts_of: Facts = exactly,
) -> Verdict:
    """Lay out what each of the cuts leaves, and start there."""
    full = durability == "full"
    owed = owed or Owed(recording)
    sums: Counter[str] = Counter()
    wrong: list[str] = []
    for cut, files in states(recording, chosen, before):
        with tempfile.TemporaryDirectory(dir=QUICK) as place:
            laid(files, Path(place))
            try:
                there = trio.run(found, Path(place) / "buffer.db", durability, facts_of)
            except BaseException as error:  # whatever it is, the other states are to be seen too
                wrong.append(f"{cut}: {error!r:.300}")
                continue
        may = owed.at(cut.at, full=full)
        places = {uuid: there.places.get(uuid, "n") for uuid in may}
        bad = Counter(f"{place} for {may[uuid]}" for uuid, place in places.items() if place not in may[uuid])
        changed = sum(owed.known.get(uuid) != facts for uuid, facts in there.facts.items())
        surely = owed.at(cut.at, full=True)
        gone = sum(place == "n" for uuid, place in places.items() if "n" not in surely[uuid])
        sums += Counter(states=1, lost=gone, counted=there.damaged, cuts_that_cost=bool(gone))
        if bad or changed or there.evidence > evidence or (full and there.damaged):
            wrong.append(f"{cut}: {dict(bad)}, {changed} changed, {there}"[:600])
    return Verdict(sums, wrong)


def told(verdict: Verdict) -> str:
    """For the README."""
    sums = verdict.sums
    lost = f"{sums['lost']} acknowledged events lost in {sums['cuts_that_cost']}"
    return f"{sums['states']} states, {lost}, {sums['counted']} counted; {len(verdict.wrong)} states wrong"


LONG = pytest.mark.slow
FORMS = [
    pytest.param("life", "full", 54, id="life"),
    pytest.param("life", "normal", 24, id="life, normal"),
    pytest.param("rescue", "normal", 15, id="rescue, normal"),
    pytest.param("life", "full", 1000, id="life, long", marks=LONG),
    pytest.param("flood", "full", 200, id="flood, long", marks=LONG),
    pytest.param("rescue", "full", 300, id="rescue, long", marks=LONG),
    pytest.param("life", "normal", 400, id="life, normal, long", marks=LONG),
    pytest.param("flood", "normal", 60, id="flood, normal, long", marks=LONG),
    pytest.param("rescue", "normal", 150, id="rescue, normal, long", marks=LONG),
]


@pytest.mark.parametrize(("story", "durability", "most"), FORMS)
def test_a_power_cut(
    recorder: Path, folder: Path, story: str, durability: str, most: int, record_property: Tell
) -> None:
    """Nothing that was synced is lost, comes back or is changed; the buffer serves, and its books balance.

    With `full` that is all that was acknowledged, with `normal` all but what came since the log was synced.
    """
    recording = lived(recorder, folder, story, durability)
    # A power cut alone leaves no damage, so there is evidence only of the harm in the story.
    verdict = judged(recording, cuts(recording, most), durability, evidence=story == "rescue")
    record_property("told", told(verdict))
    assert not verdict.wrong


@pytest.mark.parametrize("durability", ["full", "normal"])
@pytest.mark.parametrize("most", [24, pytest.param(300, marks=LONG)], ids=["short", "long"])
def test_a_first_start_that_is_cut_off(
    recorder: Path, folder: Path, durability: str, most: int, record_property: Tell
) -> None:
    """While the file is made, before anybody put anything: the next start makes it, and asks nobody."""
    recording = lived(recorder, folder, "start", durability)
    verdict = judged(recording, cuts(recording, most), durability)
    record_property("told", told(verdict))
    assert not verdict.wrong


@pytest.mark.slow
@pytest.mark.parametrize("story", ["life", "rescue"])
def test_a_power_cut_after_a_power_cut(
    recorder: Path, folder: Path, story: str, record_property: Tell
) -> None:
    """While the buffer is found as the first one left it, mended where need be, and at work again."""
    (first := folder / "first").mkdir()
    recording = lived(recorder, first, story, "full")
    owed = Owed(recording)
    sums: Counter[str] = Counter()
    wrong: list[str] = []
    for number, (cut, files) in enumerate(states(recording, cuts(recording, 24))):
        (then := folder / str(number)).mkdir()
        before = laid(files, then)
        second = lived(recorder, then, "again", "full", before)
        since = Owed(second, owed.known, owed.at(cut.at, full=True))
        more = judged(second, cuts(second, 8), "full", owed=since, before=before, evidence=story == "rescue")
        sums += more.sums
        wrong += [f"after {cut}: {text}" for text in more.wrong]
        shutil.rmtree(then)
    record_property("told", told(Verdict(sums, wrong)))
    assert not wrong


async def test_a_power_cut_under_a_backup(recorder: Path, folder: Path) -> None:
    """The file of that name is the old one or the new one, whole; once the command says so, the new one."""
    config = configure(folder, "http://127.0.0.1:9")
    async with opened(folder / "buffer.db") as buffer:
        await put(buffer, chunk_of(events(random.Random(1), 50, 500)))
    env = {**CHILDS, **recorded(recorder, folder, "copy.db")}
    with closing(sqlite3.connect(folder / "copy.db")) as database:  # what is none would not be replaced
        database.execute("CREATE TABLE old (one)")
    old = (folder / "copy.db").read_bytes()
    before = laid({"copy.db": old}, folder)
    command = [sys.executable, "-m", "agent", "backup", str(folder / "copy.db"), "--config", str(config)]
    done = await trio.run_process(command, env=env, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, done.stderr
    recording = whole(folder, before, "copy.db")
    new = (folder / "copy.db").read_bytes()
    for cut, files in states(recording, cuts(recording, 100), before):
        assert files["copy.db"] in (old, new), cut
        assert files["copy.db"] == new or cut.at < len(recording), cut


@pytest.mark.parametrize("durability", ["full", "normal"])
async def test_a_log_that_is_broken_in_its_middle(tmp_path: Path, durability: str) -> None:
    """Where each commit is synced it is damage; else a power cut tore it: what can be seen is counted."""
    path, cut = tmp_path / "buffer.db", tmp_path / "cut" / "buffer.db"
    chance = random.Random(1)
    chunks = [chunk_of(events(chance, 5, 50)) for _ in range(4)]
    async with opened(path, durability=durability) as buffer:
        await put(buffer, chunks[0])
        sound = Path(f"{path}-wal").stat().st_size
        for one in chunks[1:]:
            await put(buffer, one)
        cut.parent.mkdir()
        for name in ("", "-wal"):
            shutil.copy(f"{path}{name}", f"{cut}{name}")
    flip(sound + 1000, 512, LOG)(cut)
    for _ in range(2):  # the second time nothing is counted again
        async with opened(cut, durability=durability) as buffer:
            lost = total(buffer, "shed", "damaged")
            assert buffer.stats().events == 20 - lost
            assert len(kept(cut)) == (durability == "full")
            assert lost == 15 or durability == "full"
            assert_balanced(buffer)


def as_killed(path: Path, folder: Path, *, torn: bool) -> Path:
    """The files of an open buffer as a kill leaves them, or a power cut that tears the log's first page."""
    folder.mkdir()
    for name in ("", LOG):
        shutil.copy(f"{path}{name}", folder / f"{path.name}{name}")
    if torn:
        flip(HEADER + FRAME + 1000, 512, LOG)(folder / path.name)
    return folder / path.name


@pytest.mark.parametrize("durability", ["full", "normal"])
async def test_a_log_that_is_torn_twice(tmp_path: Path, durability: str) -> None:
    """What a power cut left behind the torn part of a commit is never taken for a later one."""
    chance = random.Random(1)
    path = tmp_path / "buffer.db"
    async with opened(path, durability=durability) as buffer:
        await put(buffer, chunk_of(events(chance, 50, 500)))
        path = as_killed(path, tmp_path / "killed", torn=False)
    async with opened(path, durability=durability) as buffer:
        await put(buffer, *(chunk_of(events(chance, 50, 3000)) for _ in range(5)))
        path = as_killed(path, tmp_path / "first", torn=True)
    async with opened(path, durability=durability) as buffer:
        assert buffer.stats().events == 50
        await put(buffer, chunk_of(events(chance, 1, 50)))
        path = as_killed(path, tmp_path / "second", torn=True)
    async with opened(path, durability=durability) as buffer:
        assert buffer.stats().events == 50
        assert not total(buffer, "shed", "damaged")
        assert_balanced(buffer)
    assert not kept(path)


class Sender:
    """A client of a stream with acknowledgements, which says in the recording what it sent and heard."""

    def __init__(self, recording: Path, number: int) -> None:
        self._recording = recording
        self._number = number
        self._sent: list[str] = []
        self._heard = 0

    async def run(self, path: str) -> None:
        """Send some, hear of them, and so on."""
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(b'{"ack":true}\n')
            for few in (1, 20, 3, 200, 1):
                known: dict[str, list[object]] = {}
                lines = b""
                for _ in range(few):
                    uuid, who = str(uuid4()), f"client {self._number}"
                    at = f"2026-11-01T00:00:00.{len(self._sent) % 1000:06}Z"
                    known[uuid] = ["e", who, at, None]
                    lines += line(event="e", uuid=uuid, distinct_id=who, timestamp=at)
                    self._sent.append(uuid)
                mark(self._recording, {"places": "wn", "uuids": list(known), "known": known})
                await stream.send_all(lines)
                while self._heard < len(self._sent):
                    self._hear(await stream.receive_some())

    def _hear(self, text: bytes | bytearray) -> None:
        accepted = json.loads(text.split(b"\n")[-2])["accepted"]
        mark(self._recording, {"places": "w", "uuids": self._sent[self._heard : accepted], "known": {}})
        self._heard = accepted


async def worked(recorder: Path, folder: Path) -> list[Step]:
    """The recording of a whole agent: outages, deliveries, a stop, a kill, a reload; and clients."""
    recording = folder / "recording"
    env = recorded(recorder, folder)
    away = True
    there: set[str] = set()

    def whim(_request: object) -> Reply | None:
        return Reply(503) if away else None

    async def send(agent: Running, first: int) -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for number in range(first, first + 3):
                    nursery.start_soon(Sender(recording, number).run, agent.stream)
        there.update(uuid for _, said in marks(steps(recording)) for uuid in said["uuids"])

    sink = Sink(script=whim, keep=10**5)
    async with serving(sink) as url:
        config = configure(folder, url, f'path = "{folder}/buffer.db"\nmax_size = "16 MiB"')
        for last in (signal.SIGHUP, signal.SIGKILL, signal.SIGTERM):
            async with running(config, env=env) as agent:
                await send(agent, 0)
                if last == signal.SIGHUP:
                    agent.send(last)
                    await send(agent, 3)
                mark(recording, {"places": "wn", "uuids": sorted(there), "known": {}})
                away = False
                with trio.fail_after(30):
                    while (await agent.status())["books"]["buffered"]:
                        await trio.sleep(0.02)
                mark(recording, {"places": "n", "uuids": sorted(there), "known": {}})
                away = True
                await send(agent, 6)
                agent.send(last if last != signal.SIGHUP else signal.SIGTERM)
                await agent.process.wait()
        assert {str(event.uuid) for event in sink.events} <= there
    return whole(folder)


@pytest.mark.slow
def test_a_power_cut_under_an_agent(recorder: Path, folder: Path, record_property: Tell) -> None:
    """A whole agent, clients that hear acknowledgements, and PostHog that comes and goes."""
    recording = trio.run(worked, recorder, folder)
    verdict = judged(recording, cuts(recording, 400), "full", facts_of=roughly)
    record_property("told", told(verdict))
    assert not verdict.wrong
