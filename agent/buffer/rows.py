"""The buffer's statements, what they are asked for, and what a transaction changes beside its rows."""

from collections import Counter
from collections.abc import Callable, Container, Sequence

import msgspec

from agent.buffer import Books, DeadEvent, Lease, Limits
from agent.events import Burial, Chunk, Tally
from agent.pack import crc32, inflate

INSERT_CHUNK = """INSERT INTO chunk
    (id, project, key, events, size, crc, received_at, boot, monotonic, bytes, packed, marks, burials, seal)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
DELETE_CHUNK = "DELETE FROM chunk WHERE id = ?"
UPDATE_CHUNK = """UPDATE chunk SET events = ?, size = ?, crc = ?, bytes = ?, packed = ?, seal = ?
    WHERE id = ?"""
ENTER = """INSERT INTO books VALUES (?, ?, ?, ?)
    ON CONFLICT (joint, label, reason) DO UPDATE SET total = total + excluded.total"""
COUNT_LANES = """SELECT project, key, count(*), max(id), sum(events), sum(bytes)
    FROM chunk GROUP BY project, key"""
CHUNK_BY_ID = """SELECT events, size, crc, received_at, boot, monotonic, packed, marks, burials, seal
    FROM chunk WHERE id = ?"""
OLDEST = "SELECT id, project, key FROM chunk ORDER BY id"
# Cast, as a damaged row holds anything.
STAMPS = """SELECT id, project, key, ifnull(CAST(received_at AS INTEGER), 0),
    ifnull(CAST(monotonic AS INTEGER), 0), ifnull(CAST(boot AS TEXT), '')
    FROM chunk WHERE id > ? ORDER BY id"""
FIRST_STAMP = f"{STAMPS} LIMIT 1"
IDS_UPTO = "SELECT id FROM chunk WHERE project = ? AND key IS ? AND id <= ? ORDER BY id"
INDEXED = """SELECT events, bytes FROM chunk INDEXED BY chunk_lane
    WHERE project = ? AND key IS ? AND id = ?"""

# What a row costs beside its packed bytes: columns, its index entry, page headers; measured, rounded up.
ROW_BYTES = 200


class Deposit(msgspec.Struct, eq=False):
    """A put: `taken` is None while it waits for room, or is `written` to a file that has no name."""

    chunks: Sequence[Chunk]
    tally: Tally
    taken: int | None = None
    written: int | None = None

    def withhold(self) -> None:
        """It is not to be acknowledged yet, nor to be written again."""
        if self.taken is not None:
            self.written, self.taken = self.taken, None

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
    """What a transaction does beside its rows; applied once it is committed. `room` is for chunks at all."""

    room: bool = True
    books: Books = msgspec.field(default_factory=Counter)
    events: int = 0
    bytes: int = 0
    dead_letters: int = 0
    dead_bytes: int = 0
    newest_letter: int = 0
    lanes: list[Callable[[], None]] = msgspec.field(default_factory=list)

    def count(self, chunk: Chunk) -> None:
        """A chunk is in the buffer."""
        self.events += chunk.events
        self.bytes += len(chunk.packed)


def row_of(chunk: Chunk, ident: int | None = None) -> tuple[object, ...]:
    """What `INSERT_CHUNK` is given; without an id it gets the next one."""
    return (
        ident, chunk.project, chunk.key, chunk.events, chunk.size, chunk.crc, chunk.received_at, chunk.boot,
        chunk.monotonic, len(chunk.packed), chunk.packed, chunk.marks, told_burials(chunk.burials),
        seal_of(chunk),
    )  # fmt: skip


def told_burials(burials: tuple[Burial, ...]) -> str | None:
    """As they stand in a row; most have none."""
    return msgspec.json.encode(burials).decode() if burials else None


def read_burials(text: object) -> tuple[Burial, ...]:
    """What `told_burials` wrote; ValueError where it did not."""
    if text is None:
        return ()
    if not isinstance(text, str):
        raise ValueError("no text")  # noqa: TRY004  # a value that is damaged, not a caller's mistake
    return msgspec.json.decode(text, type=tuple[Burial, ...])


def seal_of(chunk: Chunk) -> int:
    """A CRC-32 of all that a chunk is: by it a row is known to be as it was written, unopened."""
    fields = (
        chunk.project, chunk.key, chunk.events, chunk.size, chunk.crc, chunk.received_at, chunk.boot,
        chunk.monotonic, chunk.marks, chunk.burials,
    )  # fmt: skip
    return crc32(chunk.packed, crc32(msgspec.json.encode(fields)))


def chunk_of(lane: tuple[object, object], row: Sequence[object]) -> Chunk | None:
    """What `CHUNK_BY_ID` found; None where it is not what was written.

    A row of an older agent has no seal: its events are opened to be sure of them.
    """
    fields = dict(zip(_FIELDS, (*lane, *row), strict=True))
    try:
        fields["burials"] = read_burials(fields["burials"])
        chunk = msgspec.convert(fields, Chunk)
        if row[-1] is None:
            inflate(chunk.packed, chunk.size, chunk.crc)
            return chunk
        return chunk if seal_of(chunk) == row[-1] else None
    except ValueError:
        return None


_FIELDS = (
    "project", "key", "events", "size", "crc", "received_at", "boot", "monotonic", "packed", "marks",
    "burials", "seal",
)  # fmt: skip


def same_origin(old: Chunk, new: Chunk) -> bool:
    """Whether `new` is what is left of `old`: it keeps its chunk's times."""
    return (old.received_at, old.monotonic, old.boot, old.burials) == (
        new.received_at, new.monotonic, new.boot, new.burials,
    )  # fmt: skip
