"""A dead letter that is not what was buried is known as such, never sent, and in nobody's way."""

import gzip
import json
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import msgspec
import pytest
import trio
from processes import configure, parsed, running
from starlette.applications import Starlette
from test_buffer_contract import assert_balanced, bury, dead, take, total
from test_dead_letter import dead_letter
from test_sqlite import opened

from agent.buffer import DeadEvent, Limits, Replayed, revived
from agent.buffer.evidence import kept
from agent.buffer.file import PAGE_BYTES, SCHEMA_VERSION
from agent.buffer.letters import INSERT
from agent.cli.letters import Letter, Page
from agent.events import Burial, Chunk
from agent.letters import routes
from agent.sink import Reply, Request, Sink, serving

FULL = dead(
    event=b'{"event":"paid","distinct_id":"d","uuid":"u","properties":{"amount":1000}}' + b" " * 500,
    project="letters-project",
    key="phc_letters_key",
    boot="letters-boot",
    monotonic=70,
    marks=2,
    attempts=5,
    burials=(Burial(3, "rejected", "its words", 2),),
)
COLUMNS = [
    "project", "key", "reason", "detail", "at", "received_at", "attempts", "event", "marks", "burials",
    "boot", "monotonic", "size", "seal",
]  # fmt: skip


@contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """The tables, of which nobody else has the file."""
    connection = sqlite3.connect(path)
    with connection:
        yield connection
    connection.close()


def flipped(value: Any) -> Any:
    """The same kind of value, one bit of it another."""
    if isinstance(value, int):
        return value ^ 1
    if isinstance(value, str):
        return chr(ord(value[0]) ^ 1) + value[1:]
    return bytes([*value[:-3], value[-3] ^ 1, *value[-2:]])


async def buried(path: Path, *letters: DeadEvent) -> None:
    """A buffer that holds these as dead letters and is closed."""
    async with opened(path) as buffer:
        await bury(buffer, *letters)


def change(path: Path, column: str, value: object, ident: int = 1) -> None:
    """Another value stands in a letter's column."""
    with database(path) as tables:
        tables.execute(f"UPDATE dead SET {column} = ? WHERE id = ?", (value, ident))


async def refused(path: Path) -> None:
    """The first letter of two is damaged, is not sent, and can be purged; the other is sent as it was."""
    async with opened(path) as buffer:
        first, second = await buffer.letters(0, 10)
        assert first.damaged
        assert await buffer.letter(1) == first
        assert not second.damaged
        assert await buffer.replay([1]) == Replayed(0, full=False, damaged=(1,))
        assert await buffer.replay([1, 2]) == Replayed(1, full=False, damaged=(1,))
        assert (await take(buffer)).chunks == (revived(second),)
        assert_balanced(buffer)
        assert await buffer.purge([1]) == 1
        assert buffer.stats().dead_letters == 0
        assert_balanced(buffer)


@pytest.mark.parametrize("column", COLUMNS)
async def test_a_flipped_bit_in_any_column_is_noticed(tmp_path: Path, column: str) -> None:
    """The seal is of all that a letter is."""
    path = tmp_path / "b.db"
    await buried(path, FULL, dead())
    with database(path) as tables:
        columns = {row[1] for row in tables.execute("PRAGMA table_info(dead)")}
        (value,) = tables.execute(f"SELECT {column} FROM dead WHERE id = 1").fetchone()
    assert columns == {"id", *COLUMNS}
    change(path, column, flipped(value))
    await refused(path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("project", b"\xff"), ("key", 5), ("reason", 1.5), ("detail", b""), ("at", "yesterday"),
        ("at", 2**62), ("received_at", -(2**62)), ("attempts", b"x"), ("event", "\u0000"), ("event", b""),
        ("event", b'{"event":"\xff'), ("event", b"[" * 10_000), ("event", 7), ("marks", "x"),
        ("burials", "[[1,"), ("burials", "[" * 10_000), ("burials", 5), ("boot", 5), ("monotonic", 1.5),
        ("burials", f'[[1{"0" * 400},"r","d",1{"0" * 400}]]'), ("size", None), ("seal", "x"),
    ],
)  # fmt: skip
async def test_whatever_stands_in_a_column_is_no_error(tmp_path: Path, column: str, value: object) -> None:
    """Values that no letter has are a damaged letter too, for the pages as for the buffer."""
    path = tmp_path / "b.db"
    await buried(path, FULL, dead())
    change(path, column, value)
    async with opened(path) as buffer:
        transport = httpx.ASGITransport(Starlette(routes=routes(buffer)))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
            for page in ("/dead-letters", "/dead-letters?full=1"):
                answer = await client.get(page)
                assert answer.status_code == 200
                letters = msgspec.json.decode(answer.content, type=Page).letters
                assert [(letter.id, letter.damaged) for letter in letters] == [(1, True), (2, False)]
            answer = await client.get("/dead-letters/1")
            assert msgspec.json.decode(answer.content, type=Letter).damaged
    await refused(path)


async def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """Bad UTF-8 in a text column is damage of that letter, not of the file."""
    path = tmp_path / "b.db"
    await buried(path, FULL, dead())
    with database(path) as tables:
        tables.execute("UPDATE dead SET detail = CAST(x'6eff' AS TEXT), reason = CAST(x'80' AS TEXT)")
        tables.execute("UPDATE dead SET detail = 'no', reason = 'rejected' WHERE id = 2")
    await refused(path)
    assert not kept(path)


async def every_chunk(path: Path) -> list[Chunk]:
    """What is sent of a buffer whose letters are all replayed."""
    async with opened(path) as buffer:
        letters = [letter.id for letter in await buffer.letters(0, 10)]
        replayed = await buffer.replay(letters)
        assert replayed.letters + len(replayed.damaged) == len(letters)
        found: list[Chunk] = []
        for project in ("default", "letters-project"):
            while (lease := await buffer.take(Limits(100, 2**20), project)) is not None:
                found += lease.chunks
                await buffer.settle(lease)
        assert_balanced(buffer)
        # Fewer where SQLite finds the row broken too: a rescue counts what nobody can read as evicted.
        assert await buffer.purge_upto(100) <= len(replayed.damaged)
        assert buffer.stats().dead_letters == 0
        assert_balanced(buffer)
        return found


async def test_any_bit_of_its_record(tmp_path: Path) -> None:
    """Header or value: what is sent is what was buried, the books balance, and purge is rid of the rest."""
    path = tmp_path / "b.db"
    await buried(path, FULL, dead())
    whole = path.read_bytes()
    good = [revived(FULL), revived(dead())]
    begin = whole.index(FULL.project.encode()) - 25
    end = (begin // PAGE_BYTES + 1) * PAGE_BYTES  # as the first row fills a page from behind
    # Before the record: by these SQLite finds the row, and a wrong one is no letter's damage.
    size_and_id = range(begin + 5, begin + 8)
    assert whole[size_and_id[-1]] == 1
    event = range(whole.index(FULL.event) + 30, whole.index(FULL.event) + len(FULL.event))
    left = 0
    for number, place in enumerate(
        at for at in range(begin, end) if at not in size_and_id and at not in event
    ):
        one = tmp_path / f"{number}.db"
        one.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << number % 8]) + whole[place + 1 :])
        sent = await every_chunk(one)
        assert all(chunk in good for chunk in sent), place - begin
        left += len(good) - len(sent)
    assert left > 100


async def test_a_letter_without_a_seal_is_taken_as_it_is(tmp_path: Path) -> None:
    """What the version before wrote: brought forward without a rewrite, and sent as before."""
    path = tmp_path / "b.db"
    await buried(path, FULL, dead(), dead(event=b'{"n":1e999}'))
    older(path)
    async with opened(path) as buffer:
        letters = await buffer.letters(0, 10)
        assert [letter.damaged for letter in letters] == [False] * 3
        await bury(buffer, dead())
    with database(path) as tables:
        assert tables.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        seals = [seal for (seal,) in tables.execute("SELECT seal FROM dead ORDER BY id")]
        assert [seal is None for seal in seals] == [True, True, True, False]
    change(path, "event", b'\xe9"n":1}', 2)  # which nobody can send
    async with opened(path) as buffer:
        assert await buffer.replay([1, 2, 3]) == Replayed(2, full=False, damaged=(2,))
        lease = await buffer.take(Limits(1, 1), "letters-project")
        assert lease is not None
        assert lease.chunks == (revived(FULL),)
        assert_balanced(buffer)


def older(path: Path) -> None:
    """Its file as the version before seals left it."""
    with database(path) as tables:
        tables.execute("ALTER TABLE dead DROP COLUMN seal")
        tables.execute("DELETE FROM _sqlite_migrations WHERE name = 'how_a_dead_event_was'")
        tables.execute("PRAGMA user_version = 5")


async def test_a_rescue_carries_letters_over_with_their_seals(tmp_path: Path) -> None:
    """One that was damaged before it is so afterwards, one without a seal gets none, the others are whole."""
    path = tmp_path / "b.db"
    await buried(path, FULL, dead(), dead(event=b'{"n":1e999}'), dead())
    change(path, "event", FULL.event.replace(b"1000", b"9000"))
    change(path, "seal", None, 3)
    change(path, "event", b'\xe9"n":1}', 4)
    with database(path) as tables:
        seals = tables.execute("SELECT id, seal FROM dead ORDER BY id").fetchall()
        tables.execute("UPDATE books SET total = total + 1 WHERE joint = 'dead'")  # they do not balance
    async with opened(path) as buffer:
        assert len(kept(path)) == 1
        letters = await buffer.letters(0, 10)
        assert [letter.damaged for letter in letters] == [True, False, False, True]
        assert await buffer.replay([1, 2, 3, 4]) == Replayed(2, full=False, damaged=(1, 4))
        assert_balanced(buffer)
        assert total(buffer, "dead_evicted") <= 1
    with database(path) as tables:
        assert tables.execute("SELECT id, seal FROM dead").fetchall() == [seals[0], seals[3]]


async def test_damaged_letters_make_room_for_new_ones(tmp_path: Path) -> None:
    """They are pushed out by newer ones like any others, and counted."""
    path = tmp_path / "b.db"
    size = 2**19
    async with opened(path, max_size=2**24) as buffer:
        await bury(buffer, *(dead(event=b'{"n":"%s"}' % (b"x" * size)) for _ in range(3)))
    change(path, "event", b"\xff" * (size + 8))
    async with opened(path, max_size=2**24) as buffer:
        await bury(buffer, dead(event=b'{"n":"%s"}' % (b"y" * size)))
        assert total(buffer, "dead_evicted") == 1
        assert not any(letter.damaged for letter in await buffer.letters(0, 10))
        assert_balanced(buffer)


def test_each_column_is_written() -> None:
    """None that is added later is without its place in the seal's test."""
    assert {name.strip("( )\n") for name in INSERT.split("VALUES")[0].split("dead")[1].split(",")} == {
        "id",
        *COLUMNS,
    }


# --- end to end ----------------------------------------------------------------------------------------

UUIDS = [f"00000000-0000-4000-8000-00000000000{number}" for number in range(1, 4)]
GOOD = b'{"event":"e","distinct_id":"d"}\n' * 9
POISON = b"".join(
    b'{"event":"paid","distinct_id":"d","uuid":"%b","properties":{"amount":1000,"n":1e999}}\n' % uuid.encode()
    for uuid in UUIDS
)


class Stopped:
    """A buffer with three dead letters and no agent on it yet, and what reaches the sink from now on."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.path = config.parent / "buffer.db"
        self.sent: list[dict[str, Any]] = []

    def take(self, request: Request) -> Reply:
        """Note what comes."""
        text = gzip.decompress(request.body).replace(b"1e999", b"999")
        self.sent += json.loads(text)["batch"]
        return Reply(200, b'{"status":"Ok"}')

    def flip(self, *places: tuple[bytes, int, int]) -> None:
        """Change a bit at an offset behind each occurrence of some bytes in the file."""
        data = bytearray(self.path.read_bytes())
        for found, offset, bit in places:
            at, count = -1, 0
            while (at := data.find(found, at + 1)) >= 0:
                data[at + offset] ^= bit
                count += 1
            assert count
        self.path.write_bytes(data)

    async def verb(self, *arguments: str) -> CompletedProcess[str]:
        """A sub-command of `dead-letter`."""
        return await dead_letter(self.config, *arguments)

    async def delivered(self, uuids: list[str]) -> None:
        """Wait until these came, and see that nothing else did."""
        with trio.fail_after(30):
            while len(self.sent) < len(uuids):
                await trio.sleep(0.02)
        assert sorted(event["uuid"] for event in self.sent) == uuids
        assert {event["properties"]["amount"] for event in self.sent} == {1000}


@asynccontextmanager
async def stopped(folder: Path) -> AsyncIterator[Stopped]:
    """An agent has run before a sink that refused three events."""
    async with serving(sink := Sink()) as url:
        config = configure(folder, url)
        async with running(config) as agent:
            with trio.fail_after(60):
                async with await trio.open_unix_socket(agent.stream) as stream:
                    await stream.send_all(b'{"ack":true}\n' + GOOD + POISON)
                    await stream.send_eof()
                    async for _ in stream:
                        pass
                await agent.until(delivered=9, dead=3)
                agent.send(signal.SIGTERM)
                await agent.process.wait()
        at = Stopped(config)
        sink._script = at.take
        yield at


LIVE = pytest.mark.parametrize("live", [True, False], ids=["running", "offline"])


@LIVE
async def test_what_was_altered_is_never_sent(tmp_path: Path, *, live: bool) -> None:
    """Another uuid and another amount, both valid JSON: named, left, and the others arrive as they were."""
    async with stopped(tmp_path) as at:
        at.flip(
            (UUIDS[0].encode(), 35, 2),
            (b'"amount":1000,"n":1e999', 9, 8),
        )
        # All three have the amount: two are mended again.
        data = at.path.read_bytes()
        for uuid in UUIDS[1:]:
            begin = data.index(uuid.encode())
            place = data.index(b'"amount":', begin) + 9
            data = data[:place] + b"1" + data[place + 1 :]
        at.path.write_bytes(data)
        async with running(at.config) if live else nullcontext():
            listed = json.loads((await at.verb("list", "--json")).stdout)
            assert [letter["damaged"] for letter in listed] == [True, False, False]
            one = await at.verb("replay", "1")
            assert (one.returncode, one.stdout) == (1, "replayed 0 of 1\n")
            assert "1 letter is damaged" in one.stderr
            assert "dead-letter purge 1\n" in one.stderr
            every = await at.verb("replay")
            assert (every.returncode, every.stdout) == (0, "replayed 2 of 3\n")
            assert "1 letter is damaged (not what was written), not sent, and kept: 1\n" in every.stderr
            assert "dead-letter purge 1\n" in every.stderr
        async with running(at.config) as agent:
            await at.delivered(UUIDS[1:])
            status = await agent.until(delivered=11, dead=3, replayed=2)
            assert status["books"]["balanced"]
            assert status["buffer"]["dead_letters"] == 1


@LIVE
async def test_one_that_nobody_can_read_is_in_nobodys_way(tmp_path: Path, *, live: bool) -> None:
    """All commands do their work on the others, and say which it is."""
    async with stopped(tmp_path) as at:
        with database(at.path) as tables:
            (event,) = tables.execute("SELECT event FROM dead WHERE id = 1").fetchone()
        at.flip((event[:100], 1, 0x80))
        async with running(at.config) if live else nullcontext():
            plain = await at.verb("list")
            assert plain.returncode == 0, plain.stderr
            first, second, _ = plain.stdout.splitlines()
            assert first.endswith("default  damaged: not what was written")
            assert "paid of d: rejected: " in second
            listed = json.loads((await at.verb("list", "--json")).stdout)
            assert [letter["damaged"] for letter in listed] == [True, False, False]
            assert [listed[0][name] for name in ("event", "distinct_id", "uuid")] == [""] * 3
            shown = await at.verb("show", "1")
            assert shown.returncode == 0
            assert "damaged      not what was written" in shown.stdout
            assert "dead-letter purge 1" in shown.stdout
            assert "paid" in json.loads((await at.verb("show", "1", "--json")).stdout)["body"]
            exported = await at.verb("export")
            assert exported.returncode == 0
            events = parsed(exported.stdout.replace("1e999", "999"))
            assert [each["uuid"] for each in events] == UUIDS[1:]
            assert "1 letter is damaged (not what was written), left out, and kept: 1\n" in exported.stderr
            alone = await at.verb("export", "1", "2")
            assert alone.returncode == 1
            assert UUIDS[1] in alone.stdout
            assert "left out" in alone.stderr
            mixed = await at.verb("replay", "1", "2", "3")
            assert (mixed.returncode, mixed.stdout) == (1, "replayed 2 of 3\n")
            assert "not sent" in mixed.stderr
            assert (await at.verb("purge", "1")).stdout == "purged 1 of 1\n"
            assert (await at.verb("list")).stderr == "there are no dead letters\n"
        async with running(at.config) as agent:
            await at.delivered(UUIDS[1:])
            status = await agent.until(delivered=11, dead=3, replayed=2)
            assert status["books"]["balanced"]


async def test_all_damaged_letters_are_purged_with_the_others(tmp_path: Path) -> None:
    """`purge --all` asks no letter what it is."""
    async with stopped(tmp_path) as at:
        at.flip((b'"event":"paid"', 3, 0x80))
        change(at.path, "project", b"\xff", 2)
        assert (await at.verb("purge", "--all")).stdout == "purged 3 of 3\n"
        async with running(at.config) as agent:
            assert (await agent.until(dead=3))["books"]["balanced"]
        assert not at.sent


async def test_letters_of_the_version_before_are_sent_as_before(tmp_path: Path) -> None:
    """An agent that is brought forward takes them as they are."""
    async with stopped(tmp_path) as at:
        older(at.path)
        async with running(at.config) as agent:
            assert (await at.verb("replay")).stdout == "replayed 3 of 3\n"
            await at.delivered(UUIDS)
            assert (await agent.until(delivered=12, replayed=3))["books"]["balanced"]


async def test_the_pages_answer_whatever_a_letter_holds(tmp_path: Path) -> None:
    """No status of 500, with the events themselves or without."""
    path = tmp_path / "buffer.db"
    await buried(path, FULL, dead())
    for column in COLUMNS[:-2]:
        change(path, column, b"\xff\x00")
    async with running(configure(tmp_path, "http://127.0.0.1:9")):
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
            for page in ("/dead-letters", "/dead-letters?full=1", "/dead-letters/1"):
                answer = await client.get(page)
                assert answer.status_code == 200
                assert b'"damaged":true' in answer.content
                json.loads(answer.content)
