"""A buffer that lived, and what may become of its files: the named cases of damage."""

import os
import random
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import msgspec
from test_buffer_contract import bury, dead, put, take
from test_sqlite import opened

from agent.buffer import Buffer, Limits, leased
from agent.buffer.file import PAGE_BYTES
from agent.buffer.log import FRAME, HEADER
from agent.buffer.pages import Pages
from agent.buffer.salvage import chunk_in
from agent.events import Chunk
from agent.pack import crc32, deflate, inflate

LOG = "-wal"
# A frame of the log with its page.
STEP = FRAME + PAGE_BYTES
# More chunks than one page of their index lists (about 340), so that it has pages of every kind.
SMALL, MIDDLING, LARGE = 420, 12, 10


class Sample(NamedTuple):
    """The files of a buffer: at rest, and as a kill leaves them; what waits in them, and what is settled."""

    rest: Path
    killed: Path
    owed: dict[str, bytes]
    settled: dict[str, bytes]
    letters: int


def events(chance: random.Random, count: int, pad: int) -> list[bytes]:
    """Vouched events that do not pack well, so that a chunk of them has pages of its own."""
    made = []
    for _ in range(count):
        uuid = UUID(int=chance.getrandbits(128), version=4)
        text = chance.randbytes(pad).hex()
        made.append(
            f'{{"uuid":"{uuid}","event":"e","distinct_id":"d","timestamp":"2026-11-01T00:00:00.000Z",'
            f'"properties":{{"pad":"{text}"}}}}'.encode()
        )
    return made


def chunk_of(some: list[bytes], **more: object) -> Chunk:
    """A chunk as the door makes it."""
    data = b",".join(some)
    fields = {"project": "default", "received_at": 1_790_000_000_000_000, "boot": "b", "monotonic": 1, **more}
    return msgspec.convert(
        {"events": len(some), "size": len(data), "crc": crc32(data), "packed": deflate(data), **fields}, Chunk
    )


def uuids(some: list[bytes]) -> dict[str, bytes]:
    """Events by their uuid."""
    return {msgspec.json.decode(event)["uuid"]: event for event in some}


def events_in(chunk: Chunk) -> list[bytes]:
    """A chunk's events; ValueError where they are not what its checksum says."""
    return (
        msgspec.json.encode(msgspec.json.decode(b"[" + inflate(chunk.packed, chunk.size, chunk.crc) + b"]"))[
            1:-1
        ]
        .replace(b'}},{"uuid', b'}}\n{"uuid')
        .split(b"\n")
    )


async def lived(folder: Path) -> Sample:
    """A buffer that was filled, partly settled, stopped, and was at work again when it was killed."""
    chance = random.Random(6)
    path = folder / "buffer.db"
    owed: dict[str, bytes] = {}
    settled: dict[str, bytes] = {}

    async def put_some(buffer: Buffer, count: int, size: int, pad: int) -> None:
        chunks = []
        for number in range(count):
            some = events(chance, size, pad)
            owed.update(uuids(some))
            chunks.append(chunk_of(some, key="phc_others" if number % 20 == 19 else None))
        await put(buffer, *chunks)

    async def settle(buffer: Buffer, count: int) -> None:
        async with leased(buffer, await take(buffer, Limits(count, 2**30))) as lease:
            for one in lease.chunks:
                for uuid, event in uuids(events_in(one)).items():
                    settled[uuid] = event
                    del owed[uuid]
            await buffer.settle(lease)

    async with opened(path) as buffer:
        await bury(buffer, *(dead(event=b'{"event":"%s"}' % (b"x" * size)) for size in (10, 100, 40_000, 10)))
        for size, pad, count in ((10, 200, MIDDLING), (100, 300, LARGE), (1, 20, SMALL)):
            await put_some(buffer, count, size, pad)
        await settle(buffer, 320)
        await buffer.note_clock("boot", 5)
        await buffer.note_drops("app", "boot/1", 7)
    async with opened(path) as buffer:
        await put_some(buffer, LARGE // 2, 100, 300)
        for _ in range(4):
            await put_some(buffer, 5, 1, 20)
            await put_some(buffer, 1, 100, 300)
            await settle(buffer, 1)
        await settle(buffer, 200)  # which leaves free pages
        killed = folder / "killed"
        killed.mkdir()
        for name in ("buffer.db", "buffer.db-wal"):
            shutil.copy(folder / name, killed / name)
        letters = buffer.stats().dead_letters
    rest = folder / "rest"
    rest.mkdir()
    shutil.copy(path, rest / "buffer.db")
    return Sample(rest, killed, owed, settled, letters)


Change = Callable[[Path], None]


class Case(NamedTuple):
    """One way to do harm: to the files at rest or to those that a kill left.

    `most` is how many events may be lost of it, None where it may be all. `silent`: what is lost cannot be
    counted, as with the log the books of it are gone too.
    """

    name: str
    change: Change
    killed: bool = False
    most: int | None = 0
    silent: bool = False


def flip(at: int, count: int = 1, end: str = "", *, bits: int = 0x55) -> Change:
    """Other bytes at a place in the database or in its log: each with these bits turned."""

    def change(path: Path) -> None:
        with open(f"{path}{end}", "r+b") as file:
            file.seek(at)
            old = file.read(count)
            file.seek(at)
            file.write(bytes(byte ^ bits for byte in old))

    return change


def write(at: int, data: bytes, end: str = "") -> Change:
    """These bytes at a place."""

    def change(path: Path) -> None:
        with open(f"{path}{end}", "r+b") as file:
            file.seek(at)
            file.write(data)

    return change


def cut(at: int, end: str = "") -> Change:
    """Nothing from a place on."""
    return lambda path: os.truncate(f"{path}{end}", at)


def remove(end: str) -> Change:
    """One of the files is gone."""
    return lambda path: os.unlink(f"{path}{end}")


def beside(end: str, data: bytes | None) -> Change:
    """A file beside the database, or a directory."""

    def change(path: Path) -> None:
        place = Path(f"{path}{end}")
        if place.exists():
            place.unlink()
        place.mkdir() if data is None else place.write_bytes(data)

    return change


def pages_of(path: Path) -> dict[str, int]:
    """A page of every kind in a database at rest."""
    with sqlite3.connect(path) as database:
        roots = dict(database.execute("SELECT name, rootpage FROM sqlite_schema"))
        trunk = int.from_bytes(path.read_bytes()[32:36], "big")
        free = database.execute("PRAGMA freelist_count").fetchone()[0]
    database.close()
    assert free > 1
    pages = Pages(path)
    kinds: dict[str, int] = {"schema": 1, "map": 2, "free-list": trunk}
    kinds["free"] = int.from_bytes(pages.page(trunk)[8:12], "big")
    for sheet in pages.sheets():
        for row in sheet.rows:
            shape = "row" if row.id is not None else "index"
            match shape, row.values, len(row.pages):
                case "row", (_, _, _, int(), *more), 1 if len(more) == 10:
                    kinds["chunks"] = sheet.page
                case "row", (_, _, _, int(), *more), length if len(more) == 10 and length > 3:
                    kinds.setdefault("large-chunks", sheet.page)
                    kinds.setdefault("overflow-first", row.pages[1])
                    kinds.setdefault("overflow-last", row.pages[-1])
                case "row", (_, _, _, str(), *more), length if len(more) == 10:
                    kinds["dead"] = sheet.page
                    if length > 1:
                        kinds["dead-overflow"] = row.pages[1]
                case "index", (_, _, _, _, _, _), 1 if sheet.page != roots["chunk_lane"]:
                    kinds["lane"] = sheet.page
    pages.close()
    named = {
        "chunk": "chunk-root",
        "chunk_lane": "lane-root",
        "dead_size": "sizes",
        "books": "books",
        "clock": "clock",
        "drops": "drops",
    }
    kinds |= {kind: roots[name] for name, kind in named.items()}
    kinds |= {"sequence": roots["sqlite_sequence"], "migrations": roots["_sqlite_migrations"]}
    return kinds


def held_by(path: Path) -> Counter[int]:
    """How many events have something on a page."""
    held: Counter[int] = Counter()
    pages = Pages(path)
    for sheet in pages.sheets():
        for row in sheet.rows:
            if (chunk := chunk_in(row)) is not None:
                held.update(dict.fromkeys(row.pages, chunk.events))
    pages.close()
    return held


def cases(sample: Sample) -> Iterator[Case]:
    """All of them."""
    yield from _of_pages(sample)
    yield from _of_the_header()
    yield from _of_the_log(sample)
    yield from _of_whole_files(sample)


def _of_pages(sample: Sample) -> Iterator[Case]:
    noise = random.Random(1).randbytes(PAGE_BYTES)
    held = held_by(sample.rest / "buffer.db")
    for kind, page in pages_of(sample.rest / "buffer.db").items():
        at, most = (page - 1) * PAGE_BYTES, held[page]
        # Of half a page of books nobody knows what the other half was: what is delivered may seem lost.
        half = kind == "books"
        yield Case(f"{kind}: its first byte", flip(at), most=most)
        yield Case(
            f"{kind}: where its cells are",
            flip(at + 3 + (100 if page == 1 else 0), 12),
            most=most,
            silent=half,
        )
        yield Case(f"{kind}: in its middle", flip(at + PAGE_BYTES // 2, 16), most=most, silent=half)
        yield Case(f"{kind}: at its end", flip(at + PAGE_BYTES - 40, 40), most=most, silent=half)
        yield Case(f"{kind}: zeros", write(at, bytes(PAGE_BYTES)), most=most)
        yield Case(f"{kind}: noise", write(at, noise), most=most)
        yield Case(f"{kind}: cut before it", cut(at), most=None)
        yield Case(f"{kind}: cut within it", cut(at + PAGE_BYTES // 3), most=None)
        if kind == "lane-root":
            data = (sample.rest / "buffer.db").read_bytes()[at : at + PAGE_BYTES]
            entries = [found.start() for found in re.finditer(b"default", data)]
            for number in (0, len(entries) // 2, -1):
                yield Case(f"{kind}: whose entry {number} is", flip(at + entries[number], 7, bits=0x80))


# The fields of a database's header (https://www.sqlite.org/fileformat.html, 1.3).
FIELDS = {
    "magic": 0, "page size": 16, "write version": 18, "read version": 19, "reserved": 20, "fractions": 21,
    "change counter": 24, "page count": 28, "free list": 32, "free count": 36, "schema cookie": 40,
    "schema format": 44, "largest root": 52, "encoding": 56, "user version": 60, "user version, low": 63,
    "incremental": 64, "application": 68, "valid for": 92,
}  # fmt: skip


def _of_the_header() -> Iterator[Case]:
    for name, at in FIELDS.items():
        yield Case(f"header: {name}", flip(at))


def _of_the_log(sample: Sample) -> Iterator[Case]:
    size = (sample.killed / "buffer.db-wal").stat().st_size
    frames = (size - HEADER) // STEP
    middle = HEADER + frames // 2 * STEP

    def case(name: str, change: Change, most: int | None = 0, *, silent: bool = False) -> Case:
        return Case(f"log: {name}", change, killed=True, most=most, silent=silent)

    # Of a page's image some chunks may be gone.
    yield case("nothing", lambda path: None)
    yield case("its magic", flip(0, 1, LOG))
    yield case("its page size", flip(9, 1, LOG))
    yield case("its salts", flip(16, 8, LOG))
    yield case("its checksum", flip(24, 8, LOG), 300)
    yield case("zeros for its header", write(0, bytes(HEADER), LOG), 300)
    yield case("the first frame's page", flip(HEADER + FRAME + 5000, 16, LOG), 300)
    yield case("the first frame's head", flip(HEADER, 4, LOG), 300)
    yield case("a frame in the middle", flip(middle + FRAME + 5000, 16, LOG), 300)
    yield case("zeros for a frame in the middle", write(middle, bytes(STEP), LOG), None)
    yield case("a salt in the middle", flip(middle + 8, 4, LOG), 300)
    yield case("the last frame", flip(size - 5000, 16, LOG), None, silent=True)
    yield case("cut in its middle", cut(middle, LOG), None, silent=True)
    yield case("cut within a frame", cut(middle + 100, LOG), None, silent=True)
    yield case("cut behind its header", cut(HEADER, LOG), None, silent=True)
    yield case("cut within its header", cut(9, LOG), None, silent=True)
    yield case("empty", cut(0, LOG), None, silent=True)
    yield case("deleted", remove(LOG), None, silent=True)
    yield case("noise", beside(LOG, random.Random(2).randbytes(size)), None, silent=True)
    yield case("another database's", _others_log, None, silent=True)


def _others_log(path: Path) -> None:
    """The log of a database that was no buffer."""
    other = path.with_name("other.db")
    with sqlite3.connect(other, isolation_level=None) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE theirs (x)")
        database.executemany("INSERT INTO theirs VALUES (?)", [(b"x" * 9000,) for _ in range(9)])
        shutil.copy(f"{other}-wal", f"{path}-wal")
    database.close()
    other.unlink()


def _of_whole_files(sample: Sample) -> Iterator[Case]:
    size = (sample.rest / "buffer.db").stat().st_size
    killed = (sample.killed / "buffer.db").stat().st_size
    for length in (1, 15, 16, 60, 99, 100, 512, 4096):
        yield Case(f"file: only {length} bytes", cut(length), most=None)
    yield Case("file: empty", cut(0), most=None, silent=True)
    yield Case("file: empty, with its log", cut(0), killed=True, most=None)
    yield Case("file: deleted, with its log", remove(""), killed=True, most=None)
    yield Case("file: zeros", write(0, bytes(size)), most=None)
    yield Case("file: zeros, with its log", write(0, bytes(killed)), killed=True, most=None)
    yield Case("file: zeros in its first half", write(0, bytes(size // 2)), most=None)
    yield Case("file: zeros in its last half", write(size // 2, bytes(size - size // 2)), most=None)
    yield Case("file: cut to half a page more", cut(size - PAGE_BYTES // 2), most=None)
    yield Case("file: longer", write(size, b"\xff" * 100_000))
    yield Case("file: one page lost, those behind it moved", _moved, most=None)
    yield Case("beside: a log that is a stranger's", beside(LOG, b"hello" * 999))
    yield Case("beside: shared memory that is noise", beside("-shm", random.Random(3).randbytes(32768)))
    yield Case("beside: a journal that is noise", beside("-journal", random.Random(4).randbytes(9999)))
    yield Case("beside: a begun rescue", beside(".new", b""), most=0)
    yield Case(
        "beside: a begun rescue that is noise", beside(".new", random.Random(5).randbytes(9999)), most=0
    )


def _moved(path: Path) -> None:
    data = path.read_bytes()
    half = len(data) // PAGE_BYTES // 2 * PAGE_BYTES
    path.write_bytes(data[:half] + data[half + PAGE_BYTES :])
