"""Where callers ask for what is to be done with a store, and wait; and what of it is done at once."""

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Generic, TypeVar

import msgspec
import structlog
import trio

from agent import crash
from agent.buffer import (
    NOBODY,
    PARTING_SECONDS,
    BufferBroken,
    DeadEvent,
    DeadLetter,
    Lease,
    LettersKept,
    Limits,
    Replayed,
    Shown,
)
from agent.buffer.rows import Deposit, Settlement, Taking
from agent.buffer.store import Store
from agent.events import Chunk, Tally

log = structlog.get_logger("buffer")


class Errand(msgspec.Struct, eq=False):
    """Anything else to be done with the store; `error` says why it was not."""

    work: Callable[[Store], None]
    error: str = ""
    done: bool = False


R = TypeVar("R")
T = TypeVar("T", Deposit, Settlement, Taking, Lease, Errand)


class Asked(Generic[T]):
    """What one caller wants done, and the bell that tells it that it was."""

    def __init__(self, what: T) -> None:
        self.what: T = what
        self.done = trio.Event()
        self.abandoned = False


class Group:
    """What is done at once."""

    def __init__(
        self,
        settlements: list[Asked[Settlement]],
        deposits: list[Asked[Deposit]],
        releases: list[Asked[Lease]],
        takings: list[Asked[Taking]],
        errands: list[Asked[Errand]],
    ) -> None:
        self.settlements = settlements
        self.deposits = deposits
        self.releases = releases
        self.takings = takings
        self.errands = errands
        self.unserved: list[Asked[Taking]] = []  # the file could not be read, or written
        self.full = False  # puts were left out, as nothing has made room since the last try
        self.settled = False
        self.error = ""
        self.damage = ""
        self.seconds = 0.0


def ring(asked: "Iterable[Asked[T]]") -> None:
    """Tell callers that what they asked for is done."""
    for one in asked:
        one.done.set()


class Desk:
    """Takes down what callers ask for; who serves it fetches a group at a time, and rings when it is done."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._settlements: list[Asked[Settlement]] = []
        self._deposits: list[Asked[Deposit]] = []
        self._releases: list[Asked[Lease]] = []
        self._takings: list[Asked[Taking]] = []
        self._errands: list[Asked[Errand]] = []
        self._bell = trio.Event()
        self._full = self._told_full = False  # the deposits that wait found no room

    async def put(self, chunks: Sequence[Chunk], tally: Tally) -> int:
        """See `Buffer.put`."""
        asked = Asked[Deposit](Deposit(chunks, tally))
        self._deposits.append(asked)
        crash.point("put.asked")
        try:
            await self._done(asked)
        except trio.Cancelled:
            asked.abandoned = True
            if asked in self._deposits:
                self._deposits.remove(asked)
                self._full = False  # what waited behind it may be smaller
                self._bell.set()
                raise
            with trio.move_on_after(PARTING_SECONDS, shield=True):  # it is just being written
                await asked.done.wait()
            if asked.what.taken is None:
                raise
        return asked.what.taken or 0

    async def take(
        self, limits: Limits, project: str, without: Container[str | None] = NOBODY
    ) -> Lease | None:
        """See `Buffer.take`."""
        asked = Asked[Taking](Taking(limits, project, without))
        self._takings.append(asked)
        try:
            await self._done(asked)
        except trio.Cancelled:
            asked.abandoned = True
            raise
        return asked.what.lease

    async def settle(
        self,
        lease: Lease,
        dead: Sequence[DeadEvent] = (),
        rest: Sequence[Chunk] = (),
        damaged: int = 0,
        warned: int = 0,
    ) -> None:
        """See `Buffer.settle`. Cancelled, it is done all the same, and waited for a moment."""
        asked = Asked(Settlement(lease, dead, rest, damaged, warned))
        self._settlements.append(asked)
        try:
            await self._done(asked)
        except trio.Cancelled:
            with trio.move_on_after(PARTING_SECONDS, shield=True):
                await asked.done.wait()
            raise

    async def release(self, lease: Lease) -> None:
        """See `Buffer.release`."""
        asked = Asked(lease)
        self._releases.append(asked)
        await self._done(asked)

    async def note_clock(self, boot: str, ahead: int) -> None:
        """See `Buffer.note_clock`."""
        await self._run(lambda store: store.note_clock(boot, ahead))

    async def note_drops(self, source: str, socket: str, total: int) -> None:
        """See `Buffer.note_drops`."""
        await self._run(lambda store: store.note_drops(source, socket, total))

    async def answer(self) -> None:
        """See `Buffer.answer`."""
        await self._run(lambda _store: None)

    async def letters_kept(self) -> LettersKept:
        """See `DeadLetters.letters_kept`."""
        return await self._run(lambda store: LettersKept(store.letters.count, store.letters.newest))

    async def letters(self, after: int, most: int) -> Sequence[DeadLetter]:
        """See `DeadLetters.letters`."""
        return await self._run(lambda store: store.letters.beyond(after, most))

    async def letter(self, ident: int) -> DeadLetter | None:
        """See `DeadLetters.letter`."""
        return next(iter(await self._run(lambda store: store.letters.of_ids([ident]))), None)

    async def replay(self, ids: Sequence[int]) -> Replayed:
        """See `DeadLetters.replay`."""
        return await self._run(lambda store: store.replay(ids))

    async def purge(self, ids: Sequence[int]) -> int:
        """See `DeadLetters.purge`."""
        return await self._run(lambda store: store.purge(ids))

    async def purge_upto(self, newest: int) -> int:
        """See `DeadLetters.purge_upto`."""
        return await self._run(lambda store: store.purge_upto(newest))

    async def newest(self) -> int:
        """See `Contents.newest`."""
        return await self._run(lambda store: store.copies.newest())

    async def beyond(self, after: int, upto: int, size: int) -> Sequence[Shown]:
        """See `Contents.beyond`."""
        return await self._run(lambda store: store.copies.beyond(after, upto, size))

    def _tell_full(self, *, full: bool) -> None:
        """Whether the deposits that wait found no room; one line for each change."""
        self._full = full
        if full and not self._told_full:
            hint = "mend what holds delivery (capture-agent status), or raise buffer.max_size and reload"
            log.warning("the buffer is full; senders wait until events are delivered", hint=hint)
        elif self._told_full and not full:
            log.info("the buffer has room again")
        self._told_full = full

    async def _run(self, work: Callable[[Store], R]) -> R:
        """Have something done with the store. Raises `BufferBroken` where that fails."""
        results: list[R] = []
        asked = Asked(Errand(lambda store: results.append(work(store))))
        self._errands.append(asked)
        await self._done(asked)
        if asked.what.error:
            hint = "make room on the disk, or mend it; nothing was changed"
            raise BufferBroken(f"{self._store.path}: {asked.what.error}", hint)
        return results[0]

    async def _done(self, asked: Asked[T]) -> None:
        self._bell.set()
        await asked.done.wait()

    def _next_group(self) -> Group:
        # What is being settled is not given back, however often that has to be tried: else it would be
        # delivered again meanwhile, and settled twice.
        settled = {id(asked.what.lease) for asked in self._settlements}
        releases = [asked for asked in self._releases if id(asked.what) not in settled]
        ring(asked for asked in self._releases if id(asked.what) in settled)
        group = Group(self._settlements, [], releases, self._takings, self._errands)
        self._settlements, self._releases, self._takings, self._errands = [], [], [], []
        size = 0
        later = []
        group.full = full = self._full and not group.settlements
        for asked in self._deposits:
            if asked.what.chunks and (full or (group.deposits and size > self._store.room.group)):
                later.append(asked)
                continue
            size += asked.what.bytes
            group.deposits.append(asked)
        self._deposits = later
        if later and not full:
            self._bell.set()
        return group
