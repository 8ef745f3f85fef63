"""Settles a lease batch by batch: which batch next, which events are dead, what is left.

It promises that every event ends as accepted, dead, damaged or left over, and never as two of these; that
events are condemned only beside a witness, or by name; and that k poison events among a batch's n are found
in at most 1 + 2·k·⌈log2 n⌉ requests. When to ask, and how, is left to `pace`, `wire` and `v1`.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from agent.buffer import DeadEvent
from agent.deliver.cargo import ACCEPTED, DEAD, SUSPECT, Cargo, Protocol, Span
from agent.deliver.verdict import (
    Accepted,
    Batch,
    Damaged,
    Judged,
    Refusal,
    Refused,
    Rejected,
    Retry,
    Split,
    Verdict,
)
from agent.events import LONG, Chunk

# Without a witness, stop here. The way from 1,000 events down to one is 10 halvings of two requests each; the
# rest asks about a dozen neighbours, one by one. So where a tenth of all events is good, one of them is met.
UNWITNESSED = 40

# Replayed events may all be refused again, with two requests each. After so many of a shipment the rest
# goes to the back of the queue: new events wait 2 s for each of `concurrency` where one takes 50 ms, and
# not for all. The first lone event of 1,000 is found in 20, so that each shipment gets on.
MOST_REPLAYED = 40

# So often is sent again what v1 says was not stored (posthog-python tries 3 times, `posthog/capture_v1.py`);
# what is then left goes to the back of the queue, where it holds up nobody.
RESENDS = 3

# A connection that ends without an answer this often over the same batch may do so because of its size ...
CUTS = 3
# ... unless it is no larger than this, which every way lets through.
CUT_SIZE = 64 * 1024

# v1 drops an event whose name or id is longer, in bytes (`rust/capture/src/v1/analytics/constants.rs`).
LONGEST = 200


class Suspect(NamedTuple):
    """How a lone event was refused."""

    reason: Literal["rejected", "too_large", "dropped", "too_long"]
    detail: str


class _Event(msgspec.Struct):
    """What of a vouched event is looked at here."""

    event: str
    distinct_id: str
    uuid: str


_read_event = msgspec.json.Decoder(_Event).decode


class Shipment:
    """All the batches it takes to settle one lease's chunks.

    **The witness rule.** A lone event that is refused is only a suspect: the fault may be ours (key, host, a
    bug). Suspects are condemned when everything has been asked, and only if some event of the same shipment
    was accepted, or of another one of that key that was asked after a refusal: had key or way become wrong
    meanwhile, what was asked earlier could be accepted all the same. After a refused half its sibling is
    asked before going deeper, so that a witness is met early. Without one, after `UNWITNESSED` refusals or at
    the end, nothing is condemned and `hold` is `rejected`.

    A refused shipment without a witness (a lone event never has one) has not `progressed`: its lease is
    released to the back of the queue, where newer events do not wait for it. Its witness is company: leased
    together with newer chunks they are separate batches of one shipment, and all of those are asked before
    any is halved, so one healthy batch among them testifies. So after a `rejected` hold the worker should
    lease more than one batch holds, and ask in smaller ones (`max_events`) each time that it happens again:
    where half of all events are poison, only batches of a few are ever taken. With nothing else in the
    queue it waits, asked once in a cooldown, and delays nobody.

    **Replayed events** were condemned beside a witness once, so they need no second one, and their refusals
    say nothing of the others: they are asked about apart. Where many are refused again, what is known after
    `MOST_REPLAYED` requests is settled, and the rest makes way for others.

    **By name** v1 judges each event: what it drops is dead, what it could not store is asked about again.

    **Connections that end** without an answer, over the same large batch `cuts` times, are taken for a way
    that lets only smaller ones through: the batch is halved, but no lone event is suspected for it.

    **Damaged chunks** are those that cannot be opened. They are taken out, the rest of their batch goes on.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        max_events: int,
        max_size: int,
        protocol: Protocol = "batch",
        cuts: int = CUTS,
    ) -> None:
        self.accepted = 0
        self.largest_accepted = 0
        self.warned = 0
        self.hold: Refusal | Literal["rejected"] | None = None
        self.why = ""
        self._cargo = Cargo(chunks)
        self._max_events, self._max_size = max_events, max_size
        self._suspects: dict[int, Suspect] = {}
        self._asked: tuple[Span, Batch] | None = None
        self._answers: Counter[Span] = Counter()
        self._ahead = deque(self._cargo.plan(max_events, max_size, protocol))
        self._refused: list[Span] = []
        self._oversized: dict[Span, int] = {}
        self._patience = cuts
        self._cut_sizes: list[int] = []
        self._number = self._cuts = self._resends = 0
        self._rejections = 0
        self._witnessed = False
        self._over = False
        if protocol == "v1":
            self._bury_what_is_too_long()

    def next_batch(self) -> Batch | None:
        """What to send now; the same until an answer other than `Retry` came, and then what it left of it.

        None: it is over.
        """
        if self._over:
            return None
        if self._asked is None:
            self._cuts = self._resends = 0
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
            self._try_smaller(span, batch, verdict)
            return
        self._asked = None
        match verdict:
            case Accepted():
                self.accepted += batch.events
                self.largest_accepted = max(self.largest_accepted, batch.size)
                self._cargo.accept(span)
            case Judged():
                self._hear(span, batch, verdict)
            case Refused(hold=hold, why=why):
                self.hold, self.why, self._over = hold, why, True
            case Damaged(chunk=chunk):
                index = next(index for index, known in enumerate(self._cargo.chunks) if known is chunk)
                self._cargo.lose(index)
                self._ahead.extendleft(reversed(self._cargo.around(index, span)))
            case Split(reason=reason):
                self._oversized[span] = batch.size
                self._reject(span, batch, Suspect("too_large", reason))
            case Rejected(reason=reason):
                self._reject(span, batch, Suspect("rejected", reason))

    def testify(self) -> None:
        """What was sent with the same key since a refusal was accepted: neither key nor way are at fault."""
        self._witnessed = True

    def stop(self) -> None:
        """End in the middle: what has no answer yet is left over, and nobody is condemned."""
        self._over, self._asked = True, None

    @property
    def progressed(self) -> bool:
        """Whether anything has changed that a settlement must record."""
        return self.accepted > 0 or bool(self.damaged) or self._cargo.any_is(DEAD)

    @property
    def damaged(self) -> Sequence[Chunk]:
        """The chunks that could not be opened."""
        return self._cargo.damaged

    @property
    def rest(self) -> list[Chunk]:
        """What is neither accepted, dead nor damaged; see `Cargo.rest`."""
        return self._cargo.rest

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
    def cut_size(self) -> int | None:
        """The smallest batch over which connections ended, though none as large was accepted."""
        sizes = (size for size in self._cut_sizes if size > self.largest_accepted)
        return min(sizes, default=None) if self.accepted else None

    def dead(self, at: int) -> list[DeadEvent]:
        """The condemned events, for burial at that moment (µs); none before `next_batch` returned None."""
        dead = [number for number in sorted(self._suspects) if self._cargo.is_known(number, DEAD)]
        return [self._dead(number, at) for number in dead]

    def _dead(self, number: int, at: int) -> DeadEvent:
        chunk, suspect = self._cargo.chunks[self._cargo.chunk_of(number)], self._suspects[number]
        answers = self._answers.items()
        return DeadEvent(
            project=chunk.project,
            key=chunk.key,
            event=self._cargo.event(number),
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

    def _next(self) -> tuple[Span, Batch] | None:
        """The next to ask about: planned spans and siblings first, then parts of the latest refused."""
        while self._ahead or self._refused:
            if self._number >= MOST_REPLAYED and self._all_replayed and (self.accepted or self._suspects):
                return None
            if not self._ahead:
                self._ahead.extend(self._cargo.parts(self._refused.pop()))
                continue
            span = self._ahead.popleft()
            batch = self._cargo.batch(span, self._number + 1)
            if batch is None:
                continue
            fits = batch.events <= self._max_events and batch.size <= self._max_size
            if fits or batch.events == 1:
                self._number += 1
                return span, batch
            self._ahead.extendleft(reversed(self._cargo.halves(span)))  # packed under larger limits
        return None

    def _judge(self) -> None:
        """Everything has been asked: condemn who is to be."""
        self._over = True
        for number in self._suspects:
            if self.accepted or self._witnessed or self._replayed(number):
                self._cargo.know(number, DEAD)
            elif self._cargo.is_known(number, SUSPECT):
                self.hold = "rejected"

    @property
    def _all_replayed(self) -> bool:
        return all(chunk.burials for chunk in self._cargo.chunks)

    def _replayed(self, number: int) -> bool:
        return bool(self._cargo.chunks[self._cargo.chunk_of(number)].burials)

    def _reject(self, span: Span, batch: Batch, how: Suspect) -> None:
        self._rejections += not self._replayed(span.low)
        self.why = how.detail
        if batch.events > 1:
            self._refused.append(span)
        else:
            (number,) = self._cargo.unanswered(span)
            if self._cargo.open(self._cargo.chunk_of(number)):
                self._suspects[number] = how
                self._cargo.know(number, SUSPECT)
        if self._rejections >= UNWITNESSED and not (self.accepted or self._witnessed):
            self.hold, self._over = "rejected", True

    def _try_smaller(self, span: Span, batch: Batch, verdict: Retry) -> None:
        """Halve a large batch over which connections keep ending; ask about a lone event later again."""
        self._cuts += verdict.cut
        if self._cuts < self._patience or batch.size <= CUT_SIZE:
            return
        self._asked = None
        if batch.events > 1:
            self._cut_sizes.append(batch.size)
            self._refused.append(span)

    def _hear(self, span: Span, batch: Batch, judged: Judged) -> None:
        """Each event as it was judged; what was not stored stays asked for, a few times."""
        self.warned += judged.warned
        self.largest_accepted = max(self.largest_accepted, batch.size)
        if not judged.dead and not judged.again:
            self.accepted += batch.events
            self._cargo.accept(span)
            return
        left = 0
        for index in range(self._cargo.chunk_of(span.low), self._cargo.chunk_of(span.high - 1) + 1):
            self._cargo.open(index)
        for number in list(self._cargo.unanswered(span)):
            uuid = _read_event(self._cargo.event(number)).uuid.lower()
            if uuid in judged.again:
                left += 1
            elif uuid in judged.dead:
                self._condemn(number, Suspect("dropped", judged.dead[uuid]))
            else:
                self._cargo.know(number, ACCEPTED)
                self.accepted += 1
        if left and self._resends < RESENDS:
            self._resends += 1
            again = self._cargo.batch(span, batch.number)
            self._asked = (span, again) if again else None

    def _condemn(self, number: int, how: Suspect) -> None:
        self._suspects[number] = how
        self._cargo.know(number, DEAD)

    def _bury_what_is_too_long(self) -> None:
        """What v1 would drop, where no other protocol may be used."""
        for index, chunk in enumerate(self._cargo.chunks):
            if chunk.marks & LONG and self._cargo.open(index):
                for number in range(*self._cargo.span_of(index)):
                    event = _read_event(self._cargo.event(number))
                    for name, text in (("name", event.event), ("distinct_id", event.distinct_id)):
                        if (size := len(text.encode())) > LONGEST:
                            detail = f"its {name} has {size} bytes, and v1 takes {LONGEST}"
                            self._condemn(number, Suspect("too_long", detail))
