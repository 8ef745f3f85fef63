"""What a buffer must hold after each step: where every event is, and the books, as plain as can be.

It does not say which events a full or an old buffer sheds; it looks, and says whether that was allowed.
"""

import random
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from copy import copy
from functools import lru_cache
from operator import le
from typing import Literal, NamedTuple

import msgspec
import trio

from agent.buffer import Books, DeadLetter, Entry, Lease, Limits, Stats
from agent.events import OTHER, Chunk
from agent.pack import crc32, deflate, inflate

Lane = tuple[str, str | None]
LANES: tuple[Lane, ...] = (("one", None), ("one", "a"), ("one", "b"), ("two", None), ("two", "a"))

# An event that the buffer has taken is in one of these, and in no other.
Place = Literal["waiting", "leased", "dead", "delivered", "shed", "forgotten"]

# What `max_age` is in the tests, and the boot of chunks that are older.
MAX_AGE = 3600.0
STALE = "long ago"


@lru_cache(4096)
def event(number: int, pad: int) -> bytes:
    """An event that is known by its number, and that can be told whole by its bytes."""
    return b'{"uuid":"%032x","pad":"%s"}' % (number, random.Random(number).randbytes(pad).hex().encode())


def packed(numbers: Iterable[int], pad: int) -> dict[str, object]:
    """The fields of a chunk that tell its events."""
    some = [event(number, pad) for number in numbers]
    data = b",".join(some)
    return {"events": len(some), "size": len(data), "crc": crc32(data), "packed": deflate(data)}


@lru_cache(4096)
def _opened(content: bytes, size: int, crc: int, pad: int) -> tuple[int, ...]:
    events = msgspec.json.decode(b"[" + inflate(content, size, crc) + b"]", type=list[msgspec.Raw])
    return tuple(number_of(bytes(text), pad) for text in events)


def numbers_in(chunk: Chunk, pad: int) -> tuple[int, ...]:
    """The events of a chunk, each byte as it was put."""
    numbers = _opened(chunk.packed, chunk.size, chunk.crc, pad)
    assert len(numbers) == chunk.events
    return numbers


def number_of(text: bytes, pad: int) -> int:
    """Which event this is."""
    number = int(text[9:41], 16)
    assert text == event(number, pad), "an event is not what was put"
    return number


class Put:
    """One call of `put`; `taken` is what it returned."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.scope = trio.CancelScope()
        self.taken: int | None = None
        self.over = False


class Seen(NamedTuple):
    """What a buffer shows of itself."""

    rows: Mapping[int, Chunk]
    letters: Mapping[int, DeadLetter]
    books: Books
    stats: Stats


class Ledger:
    """`sheds` is the reason for which events may go unasked; `tried` is what was leased since the opening."""

    def __init__(self, sheds: str, *, drops_newest: bool, pad: int) -> None:
        self._sheds = sheds
        self._drops_newest = drops_newest
        self._pad = pad
        self.where: dict[int, Place] = {}
        self.origins: dict[int, Chunk] = {}  # the chunk that each event came in
        self.books: Books = Counter()
        self.rows: Mapping[int, Chunk] = {}  # as last seen
        self.letters: Mapping[int, DeadLetter] = {}
        self.first: dict[int, set[int]] = {}  # the events of each row when it was first seen
        self.last_letter = 0
        self.puts: list[Put] = []  # that have not returned
        self.leases: list[Lease] = []
        self.tried: set[int] = set()
        self.taken: list[Lease] = []  # since it was last seen
        self.refusals: list[tuple[str, Container[str | None]]] = []  # takes that found nothing

    @property
    def expires(self) -> bool:
        """Whether what is too old goes, at the next call at the latest."""
        return self._sheds == "expired"

    def copy(self) -> "Ledger":
        """As it is now, however this one goes on."""
        other = copy(self)
        for name, value in vars(self).items():
            setattr(other, name, copy(value))
        return other

    def numbers(self, chunk: Chunk) -> tuple[int, ...]:
        """The events of a chunk."""
        return numbers_in(chunk, self._pad)

    def at(self, *places: Place) -> set[int]:
        """The events that are there."""
        return {number for number, place in self.where.items() if place in places}

    @property
    def leased_ids(self) -> set[int]:
        """The rows that are on lease."""
        return {ident for lease in self.leases for ident in lease.ids}

    def _move(self, numbers: Iterable[int], old: Place | None, new: Place) -> None:
        for number in numbers:
            assert self.where.get(number) == old, f"event {number} was {self.where.get(number)}, not {old}"
            self.where[number] = new

    def _book(self, joint: str, label: str, reason: str, count: int) -> None:
        self.books[Entry(joint, label, reason)] += count

    # --- what calls that returned have said ----------------------------------------------------------

    def took(self, lease: Lease | None, limits: Limits, project: str, without: Container[str | None]) -> None:
        """A take: nobody else has these, and they are of one lane."""
        if lease is None:
            self.refusals.append((project, without))
            return
        assert lease.project == project
        assert lease.key not in without
        assert {(one.project, one.key) for one in lease.chunks} == {(lease.project, lease.key)}
        sums = map(sum, zip(*((one.events, one.size, len(one.packed)) for one in lease.chunks), strict=True))
        assert len(lease.chunks) == 1 or all(map(le, sums, limits))
        for ident, one in zip(lease.ids, lease.chunks, strict=True):
            assert self.rows[ident] == one
            self._move(self.numbers(one), "waiting", "leased")
        self.leases.append(lease)
        self.taken.append(lease)

    def settled(
        self, lease: Lease, dead: Mapping[int, str], kept: Container[int], damaged: Container[int]
    ) -> None:
        """A settle: all at once, and what is neither dead, kept nor damaged was delivered."""
        label = label_of(lease.project, lease.key)
        for number in [number for one in lease.chunks for number in self.numbers(one)]:
            if number in dead:
                self._move([number], "leased", "dead")
                self._book("dead", label, dead[number], 1)
            elif number in kept:
                self._move([number], "leased", "waiting")
            elif number in damaged:
                self._move([number], "leased", "shed")
                self._book("shed", label, "damaged", 1)
            else:
                self._move([number], "leased", "delivered")
                self._book("delivered", label, "", 1)
        self.leases.remove(lease)

    def released(self, lease: Lease) -> None:
        """A release; of a lease that has ended it does nothing."""
        if lease in self.leases:
            self.leases.remove(lease)
            self._move((number for one in lease.chunks for number in self.numbers(one)), "leased", "waiting")

    def left(self, letters: Iterable[DeadLetter], joint: str, place: Place) -> None:
        """Letters were replayed or purged."""
        for letter in letters:
            self._move([number_of(letter.event, self._pad)], "dead", place)
            self._book(joint, label_of(letter.project, letter.key), "", 1)

    def died(self) -> None:
        """The process is gone: leases and calls with it."""
        for lease in list(self.leases):
            self.released(lease)
        self.puts.clear()
        self.tried.clear()

    # --- what is there -------------------------------------------------------------------------------

    def agree(self, seen: Seen, spared: set[int]) -> None:
        """All that was promised holds; `spared` are the rows that no shedding may have touched."""
        self._end_puts()
        there = [number for chunk in seen.rows.values() for number in self.numbers(chunk)]
        buried = [number_of(letter.event, self._pad) for letter in seen.letters.values()]
        assert len(set(there + buried)) == len(there) + len(buried), "an event is there twice"
        self._see_what_was_shed(seen, set(there), spared)
        self._see_what_was_evicted(seen, set(buried))
        assert set(there) == self.at("waiting", "leased")
        assert set(buried) == self.at("dead")
        self._see_ids(seen)
        self._see_order(seen)
        assert +seen.books == +self.books
        self.rows, self.letters = seen.rows, seen.letters

    def agree_with(self, stats: Stats) -> None:
        """The numbers shown are those of what is there."""
        rows = self.rows
        assert stats.events == sum(one.events for one in rows.values())
        assert stats.bytes == sum(len(one.packed) for one in rows.values())
        assert stats.dead_letters == len(self.letters)
        assert (stats.oldest is None) == (not rows)
        if stats.oldest is not None:
            old = (time.time_ns() // 1000 - stats.oldest) / 1_000_000
            assert (old > MAX_AGE) == (rows[min(rows)].boot == STALE)
        assert stats.waiting == len(self.puts)
        leased = self.leased_ids
        unleased: Counter[str] = Counter()
        for ident, one in rows.items():
            unleased[one.project] += one.events * (ident not in leased)
        assert stats.unleased == +unleased

    def _end_puts(self) -> None:
        """Whole or not at all; the books of one that found no room, or was given up, say so."""
        for put in [put for put in self.puts if put.over]:
            self.puts.remove(put)
            if put.taken is None:
                continue
            numbers = [number for one in put.chunks for number in self.numbers(one)]
            self._book("received", "app", "", len(numbers))
            if put.taken:
                assert put.taken == len(numbers)
                self._move(numbers, None, "waiting")
                self.origins.update((number, one) for one in put.chunks for number in self.numbers(one))
                self._book("accepted", "app", "", len(numbers))
            else:
                self._book("shed", "app", "full_newest" if self._drops_newest else "shutdown", len(numbers))

    def _see_what_was_shed(self, seen: Seen, there: set[int], spared: set[int]) -> None:
        """The oldest that are not on lease, whole chunks, and only where something may be shed at all."""
        gone = self.at("waiting") - there
        if not gone:
            return
        assert self._sheds, f"events {gone} are lost"
        for number in gone:
            origin = self.origins[number]
            assert not self.expires or origin.boot == STALE, "a young event was shed"
            self._book("shed", label_of(origin.project, origin.key), self._sheds, 1)
        shed = {ident for ident, one in self.rows.items() if not gone.isdisjoint(self.numbers(one))}
        assert shed.isdisjoint(spared), "a leased chunk was shed"
        assert shed.isdisjoint(seen.rows), "half a chunk was shed"
        stayed = [ident for ident in self.rows if ident in seen.rows and ident not in spared]
        assert self.expires or not shed or not stayed or max(shed) < min(stayed), "not the oldest was shed"
        self._move(gone, "waiting", "shed")

    def _see_what_was_evicted(self, seen: Seen, buried: set[int]) -> None:
        """The oldest letters, as many as the books say."""
        gone = self.at("dead") - buried
        self._move(gone, "dead", "forgotten")
        evicted = seen.books[EVICTED] - self.books[EVICTED]
        assert evicted == len(gone), "letters are lost"
        self.books[EVICTED] += evicted
        old = [i for i, letter in self.letters.items() if number_of(letter.event, self._pad) in gone]
        assert not old or not seen.letters or max(old) < min(seen.letters), "not the oldest letter went"

    def _see_ids(self, seen: Seen) -> None:
        """Ids rise and are never used again: a row holds what it held at first, or some of it."""
        for ident, one in seen.rows.items():
            numbers = set(self.numbers(one))
            assert ident in self.first or ident > max(self.first, default=0), "a row's id was used again"
            assert numbers <= self.first.setdefault(ident, numbers), "a row holds what it did not"
        for ident in seen.letters:
            assert ident in self.letters or ident > self.last_letter, "a letter's id was used again"
        self.last_letter = max([self.last_letter, *seen.letters])

    def _see_order(self, seen: Seen) -> None:
        """What nobody has tried is leased in the order in which it was put, and nothing is withheld."""
        for lease in self.taken:
            others = {ident for other in self.leases if other is not lease for ident in other.ids}
            fresh = [
                ident
                for ident, one in seen.rows.items()
                if (one.project, one.key) == (lease.project, lease.key) and ident not in self.tried | others
            ]
            mine = [ident for ident in lease.ids if ident not in self.tried]
            assert mine == sorted(fresh)[: len(mine)], "a younger chunk was leased first"
            self.tried |= set(lease.ids)
            first = min(ident for ident in seen.rows if ident not in others)
            assert seen.rows[first].boot != STALE or not self.expires, "what is too old was leased"
        for project, without in self.refusals:
            for ident, one in seen.rows.items():
                withheld = one.project == project and one.key not in without
                assert not withheld or ident in self.leased_ids, "there was something to take"
        self.taken, self.refusals = [], []


EVICTED = Entry("dead_evicted", "", "")


def label_of(project: str, key: str | None) -> str:
    """Under which name events stand in the books."""
    return project if key is None else OTHER
