"""The wall between accepting and delivering: what a buffer promises, whatever it is made of.

Custody passes at two moments. When `put` has returned, the buffer owns the events and they may be
acknowledged. When `settle` has returned, it no longer does. Everything between may crash.
"""

from collections import Counter
from collections.abc import AsyncIterator, Collection, Container, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from sys import maxsize
from typing import IO, Literal, NamedTuple, Protocol

import msgspec
import trio

from agent import AgentError
from agent.events import GIVEN, LONG, Burial, Chunk, Tally
from agent.pack import crc32, deflate

Shed = Literal["full_oldest", "full_newest", "expired", "damaged", "shutdown"]
SHED: tuple[Shed, ...] = Shed.__args__  # type: ignore[attr-defined]  # typing keeps the values there

# A board that is switched off each night, and waits three years for its network.
CLOCKS_KEPT = 1000
# Each start opens new sockets unless systemd holds them; only those that dropped something are noted.
SOCKETS_KEPT = 1000

# What a delivery says that passes over nobody's events.
NOBODY: Container[str | None] = frozenset()

# How long leaving a lease's block may shield itself from cancellation to release or settle it.
PARTING_SECONDS = 1.0


class BufferBroken(AgentError):
    """The buffer cannot be opened, or no longer be written."""


class BufferBusy(BufferBroken):
    """Another agent owns the buffer."""

    exit_code = 75


class Entry(NamedTuple):
    """One line of the books: which total, whose (a source's or project's name), and why."""

    joint: str
    label: str
    reason: str


Books = Counter[Entry]


class Limits(NamedTuple):
    """How much one lease may hold: events, their bytes, those packed; the first chunk is always given."""

    events: int
    size: int
    packed: int = maxsize


def fitting(chunks: Iterable[tuple[int, int, int, int]], limits: Limits) -> list[int]:
    """The ids of the first chunks that a lease may hold, told as id, events, size, packed bytes."""
    ids: list[int] = []
    events = size = packed = 0
    for ident, more_events, more_size, more_packed in chunks:
        events, size, packed = events + more_events, size + more_size, packed + more_packed
        if ids and (events > limits.events or size > limits.size or packed > limits.packed):
            break
        ids.append(ident)
    return ids


class DeadEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that PostHog will never take, kept with its reason. `at` is in microseconds.

    `received_at`, `boot`, `monotonic` and `marks` are its chunk's; `burials` are earlier ones, of an event
    that was sent again.
    """

    project: str
    key: str | None = None
    event: bytes
    reason: str
    detail: str
    at: int
    received_at: int
    boot: str = ""
    monotonic: int = 0
    marks: int = GIVEN | LONG
    attempts: int = 1
    burials: tuple[Burial, ...] = ()


class DeadLetter(DeadEvent, frozen=True, kw_only=True):
    """A dead event in the buffer; ids rise in the order of burial and are never used twice.

    One that is `damaged` is not what was buried, and is never sent; what cannot be read of it is empty.
    """

    id: int
    damaged: bool = False


class Replayed(NamedTuple):
    """How many dead letters wait for delivery again; `full` where the buffer had no room for the others.

    `damaged` are those that are not what was buried: they stay where they are.
    """

    letters: int
    full: bool
    damaged: tuple[int, ...] = ()


class LettersKept(NamedTuple):
    """How many dead letters there are, and the newest one's id (0: none)."""

    letters: int
    newest: int


# What is asked for in one go: at most 100 events of 900 KiB, and most are a thousandth of that.
LETTERS_AT_ONCE = 100

# What is looked at in one go: of most letters 10 ms, in which nobody else has the file.
LETTERS_PAGE = 500
LETTERS_BYTES = 8 * 2**20

# What is forgotten in one go, as most letters are small: 10 ms, most of them the disk's sync. More bytes than
# these take longer, as each page is given back.
PURGED_AT_ONCE = 1000
PURGED_BYTES = 32 * 2**20

# Earlier burials of one event that are kept: enough to see a pattern, and no letter grows without bound.
MOST_BURIALS = 20


class Lease(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Chunks taken from the buffer and neither settled nor released; dies with the process.

    At the time `until` (µs, by this boot's own clock) the oldest of them reaches `max_age`: then it is to be
    given back, and shed.
    """

    project: str
    key: str | None
    chunks: tuple[Chunk, ...]
    ids: tuple[int, ...]
    until: int | None = None


class Stats(NamedTuple):
    """What the buffer holds: events, their packed bytes, bytes on disk, the bound, when the oldest came (µs).

    `free_bytes` is what `put` may still use; the bytes on disk do not tell, as some are free pages, and some
    of the bound is kept for `settle`. `unleased` is the events of each project that nobody has on lease.
    `dropping` is how many events `when_full` has let go since it began to, 0 when it does not.
    """

    events: int
    bytes: int
    disk_bytes: int
    limit_bytes: int
    oldest: int | None
    dead_letters: int
    free_bytes: int
    waiting: int  # puts that found no room
    unleased: Mapping[str, int]
    dropping: int = 0

    @property
    def filled(self) -> float:
        """How much of the room for events is taken: 1 is full."""
        room = self.bytes + self.free_bytes
        return self.bytes / room if room else 1.0


class Buffer(Protocol):
    """At least once; leased chunks are never shed; roughly oldest first, no order between leases.

    The books belong to the buffer: each method enters what it did in the same transaction, and `books`
    shows only what is committed.
    """

    async def put(self, chunks: Sequence[Chunk], tally: Tally) -> int:
        """Own the chunks and book the tally; returns once durable how many events were taken.

        Fewer than given means that the newest chunks were shed (`drop_newest`). With `block` it waits
        for room; cancelled while it waits, the chunks are not taken.
        """

    async def take(
        self, limits: Limits, project: str, without: Container[str | None] = NOBODY
    ) -> Lease | None:
        """Lease the oldest chunks of one project and key; None when there are none to lease.

        Keys take turns, and those in `without` (None is the project's own) are passed over.
        """

    async def settle(
        self,
        lease: Lease,
        dead: Sequence[DeadEvent] = (),
        rest: Sequence[Chunk] = (),
        damaged: int = 0,
        warned: int = 0,
    ) -> None:
        """Forget the lease, bury `dead` and keep `rest`, in one transaction.

        `damaged` events of it could not be read any more and are shed; all others were delivered, `warned` of
        them with a remark.
        """

    async def release(self, lease: Lease) -> None:
        """Give the lease back untouched; it goes to the back."""

    async def ready(
        self, project: str, events: int, linger: float, without: Container[str | None] = NOBODY
    ) -> Collection[str | None]:
        """Return the keys of which `events` wait to be leased, or some have waited `linger` seconds.

        It waits until there is one. Those in `without` do not count, whatever they do.
        """

    async def note_clock(self, boot: str, ahead: int) -> None:
        """Remember how far the wall clock of this boot is ahead of its monotonic one (µs), for later boots.

        Raises `BufferBroken` where it cannot be written.
        """

    def clocks(self) -> Mapping[str, int]:
        """What was noted last of each boot, the newest `CLOCKS_KEPT`."""

    async def note_drops(self, source: str, socket: str, total: int) -> None:
        """Book as dropped what the kernel's count of a socket says beyond the last note of it.

        `socket` names it for ever, also after reboots; of one that was never noted everything is new. In one
        transaction, so that each datagram is booked once whoever reads the socket, and whatever is killed.
        Raises `BufferBroken` where it cannot be written.
        """

    async def answer(self) -> None:
        """Return once whoever writes has taken this up too: a sign that it turns, not that it can write."""

    def stats(self) -> Stats:
        """What it holds now."""

    def books(self) -> Books:
        """The totals since the buffer was made, a copy."""

    def close_door(self) -> None:
        """From now on a put that finds no room is given up, counted as shed by the shutdown."""

    @property
    def trouble(self) -> str:
        """Why the last write failed; empty when it did not."""


class DeadLetters(Protocol):
    """What PostHog refused, for people to look at; kept by the same classes that are a `Buffer`.

    Each method is one transaction, so it is asked for at most `LETTERS_AT_ONCE` where events are read.
    Raises `BufferBroken` where the buffer cannot be read or written.
    """

    async def letters_kept(self) -> LettersKept:
        """How many there are."""

    async def letters(self, after: int, most: int) -> Sequence[DeadLetter]:
        """The first `most` letters whose id is beyond `after`, the oldest first; fewer of large ones."""

    async def letter(self, ident: int) -> DeadLetter | None:
        """One of them."""

    async def replay(self, ids: Sequence[int]) -> Replayed:
        """Let these wait for delivery again, as they were: same uuid, same time.

        Unknown ids are skipped.
        """

    async def purge(self, ids: Sequence[int]) -> int:
        """Forget these for good; how many of them there were."""

    async def purge_upto(self, newest: int) -> int:
        """Forget the oldest up to this id, at most `PURGED_AT_ONCE`: how many; 0: there are no more."""


# A chunk that is in the buffer, on lease or not, by its id; ids rise as chunks are put.
Shown = tuple[int, Chunk]


class Contents(Protocol):
    """What is in the buffer, for people to copy; kept by the same classes. Nothing is taken from delivery."""

    async def newest(self) -> int:
        """The newest chunk's id, 0 where there never was one."""

    async def beyond(self, after: int, upto: int, size: int) -> Sequence[Shown]:
        """The first chunks with ids beyond `after` and up to `upto`, about `size` bytes of events."""

    def copied(self) -> AbstractAsyncContextManager[IO[bytes]]:
        """A consistent copy of the database for a block. Raises `BufferBroken` where none can be made."""


class Kept(Buffer, DeadLetters, Contents, Protocol):
    """A buffer that people can look into."""


def first_of(shown: Iterable[Shown], size: int) -> list[Shown]:
    """As many as have `size` bytes of events, and one at least."""
    found: list[Shown] = []
    for one in shown:
        size -= one[1].size
        if found and size < 0:
            break
        found.append(one)
    return found


def revived(letter: DeadEvent) -> Chunk:
    """A dead event as a chunk of its own, which remembers how it was buried."""
    burial = Burial(letter.at, letter.reason, letter.detail, letter.attempts)
    return Chunk(
        project=letter.project,
        key=letter.key,
        events=1,
        size=len(letter.event),
        crc=crc32(letter.event),
        received_at=letter.received_at,
        boot=letter.boot,
        monotonic=letter.monotonic,
        packed=deflate(letter.event),
        marks=letter.marks | GIVEN,  # it may have been sent again meanwhile by whoever exported it
        burials=(*letter.burials, burial)[-MOST_BURIALS:],
    )


@asynccontextmanager
async def leased(buffer: Buffer, lease: Lease) -> AsyncIterator[Lease]:
    """A lease for a block; leaving the block without `settle` releases it."""
    try:
        yield lease
    finally:
        with trio.move_on_after(PARTING_SECONDS, shield=True):
            await buffer.release(lease)
