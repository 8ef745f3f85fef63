"""Settles a lease batch by batch: which batch next, which events are dead, what is left.

It promises that every event ends as accepted, dead, damaged or left over, and never as two of these; that
events are condemned only beside a witness; and that k poison events among a batch's n are found in at most
1 + 2·k·⌈log2 n⌉ requests. When to ask, and how, is left to `pace` and `wire`.
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import msgspec

from agent import pack
from agent.buffer import DeadEvent
from agent.deliver.wire import (
    Accepted,
    Batch,
    Damaged,
    Refusal,
    Refused,
    Rejected,
    Retry,
    Split,
    Verdict,
    agree,
)
from agent.events import Chunk

# Without a witness, stop here. The way from 1,000 events down to one is 10 halvings of two requests each, so
# 16 requests have asked about batches of 1 % of the shipment, and not one of them was taken.
UNWITNESSED = 16

# What is known of an event.
UNANSWERED, ACCEPTED, SUSPECT, DEAD, LOST = range(5)
LEFT = (UNANSWERED, SUSPECT)

_as_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Span(NamedTuple):
    """The events from `low` to before `high`, counted through the whole shipment."""

    low: int
    high: int


class Suspect(NamedTuple):
    """How a lone event was refused."""

    reason: Literal["rejected", "too_large"]
    detail: str


class Shipment:
    """All the batches it takes to settle one lease's chunks.

    **The witness rule.** A lone event that is refused is only a suspect: the fault may be ours (key, host, a
    bug). Suspects are condemned when everything has been asked, and only if some event of the same shipment
    was accepted. After a refused half its sibling is asked before going deeper, so that a witness is met
    early. Without one, after 16 refusals or at the end, nothing is condemned and `hold` is `rejected`.

    A refused shipment without a witness (a lone event never has one) has not `progressed`: its lease is
    released to the back of the queue, where newer events do not wait for it. Its witness is company: leased
    together with newer chunks they are separate batches of one shipment, and all of those are asked before
    any is halved, so one healthy batch among them testifies. So after a `rejected` hold the worker should
    lease more than one batch holds, and ask in smaller ones (`max_events`) each time that it happens again:
    where half of all events are poison, only batches of a few are ever taken. With nothing else in the
    queue it waits, asked once in a cooldown, and delays nobody.

    **Replayed events** were condemned beside a witness once, so they need no second one, and their refusals
    say nothing of the others: they are asked about apart.

    **Damaged chunks** are those that cannot be opened. They are taken out, the rest of their batch goes on.
    """

    def __init__(self, chunks: Sequence[Chunk], max_events: int, max_size: int) -> None:
        self.accepted = 0
        self.damaged: list[Chunk] = []
        self.hold: Refusal | Literal["rejected"] | None = None
        self.why = ""
        self._chunks = tuple(chunks)
        self._seams = tuple(accumulate((chunk.events for chunk in chunks), initial=0))
        self._max_events, self._max_size = max_events, max_size
        self._known = bytearray(self._seams[-1])
        self._opened: dict[int, list[bytes]] = {}
        self._suspects: dict[int, Suspect] = {}
        self._asked: tuple[Span, Batch] | None = None
        self._answers: Counter[Span] = Counter()
        self._ahead = deque(self._plan())
        self._refused: list[Span] = []
        self._oversized: dict[Span, int] = {}
        self._rejections = 0
        self._over = False

    def next_batch(self) -> Batch | None:
        """What to send now; the same batch until a verdict other than `Retry` came. None: it is over."""
        if self._over:
            return None
        if self._asked is None:
            self._asked = self._next()
        if self._asked is None:
            self._judge()
            return None
        return self._asked[1]

    def receive(self, verdict: Verdict | Damaged) -> None:
        """What became of the batch last given by `next_batch`."""
        if self._asked is None:
            raise ValueError("a verdict on a batch that was not asked for")
        span, batch = self._asked
        if not isinstance(verdict, Damaged):
            self._answers[span] += 1
        if isinstance(verdict, Retry):
            return
        self._asked = None
        match verdict:
            case Accepted():
                self.accepted += batch.events
                self._mark(span, ACCEPTED)
            case Refused(hold=hold, why=why):
                self.hold, self.why, self._over = hold, why, True
            case Damaged(chunk=chunk):
                index = next(index for index, known in enumerate(self._chunks) if known is chunk)
                self._lose(index)
                self._ahead.extendleft(reversed(self._around(index, span)))
            case Split(reason=reason):
                self._oversized[span] = batch.size
                self._reject(span, Suspect("too_large", reason))
            case Rejected(reason=reason):
                self._reject(span, Suspect("rejected", reason))

    def stop(self) -> None:
        """End in the middle: what has no answer yet is left over, and nobody is condemned."""
        self._over, self._asked = True, None

    @property
    def progressed(self) -> bool:
        """Whether anything has changed that a settlement must record."""
        return self.accepted > 0 or bool(self.damaged) or DEAD in self._known

    @property
    def split_size(self) -> int | None:
        """The smallest batch that was refused as too large, unless one of its events alone was.

        In bytes before compression, to be read when the shipment is over.
        """
        large = [number for number, suspect in self._suspects.items() if suspect.reason == "too_large"]
        sizes = (
            size
            for span, size in self._oversized.items()
            if not any(span.low <= number < span.high for number in large)
        )
        return min(sizes, default=None)

    @property
    def rest(self) -> list[Chunk]:
        """What is neither accepted, dead nor damaged, in the lease's order; of each chunk at most one.

        Untouched chunks are the lease's own; the others inherit place and times of the chunk they are of.
        """
        rest = []
        for index, (chunk, bounds) in enumerate(zip(self._chunks, pairwise(self._seams), strict=True)):
            known = self._known[slice(*bounds)]
            left = sum(known.count(state) for state in LEFT)
            if left == len(known):
                rest += [chunk] if left else []
            elif left:
                events = zip(self._opened[index], known, strict=True)
                rest.append(repacked(chunk, [event for event, state in events if state in LEFT]))
        return rest

    def dead(self, at: int) -> list[DeadEvent]:
        """The condemned events, for burial at that moment (µs); none before `next_batch` returned None."""
        return [self._dead(number, at) for number in sorted(self._suspects) if self._known[number] == DEAD]

    def _dead(self, number: int, at: int) -> DeadEvent:
        index = self._chunk_of(number)
        chunk, suspect = self._chunks[index], self._suspects[number]
        answers = self._answers.items()
        return DeadEvent(
            project=chunk.project,
            key=chunk.key,
            event=self._opened[index][number - self._seams[index]],
            reason=suspect.reason,
            detail=suspect.detail,
            at=at,
            received_at=chunk.received_at,
            boot=chunk.boot,
            monotonic=chunk.monotonic,
            marks=chunk.marks,
            burials=chunk.burials,
            attempts=sum(count for span, count in answers if span.low <= number < span.high),
        )

    def _plan(self) -> Iterator[Span]:
        """Whole chunks put together up to the limits, as long as their clocks agree."""
        low, size, first = 0, 0, None
        for chunk, (begin, end) in zip(self._chunks, pairwise(self._seams), strict=True):
            if begin == end:
                continue
            if first is not None:
                size += 1 + chunk.size
                fits = end - low <= self._max_events and size <= self._max_size
                if fits and agree(first, chunk) and bool(first.burials) == bool(chunk.burials):
                    continue
                yield Span(low, begin)
            low, size, first = begin, chunk.size, chunk
        if first is not None:
            yield Span(low, self._seams[-1])

    def _next(self) -> tuple[Span, Batch] | None:
        """The next to ask about: planned spans and siblings first, then halves of the latest refused."""
        while self._ahead or self._refused:
            if not self._ahead:
                self._ahead.extend(self._halves(self._refused.pop()))
                continue
            span = self._ahead.popleft()
            batch = self._batch(span)
            fits = batch.events <= self._max_events and batch.size <= self._max_size
            if fits or batch.events == 1:
                return span, batch
            self._ahead.extendleft(reversed(self._halves(span)))  # a chunk packed under larger limits
        return None

    def _judge(self) -> None:
        self._over = True
        for number in self._suspects:
            if self.accepted or self._replayed(number):
                self._known[number] = DEAD
            else:
                self.hold = "rejected"

    def _replayed(self, number: int) -> bool:
        return bool(self._chunks[self._chunk_of(number)].burials)

    def _reject(self, span: Span, how: Suspect) -> None:
        self._rejections += not self._replayed(span.low)
        self.why = how.detail
        if span.high - span.low > 1:
            self._refused.append(span)
        elif self._open(self._chunk_of(span.low)):
            self._suspects[span.low] = how
            self._known[span.low] = SUSPECT
        if self._rejections >= UNWITNESSED and not self.accepted:
            self.hold, self._over = "rejected", True

    def _halves(self, span: Span) -> list[Span]:
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
            index = self._chunk_of(cut)
            if not self._open(index):
                return self._around(index, span)
        return [Span(low, cut), Span(cut, high)]

    def _around(self, index: int, span: Span) -> list[Span]:
        """What the span holds beside one whole chunk."""
        parts = Span(span.low, self._seams[index]), Span(self._seams[index + 1], span.high)
        return [part for part in parts if part.low < part.high]

    def _batch(self, span: Span) -> Batch:
        pieces = []
        for index in range(self._chunk_of(span.low), self._chunk_of(span.high - 1) + 1):
            chunk, low, high = self._chunks[index], self._seams[index], self._seams[index + 1]
            if span.low <= low and high <= span.high:
                pieces += [chunk] if chunk.events else []
            else:
                events = self._opened[index][max(span.low - low, 0) : span.high - low]
                pieces.append(repacked(chunk, events))
        return Batch(
            project=pieces[0].project,
            key=pieces[0].key,
            pieces=tuple(pieces),
            events=span.high - span.low,
            size=sum(piece.size for piece in pieces) + len(pieces) - 1,
        )

    def _open(self, index: int) -> bool:
        """Have the chunk's events at hand; False where it is damaged, and then it is out."""
        if index not in self._opened:
            events = opened(self._chunks[index])
            if events is None:
                self._lose(index)
                return False
            self._opened[index] = events
        return True

    def _lose(self, index: int) -> None:
        self.damaged.append(self._chunks[index])
        self._mark(Span(self._seams[index], self._seams[index + 1]), LOST)

    def _mark(self, span: Span, state: int) -> None:
        self._known[slice(*span)] = bytes((state,)) * (span.high - span.low)

    def _chunk_of(self, number: int) -> int:
        return bisect_right(self._seams, number) - 1


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
