"""The honest fake: a buffer in memory that keeps the same contract, but not over the process's end.

It uses no thread, so that tests may let time pass by themselves; as `kind = "memory"` it serves hosts whose
disk must not be written.
"""

from collections import Counter
from collections.abc import AsyncIterator, Collection, Container, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import NoReturn

import trio

from agent import config
from agent.buffer import (
    CLOCKS_KEPT,
    NOBODY,
    SOCKETS_KEPT,
    Books,
    BufferBroken,
    DeadEvent,
    DeadLetter,
    Entry,
    Lease,
    LettersKept,
    Limits,
    Replayed,
    Shown,
    Stats,
    first_of,
    fitting,
    revived,
)
from agent.buffer.ages import Ages, stamp
from agent.buffer.dropping import Dropping
from agent.buffer.entries import entries_put, entries_settle, newly_dropped
from agent.buffer.lanes import Lane, Lanes, Queue, Stranger
from agent.buffer.memory_letters import MemoryLetters
from agent.buffer.waiting import Waiting
from agent.events import Chunk, Tally, label_of

# A chunk's objects beside its packed bytes, where each has a key of its own; measured, rounded up.
CHUNK_OVERHEAD = 800
# Dead letters take at most this part of the bound.
DEAD_SHARE = 10


class MemoryBuffer:
    """A `Buffer` of dictionaries."""

    trouble = ""

    def __init__(self, settings: config.Buffer) -> None:
        self._settings = settings
        self._ages = Ages(settings.max_age, self.clocks)
        self._chunks: dict[int, Chunk] = {}
        self._lines: dict[str, dict[str | None, dict[int, Chunk]]] = {}  # the same by project and key
        self._lanes = Lanes()
        self._leases: set[Lease] = set()  # neither settled nor released
        self._last = 0
        self._bytes = 0
        self._dead = MemoryLetters(settings.max_size // DEAD_SHARE)
        self._clocks: dict[str, int] = {}
        self._drops: dict[str, int] = {}
        self._books: Books = Counter()
        self._dropping = Dropping(settings.when_full, self._books)
        self._waiting = Waiting()
        self._room = trio.Event()
        self._queue = trio.StrictFIFOLock()
        self._callers = 0
        self._closing = False

    async def put(self, chunks: Sequence[Chunk], tally: Tally) -> int:
        """See `Buffer.put`."""
        await trio.lowlevel.checkpoint()
        events = sum(chunk.events for chunk in chunks)
        size = sum(map(_cost, chunks))
        if not chunks:
            self._books.update(entries_put(tally, 0, 0))
            return 0
        self._callers += 1
        try:
            async with self._queue:
                return await self._put_in_turn(chunks, tally, events, size)
        finally:
            self._callers -= 1

    async def _put_in_turn(self, chunks: Sequence[Chunk], tally: Tally, events: int, size: int) -> int:
        while not self._make_room(size):
            if self._settings.when_full == "drop_newest":
                self._books.update(entries_put(tally, 0, events))
                self._show()
                return 0
            if self._closing:
                self._books.update(entries_put(tally, 0, 0))
                self._books[Entry("shed", tally.source, "shutdown")] += events
                return 0
            await self._room.wait()
        for chunk in chunks:
            self._insert(chunk)
        self._books.update(entries_put(tally, events, 0))
        self._show()
        return events

    def _insert(self, chunk: Chunk) -> None:
        self._last += 1
        self._chunks[self._last] = chunk
        self._bytes += _cost(chunk)
        self._lines.setdefault(chunk.project, {}).setdefault(chunk.key, {})[self._last] = chunk
        self._lanes.add((chunk.project, chunk.key), 1, self._last, chunk.events)

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes fit, if need be by shedding the oldest chunks that are not on lease."""
        self._expire()
        if self._settings.when_full == "drop_oldest":
            for ident in [ident for ident in self._chunks if ident not in self._lanes.leased]:
                if self._bytes + size <= self._settings.max_size:
                    break
                self._shed(ident, "full_oldest")
        return self._bytes + size <= self._settings.max_size

    def _expire(self) -> None:
        if not self._ages.bounded:
            return
        after = self._ages.after
        stamps = ((ident, stamp(one)) for ident, one in self._chunks.items() if ident > after)
        for ident in self._ages.too_old(stamps, self._lanes.leased):
            self._shed(ident, "expired")

    def _shed(self, ident: int, why: str) -> None:
        chunk = self._remove(ident)
        self._books[Entry("shed", label_of(chunk.project, chunk.key), why)] += chunk.events
        self._lanes.drop((chunk.project, chunk.key), ident, chunk.events)

    def _remove(self, ident: int) -> Chunk:
        chunk = self._chunks.pop(ident)
        self._bytes -= _cost(chunk)
        lines = self._lines[chunk.project]
        del lines[chunk.key][ident]
        if not lines[chunk.key]:
            del lines[chunk.key]
        return chunk

    async def take(
        self, limits: Limits, project: str, without: Container[str | None] = NOBODY
    ) -> Lease | None:
        """See `Buffer.take`."""
        await trio.lowlevel.checkpoint()
        self._expire()
        for lane, queue in self._lanes.turns(project, without):
            ids = fitting(map(self._sized, self._candidates(lane, queue, limits.events)), limits)
            if ids:
                chunks = tuple(self._chunks[ident] for ident in ids)
                self._lanes.lease(lane, ids, sum(chunk.events for chunk in chunks))
                self._show()
                until = self._ages.until(chunks)
                lease = Lease(project=project, key=lane[1], chunks=chunks, ids=tuple(ids), until=until)
                self._leases.add(lease)
                return lease
        return None

    def _candidates(self, lane: Lane, queue: Queue, most: int) -> Sequence[int]:
        """The lane's chunks that may be leased, those that came back first."""
        fresh = (ident for ident in self._lines[lane[0]][lane[1]] if ident > queue.cursor)
        return [*queue.offer(most), *islice(fresh, most)] or queue.offer_all(most)

    def _sized(self, ident: int) -> tuple[int, int, int, int]:
        chunk = self._chunks[ident]
        return ident, chunk.events, chunk.size, len(chunk.packed)

    def _next_stranger(self, project: str, known: Container[str | None]) -> Stranger | None:
        """The next key without a lane; what came back stands at the end."""
        for key, line in self._lines[project].items():
            if key is not None and key not in known:
                events = sum(chunk.events for chunk in line.values())
                return Stranger(key, len(line), next(reversed(line)), events)
        return None

    async def settle(
        self,
        lease: Lease,
        dead: Sequence[DeadEvent] = (),
        rest: Sequence[Chunk] = (),
        damaged: int = 0,
        warned: int = 0,
    ) -> None:
        """See `Buffer.settle`."""
        self._leases.discard(lease)
        for chunk in rest:
            self._insert(chunk)
        for ident in lease.ids:
            self._remove(ident)
        self._lanes.forget((lease.project, lease.key), lease.ids)
        for event in dead:
            if evicted := self._dead.bury(event):
                self._books[Entry("dead_evicted", "", "")] += evicted
        self._books.update(entries_settle(lease, dead, rest, damaged, warned))
        self._show()
        await trio.lowlevel.checkpoint()

    async def letters_kept(self) -> LettersKept:
        """See `DeadLetters.letters_kept`."""
        await trio.lowlevel.checkpoint()
        return LettersKept(len(self._dead.kept), self._dead.newest)

    async def letters(self, after: int, most: int) -> Sequence[DeadLetter]:
        """See `DeadLetters.letters`."""
        await trio.lowlevel.checkpoint()
        return list(islice((letter for ident, letter in self._dead.kept.items() if ident > after), most))

    async def letter(self, ident: int) -> DeadLetter | None:
        """See `DeadLetters.letter`."""
        await trio.lowlevel.checkpoint()
        return self._dead.kept.get(ident)

    async def replay(self, ids: Sequence[int]) -> Replayed:
        """See `DeadLetters.replay`."""
        await trio.lowlevel.checkpoint()
        letters = self._dead.of_ids(ids)
        for number, letter in enumerate(letters):
            chunk = revived(letter)
            if self._bytes + _cost(chunk) > self._settings.max_size:
                return Replayed(number, full=True)
            self._dead.forget(letter.id)
            self._books[Entry("replayed", label_of(letter.project, letter.key), "")] += 1
            self._insert(chunk)
            self._show()
        return Replayed(len(letters), full=False)

    async def purge(self, ids: Sequence[int]) -> int:
        """See `DeadLetters.purge`."""
        await trio.lowlevel.checkpoint()
        letters = self._dead.of_ids(ids)
        for letter in letters:
            self._dead.forget(letter.id)
            self._books[Entry("purged", label_of(letter.project, letter.key), "")] += 1
        return len(letters)

    async def purge_upto(self, newest: int) -> int:
        """See `DeadLetters.purge_upto`."""
        return await self.purge(self._dead.oldest_upto(newest))

    async def newest(self) -> int:
        """See `Contents.newest`."""
        await trio.lowlevel.checkpoint()
        return self._last

    async def beyond(self, after: int, upto: int, size: int) -> Sequence[Shown]:
        """See `Contents.beyond`."""
        await trio.lowlevel.checkpoint()
        return first_of((item for item in self._chunks.items() if after < item[0] <= upto), size)

    def copied(self) -> NoReturn:
        """See `Contents.copied`."""
        raise BufferBroken("the buffer is in memory: there is no file to copy", "capture-agent export")

    async def release(self, lease: Lease) -> None:
        """See `Buffer.release`."""
        if lease in self._leases:
            self._leases.discard(lease)
            events = sum(chunk.events for chunk in lease.chunks)
            self._lanes.give_back((lease.project, lease.key), lease.ids, events)
            lines = self._lines[lease.project]
            lines[lease.key] = lines.pop(lease.key)
            self._show()
        await trio.lowlevel.checkpoint()

    async def ready(
        self, project: str, events: int, linger: float, without: Container[str | None] = NOBODY
    ) -> Collection[str | None]:
        """See `Buffer.ready`."""
        return await self._waiting.ready(project, events, linger, without)

    def _show(self) -> None:
        """What changed becomes visible to those who wait."""
        self._lanes.welcome(self._next_stranger)
        self._dropping.look(self._books, trio.current_time())
        self._waiting.show(self._lanes.changed)
        self._lanes.changed.clear()
        self._room.set()
        self._room = trio.Event()

    async def note_clock(self, boot: str, ahead: int) -> None:
        """See `Buffer.note_clock`."""
        _note(self._clocks, boot, ahead, CLOCKS_KEPT)
        await trio.lowlevel.checkpoint()

    def clocks(self) -> Mapping[str, int]:
        """See `Buffer.clocks`."""
        return self._clocks

    async def note_drops(self, source: str, socket: str, total: int) -> None:
        """See `Buffer.note_drops`."""
        self._books[Entry("dropped", source, "")] += newly_dropped(self._drops.get(socket, 0), total)
        _note(self._drops, socket, total, SOCKETS_KEPT)
        await trio.lowlevel.checkpoint()

    async def answer(self) -> None:
        """See `Buffer.answer`."""
        await trio.lowlevel.checkpoint()

    def stats(self) -> Stats:
        """See `Buffer.stats`; who asks from time to time is told when it drops no more."""
        self._dropping.look(self._books, trio.current_time())
        return Stats(
            events=sum(chunk.events for chunk in self._chunks.values()),
            bytes=sum(len(chunk.packed) for chunk in self._chunks.values()),
            disk_bytes=0,
            limit_bytes=self._settings.max_size,
            oldest=self._ages.came(next(map(stamp, self._chunks.values()), None)),
            dead_letters=len(self._dead.kept),
            free_bytes=max(0, self._settings.max_size - self._bytes),
            waiting=self._callers,
            unleased=self._lanes.waiting,
            dropping=self._dropping.events,
        )

    def books(self) -> Books:
        """See `Buffer.books`."""
        return self._books.copy()

    def close_door(self) -> None:
        """See `Buffer.close_door`."""
        self._closing = True
        self._show()


def _note(notes: dict[str, int], name: str, value: int, most: int) -> None:
    """Remember a value as the newest, and forget the oldest beyond `most`."""
    notes.pop(name, None)
    notes[name] = value
    while len(notes) > most:
        del notes[next(iter(notes))]


def _cost(chunk: Chunk) -> int:
    return len(chunk.packed) + CHUNK_OVERHEAD


@asynccontextmanager
async def open_memory(settings: config.Buffer) -> AsyncIterator[MemoryBuffer]:
    """The buffer for as long as the block lasts."""
    yield MemoryBuffer(settings)
