"""The buffer's statements, what they are asked for, and what a transaction changes beside its rows."""

from collections import Counter
from collections.abc import Callable, Container, Sequence

import msgspec

from agent.buffer import Books, DeadEvent, Lease, Limits
from agent.buffer.lanes import Lane
from agent.events import Burial, Chunk, Tally

INSERT_CHUNK = """INSERT INTO chunk
    (project, key, events, size, crc, received_at, boot, monotonic, bytes, packed, marks, burials)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
UPDATE_CHUNK = "UPDATE chunk SET events = ?, size = ?, crc = ?, bytes = ?, packed = ? WHERE id = ?"
ENTER = """INSERT INTO books VALUES (?, ?, ?, ?)
    ON CONFLICT (joint, label, reason) DO UPDATE SET total = total + excluded.total"""
COUNT_LANES = """SELECT project, key, count(*), max(id), sum(events), sum(bytes)
    FROM chunk GROUP BY project, key"""
CHUNK_BY_ID = """SELECT events, size, crc, received_at, boot, monotonic, packed, marks, burials
    FROM chunk WHERE id = ?"""
OLDEST = "SELECT id, project, key, events, bytes, received_at FROM chunk ORDER BY id"

# What a row costs beside its packed bytes: columns, its index entry, page headers; measured, rounded up.
ROW_BYTES = 200


class Deposit(msgspec.Struct, eq=False):
    """A put: `taken` is None while it waits for room."""

    chunks: Sequence[Chunk]
    tally: Tally
    taken: int | None = None

    @property
    def events(self) -> int:
        """How many events it brings."""
        return sum(chunk.events for chunk in self.chunks)

    @property
    def bytes(self) -> int:
        """About how many bytes it will take on disk."""
        return sum(len(chunk.packed) + ROW_BYTES for chunk in self.chunks)


class Settlement(msgspec.Struct, eq=False):
    """A settle: `damaged` events could not be read any more, `warned` ones were taken with a remark."""

    lease: Lease
    dead: Sequence[DeadEvent]
    rest: Sequence[Chunk]
    damaged: int
    warned: int


class Taking(msgspec.Struct, eq=False):
    """A take and what it got."""

    limits: Limits
    project: str
    without: Container[str | None]
    lease: Lease | None = None


class Change(msgspec.Struct):
    """What a transaction does beside its rows; applied once it is committed."""

    books: Books = msgspec.field(default_factory=Counter)
    events: int = 0
    bytes: int = 0
    dead_letters: int = 0
    dead_bytes: int = 0
    newest_letter: int = 0
    lanes: list[Callable[[], None]] = msgspec.field(default_factory=list)


def row_of(chunk: Chunk) -> tuple[object, ...]:
    """What `INSERT_CHUNK` is given."""
    return (
        chunk.project, chunk.key, chunk.events, chunk.size, chunk.crc, chunk.received_at, chunk.boot,
        chunk.monotonic, len(chunk.packed), chunk.packed, chunk.marks, told_burials(chunk.burials),
    )  # fmt: skip


def told_burials(burials: tuple[Burial, ...]) -> str | None:
    """As they stand in a row; most have none."""
    return msgspec.json.encode(burials).decode() if burials else None


def read_burials(text: str | None) -> tuple[Burial, ...]:
    """What `told_burials` wrote."""
    return msgspec.json.decode(text, type=tuple[Burial, ...]) if text else ()


def chunk_of(lane: Lane, row: tuple[int, int, int, int, str, int, bytes, int, str | None]) -> Chunk:
    """What `CHUNK_BY_ID` found."""
    events, size, crc, received_at, boot, monotonic, packed, marks, burials = row
    return Chunk(
        project=lane[0],
        key=lane[1],
        events=events,
        size=size,
        crc=crc,
        received_at=received_at,
        boot=boot,
        monotonic=monotonic,
        packed=packed,
        marks=marks,
        burials=read_burials(burials),
    )


def same_origin(old: Chunk, new: Chunk) -> bool:
    """Whether `new` is what is left of `old`: it keeps its chunk's times."""
    return (old.received_at, old.monotonic, old.boot, old.burials) == (
        new.received_at, new.monotonic, new.boot, new.burials,
    )  # fmt: skip
