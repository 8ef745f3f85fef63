"""The events of one shipment: which chunk holds which, and what is known of each.

Chunks are opened only where a part of one is needed; one that cannot be opened is damaged, and out.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import msgspec

from agent import pack
from agent.deliver.clocks import agree
from agent.deliver.verdict import Batch
from agent.events import GIVEN, HISTORICAL, LONG, Chunk

Protocol = Literal["batch", "v1", "auto"]

# What is known of an event.
UNANSWERED, ACCEPTED, SUSPECT, DEAD, LOST = range(5)
LEFT = (UNANSWERED, SUSPECT)
_TO_ACCEPTED = bytes.maketrans(bytes((UNANSWERED,)), bytes((ACCEPTED,)))

# Beside so many odd events it is cheaper to halve first, and to look at the halves.
MOST_ODD = 8


class _Event(msgspec.Struct):
    uuid: str


_read = msgspec.json.Decoder().decode
_read_uuids = msgspec.json.Decoder(list[_Event]).decode
_as_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Span(NamedTuple):
    """The events from `low` to before `high`, counted through the whole shipment."""

    low: int
    high: int


class Cargo:
    """A lease's chunks, looked at as events with numbers."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = tuple(chunks)
        self.damaged: list[Chunk] = []
        self._seams = tuple(accumulate((chunk.events for chunk in chunks), initial=0))
        self._known = bytearray(self._seams[-1])
        self._opened: dict[int, list[bytes]] = {}
        self._odd: dict[int, list[int]] = {}
        self._lost: set[int] = set()

    def plan(self, max_events: int, max_size: int, protocol: Protocol) -> Iterator[Span]:
        """Whole chunks put together up to the limits, as far as they may share a batch."""
        low, size, first = 0, 0, None
        uuids: set[str] | None = None  # since `low`, where clients gave them; None: not looked at yet
        for chunk, (begin, end) in zip(self.chunks, pairwise(self._seams), strict=True):
            if begin == end:
                continue
            more = None
            if first is not None:
                size += 1 + chunk.size
                if end - low <= max_events and size <= max_size and together(first, chunk, protocol):
                    if protocol == "batch" or not chunk.marks & GIVEN:
                        continue
                    uuids, more = _uuids(first) if uuids is None else uuids, _uuids(chunk)
                    if uuids and more and uuids.isdisjoint(more):
                        uuids |= more
                        continue
                yield Span(low, begin)
            low, size, first, uuids = begin, chunk.size, chunk, more
        if first is not None:
            yield Span(low, self._seams[-1])

    # --- what is known -----------------------------------------------------------------------------

    def know(self, number: int, state: int) -> None:
        """What became of one event."""
        self._known[number] = state

    def accept(self, span: Span) -> None:
        """All of the span that had no answer yet was taken."""
        self._known[slice(*span)] = self._known[slice(*span)].translate(_TO_ACCEPTED)

    def is_known(self, number: int, state: int) -> bool:
        """Whether this became of an event."""
        return self._known[number] == state

    def any_is(self, state: int) -> bool:
        """Whether this became of any event."""
        return state in self._known

    def unanswered(self, span: Span) -> Iterator[int]:
        """The numbers of those that have no answer yet."""
        number = self._known.find(UNANSWERED, *span)
        while number >= 0:
            yield number
            number = self._known.find(UNANSWERED, number + 1, span.high)

    @property
    def rest(self) -> list[Chunk]:
        """What is neither accepted, dead nor damaged, in the lease's order; of each chunk at most one.

        Untouched chunks are the lease's own; the others inherit place and times of the chunk they are of.
        """
        rest = []
        for index, (chunk, bounds) in enumerate(zip(self.chunks, pairwise(self._seams), strict=True)):
            known = self._known[slice(*bounds)]
            left = sum(known.count(state) for state in LEFT)
            if left == len(known):
                rest += [chunk] if left else []
            elif left:
                events = zip(self._opened[index], known, strict=True)
                rest.append(repacked(chunk, [event for event, state in events if state in LEFT]))
        return rest

    # --- what it consists of -----------------------------------------------------------------------

    def chunk_of(self, number: int) -> int:
        """The index of the chunk that holds an event."""
        return bisect_right(self._seams, number) - 1

    def span_of(self, index: int) -> Span:
        """The events of one chunk."""
        return Span(self._seams[index], self._seams[index + 1])

    def event(self, number: int) -> bytes:
        """An event of a chunk that is open."""
        index = self.chunk_of(number)
        return self._opened[index][number - self._seams[index]]

    def open(self, index: int) -> bool:
        """Have the chunk's events at hand; False where it is damaged, and then it is out."""
        if index in self._lost:
            return False
        if index not in self._opened:
            events = opened(self.chunks[index])
            if events is None:
                self.lose(index)
                return False
            self._opened[index] = events
        return True

    def lose(self, index: int) -> None:
        """A chunk cannot be opened."""
        span = self.span_of(index)
        self._lost.add(index)
        self.damaged.append(self.chunks[index])
        self._known[slice(*span)] = bytes((LOST,)) * (span.high - span.low)

    def around(self, index: int, span: Span) -> list[Span]:
        """What the span holds beside one whole chunk."""
        parts = Span(span.low, self._seams[index]), Span(self._seams[index + 1], span.high)
        return [part for part in parts if part.low < part.high]

    def parts(self, span: Span) -> list[Span]:
        """The span cut around the few events that PostHog's parser cannot read, those last; else in two.

        The door looks at every event, but into no sealed number: one beyond a double is what still gets
        through. A guess, which spares most of the halvings; it condemns nobody.
        """
        indexes = range(self.chunk_of(span.low), self.chunk_of(span.high - 1) + 1)
        odd = [number for index in indexes for number in self._odd_of(index) if number in range(*span)]
        if not 0 < len(odd) <= MOST_ODD:
            return self.halves(span)
        edges = zip([span.low, *(number + 1 for number in odd)], [*odd, span.high], strict=True)
        return [
            *(Span(low, high) for low, high in edges if low < high),
            *(Span(number, number + 1) for number in odd),
        ]

    def _odd_of(self, index: int) -> list[int]:
        """The events of a chunk that a strict parser refuses; none where the chunk cannot be opened."""
        if index not in self._odd:
            first = self._seams[index]
            events = self._opened[index] if self.open(index) else ()
            self._odd[index] = [first + at for at, event in enumerate(events) if not _readable(event)]
        return self._odd[index]

    def halves(self, span: Span) -> list[Span]:
        """The span in two, between chunks where that is even enough to keep the bound on requests.

        n events are even enough when neither part needs more than ⌈log2 n⌉ - 1 further halvings. Else they
        are cut in the middle, for which the chunk there is opened; if it is damaged, what is around it.
        """
        low, high = span
        most, middle = 1 << ((high - low - 1).bit_length() - 1), (low + high) // 2
        seams = [seam for seam in self._seams if high - most <= seam <= low + most and low < seam < high]
        if seams:
            cut = min(seams, key=lambda seam: abs(seam - middle))
        else:
            cut = middle
            index = self.chunk_of(cut)
            if not self.open(index):
                return self.around(index, span)
        return [Span(low, cut), Span(cut, high)]

    def batch(self, span: Span, number: int) -> Batch | None:
        """What of the span has no answer yet; None where all has."""
        pieces = []
        for index in range(self.chunk_of(span.low), self.chunk_of(span.high - 1) + 1):
            chunk, (low, high) = self.chunks[index], self.span_of(index)
            begin, end = max(span.low, low), min(span.high, high)
            left = self._known[begin:end].count(UNANSWERED)
            if left == high - low:
                pieces += [chunk] if left else []
            elif left:
                events = [self._opened[index][at - low] for at in self.unanswered(Span(begin, end))]
                pieces.append(repacked(chunk, events))
        if not pieces:
            return None
        return Batch(
            project=pieces[0].project,
            key=pieces[0].key,
            pieces=tuple(pieces),
            events=sum(piece.events for piece in pieces),
            size=sum(piece.size for piece in pieces) + len(pieces) - 1,
            number=number,
            long=any(piece.marks & LONG for piece in pieces),
        )


def together(one: Chunk, other: Chunk, protocol: Protocol) -> bool:
    """Whether two chunks may share a batch: their clocks agree, and neither is the other's risk.

    Replayed events go apart from fresh ones, and old ones too, as that is said of a whole request. For v1
    those apart of which clients gave the uuids, as it refuses a batch that has one twice; and what it would
    drop goes together.
    """
    if not agree(one, other) or bool(one.burials) != bool(other.burials):
        return False
    if (one.marks ^ other.marks) & HISTORICAL:
        return False
    return protocol == "batch" or one.marks == other.marks


def _uuids(chunk: Chunk) -> set[str]:
    """Its events' uuids, each of which it has once; else none, and none where it is damaged."""
    try:
        events = _read_uuids(b"[" + pack.inflate(chunk.packed, chunk.size, chunk.crc) + b"]")
    except (ValueError, RecursionError):
        return set()
    found = {event.uuid.lower() for event in events}
    return found if len(found) == chunk.events == len(events) else set()


def _readable(event: bytes) -> bool:
    try:
        _read(event)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def opened(chunk: Chunk) -> list[bytes] | None:
    """The chunk's events, byte for byte; None where it does not hold what it says."""
    try:
        events = _as_list(b"[" + pack.inflate(chunk.packed, chunk.size, chunk.crc) + b"]")
    except (ValueError, msgspec.DecodeError, RecursionError):
        return None
    return [bytes(event) for event in events] if len(events) == chunk.events else None


def repacked(chunk: Chunk, events: Sequence[bytes]) -> Chunk:
    """Some of a chunk's events as a chunk of their own, with its times."""
    data = b",".join(events)
    return msgspec.structs.replace(
        chunk, events=len(events), size=len(data), crc=pack.crc32(data), packed=pack.deflate(data)
    )
