"""One source's way into the buffer: gathers reads into chunks, puts them, and tells what became of each.

While one put commits, the next reads gather; so the chunks grow with the load by themselves. Where nobody
waits for an acknowledgement, a put may wait a moment for company: 1,000 events a second are then 20 commits.
"""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

import trio

from agent import crash
from agent.accept.offered import Offered, Outcome, Part, Refused, all_refused
from agent.accept.rates import Rates
from agent.accept.room import Room
from agent.accept.tap import Tap
from agent.buffer import PARTING_SECONDS, Buffer
from agent.decode.ndjson import count_lines, first_lines
from agent.events import CHUNK_BYTES, CHUNK_EVENTS, UNREMARKABLE, Denied, Instant, Read, Reject, Tally
from agent.texts import RANDOM_BITS
from agent.vouch import Decoded, Door

# Enough to be put at once: a chunk of about 750 events.
ENOUGH_BYTES = 256 * 1024
# What one put takes: more in one go would only hold more memory and the loop for longer.
MOST_BYTES = CHUNK_BYTES
# And in lines, of 1 µs.
MOST_LINES = 4 * CHUNK_EVENTS
# What one put may hold the loop for: it takes less where the last ones were slow, as what is refused takes
# ten times as long, and what a stranger thinks of a hundred times.
PUT_SECONDS = 0.010
# Fast ones between slow ones do not let the next put be a long one.
FORGETTING = 0.95
# Of a put that is smaller most of the time is not for what is in it.
LEAST_SHARE = 1 / 64
# What a line costs beside its bytes, for whose turn it is.
LINE_COST = 256
# What a read takes until it is put, whatever is in it: also one whose lines were all denied.
OFFER_BYTES = 1024
# How long a put waits for company where nothing was promised yet.
COMPANY_SECONDS = 0.05
# The last refusals, for `status`.
RECENT = 20
# Of lines that were refused unread one says it all.
UNREAD = ("forbidden", "rate_limited", "unknown_key")


class Refusal(NamedTuple):
    """One of the last lines that were refused; `at` is in microseconds."""

    at: int
    source: str
    reason: str
    sample: str


class Putter:
    """Takes a source's reads and puts them: a client's in the order in which they were offered.

    Among clients it is first the turn of those who have least on their way, so that one who floods holds up
    nobody but himself.
    """

    def __init__(self, source: str, door: Door, buffer: Buffer, rates: Rates | None = None) -> None:
        self.source = source
        self._door = door
        self._buffer = buffer
        self._rates = rates
        self._even = min(door.rules.max_batch_events, CHUNK_EVENTS)
        self._whole = 0.0  # how long a put of all that one may take would hold the loop, as the last ones did
        self._offers: deque[Offered] = deque()
        self._room = Room()
        self._urgent = False
        self._closing = False
        self._leaving = False
        self._some = trio.Event()
        self._enough = trio.Event()
        self.tap = Tap(source)
        self.recent: deque[Refusal] = deque(maxlen=RECENT)
        self._random = random.SystemRandom()

    async def room(self) -> None:
        """Return when another read may be made; see `Room.wait`."""
        await self._room.wait()

    def reading(self, client: object, user: object) -> AbstractAsyncContextManager[None]:
        """A block for one read by a client of a user's; see `Room.read`."""
        return self._room.read(client, user)

    def admits(self, events: int) -> bool:
        """Whether a request of so many events may come now, all of it; then they are counted as come."""
        return self._rates is None or self._rates.admit_all(None, events, trio.current_time())

    def offer(
        self,
        read: Read,
        client: object = None,
        user: object = None,
        *,
        tell: Callable[[Outcome], None] | None = None,
        urgent: bool = False,
        admitted: bool = False,
    ) -> Offered:
        """Hand a read over; ask for `room` before reading, or be `reading`.

        It is `urgent` where a client waits for the answer, `admitted` where `admits` was asked, or another
        putter has offered it before.
        """
        within = self._within(self._rates, read) if self._rates and not admitted else read
        offered = Offered(within, client, user, tell)
        self._offers.append(offered)
        self._room.hold(client, user, len(within.lines) + OFFER_BYTES, offered.lines)
        self._urgent = self._urgent or urgent
        self._some.set()
        if self._urgent or self._room.held >= ENOUGH_BYTES:
            self._enough.set()
        return offered

    def _within(self, rates: Rates, read: Read) -> Read:
        """The read without the lines that its source or user may not send now, which are denied."""
        uid = read.origin.uid if read.origin is not None else None
        lines = count_lines(read.lines)
        admitted = rates.admit(uid, lines, trio.current_time())
        if admitted == lines:
            return read
        denied = Denied("rate_limited", lines - admitted, "" if uid is None else f"of uid {uid}")
        first = first_lines(read.lines, admitted) if admitted else b""
        return read._replace(lines=first, denied=denied)

    async def note_drops(self, socket: str, total: int) -> None:
        """Have what the kernel dropped entered into the books. Raises `BufferBroken` where that fails."""
        await self._buffer.note_drops(self.source, socket, total)

    def close(self) -> None:
        """Nothing more will be offered: put what is here and end."""
        self._closing = True
        self._some.set()
        self._enough.set()

    def leave(self) -> None:
        """Cancelled from now on, it keeps what it leaves for others to put: see `left` and `withdraw`."""
        self._leaving = True

    def left(self) -> list[Read]:
        """What was offered and not put, in its order."""
        return [offered.read for offered in self._offers]

    def withdraw(self, offered: Offered) -> Read:
        """What of it was not put, and now never will be here."""
        self._offers.remove(offered)
        return offered.read

    async def run(self) -> None:
        """Put what is offered until closed. Cancelled, it books what it leaves, unless told to keep it."""
        try:
            while self._offers or not self._closing:
                if not self._offers:
                    self._some = trio.Event()
                    await self._some.wait()
                    continue
                await self._put(await self._gather())
        finally:
            if self._offers and not self._leaving:
                with trio.move_on_after(PARTING_SECONDS, shield=True):
                    await self._give_up()

    async def _give_up(self) -> None:
        """Enter what was read and there was no time for."""
        reads = [offered.read for offered in self._offers]
        lines = sum(map(_lines_of, reads))
        await self._buffer.put((), Tally(source=self.source, received=lines, given_up=lines))

    async def _gather(self) -> list[Part]:
        """What the next put takes; where more waits than fills a chunk, chunks that are full."""
        if not self._urgent and not self._closing and self._room.held < ENOUGH_BYTES:
            self._enough = trio.Event()
            with trio.move_on_after(COMPANY_SECONDS):
                await self._enough.wait()
        most, largest = self._most()
        self._order()
        gathered: list[Part] = []
        size = lines = 0
        while self._offers and (not gathered or size + len(self._offers[0].read.lines) <= largest):
            offered = self._offers.popleft()
            gathered.append(Part(offered, offered.read, offered.lines, last=True))
            size += len(offered.read.lines)
            lines += offered.lines
            if lines > most:
                break
        if size > largest and lines > 1:  # a single read
            most = min(most, max(1, lines * largest // size))
        if lines > min(most, self._even):
            uneven = lines % self._even if most >= self._even else 0
            self._give_back(gathered, max(uneven, lines - most))
        if not self._offers:
            self._urgent = False
        return gathered

    def _most(self) -> tuple[int, int]:
        """How many lines and bytes a put takes: as many as hold nobody up, going by the last ones."""
        share = min(1.0, PUT_SECONDS / self._whole) if self._whole else 1.0
        most = max(1, int(MOST_LINES * share))
        return (most if most < self._even else most - most % self._even), int(MOST_BYTES * share)

    def _order(self) -> None:
        """Bring those first whose user, and then whose client, has least on the way.

        A client's own keep their order.
        """
        if len(self._offers) < 2 or all(one.client is self._offers[0].client for one in self._offers):
            return
        user: Counter[object] = Counter()
        before: Counter[object] = Counter()
        turns: list[tuple[int, int, Offered]] = []
        for place, offered in enumerate(self._offers):
            cost = len(offered.read.lines) + LINE_COST * offered.lines
            user[offered.user] += cost
            before[offered.client] += cost
            turns.append((before[offered.client], place, offered))
        turns.sort(key=lambda turn: (user[turn[2].user], turn[0], turn[1]))
        self._offers = deque(offered for _, _, offered in turns)

    def _give_back(self, gathered: list[Part], lines: int) -> None:
        """Leave the last lines for the next put: a request costs the same for a chunk that is not full."""
        while lines and lines >= gathered[-1].offered.lines:
            offered = gathered.pop().offered
            self._offers.appendleft(offered)
            lines -= offered.lines
        if lines:
            offered = gathered.pop().offered
            first = offered.lines - lines
            gathered.append(Part(offered, offered.split(first), first, last=False))
            self._offers.appendleft(offered)

    def _take_back(self, gathered: Sequence[Part]) -> None:
        """What was gathered is offered again."""
        for part in reversed(gathered):
            if part.last:
                self._offers.appendleft(part.offered)
            else:  # the rest of it is still the first of the offers
                part.offered.restore(part.read)

    async def _put(self, gathered: Sequence[Part]) -> None:
        """One put, from lines to books."""
        reads = [part.read for part in gathered]
        begun = time.thread_time()
        decoded = self._door.vouch(reads, self._random.getrandbits(RANDOM_BITS))
        took = time.thread_time() - begun
        self._learn(gathered, took)
        if decoded.tally.received:
            events = sum(chunk.events for chunk in decoded.chunks)
            try:
                taken = await self._buffer.put(decoded.chunks, decoded.tally)
            except trio.Cancelled:
                self._take_back(gathered)
                raise
            crash.point("put.returned")
            if taken:
                self.tap.show(decoded.chunks)
            self._remember(decoded.rejects, reads[0].at)
            _tell(gathered, decoded, shed=taken < events)
        else:
            _tell(gathered, decoded, shed=False)
            await trio.sleep(took)  # no commit gives way to others, and blank lines would leave them nothing
        for part in gathered:
            offered, size = part.offered, len(part.read.lines) + OFFER_BYTES * part.last
            self._room.free(offered.client, offered.user, size, part.lines)
        self._room.tell()

    def _learn(self, gathered: Sequence[Part], seconds: float) -> None:
        """From how long a put took, how much the next one may be."""
        lines, size = sum(part.lines for part in gathered), sum(len(part.read.lines) for part in gathered)
        share = max(lines / MOST_LINES, size / MOST_BYTES, LEAST_SHARE)
        self._whole = max(seconds / share, self._whole * FORGETTING)

    def _remember(self, rejects: Sequence[Reject], at: Instant) -> None:
        told = None
        remarkable = [reject for reject in rejects if reject.reason not in UNREMARKABLE]
        for reject in remarkable[-RECENT:]:
            refusal = Refusal(at.wall, self.source, reject.reason, reject.sample)
            if refusal != told or reject.reason not in UNREAD:
                self.recent.append(refusal)
            told = refusal


def _lines_of(read: Read) -> int:
    """How many lines a read has, those that it has only the count of too."""
    denied = read.denied.lines if read.denied is not None else 0
    return count_lines(read.lines) + denied + (read.cut is not None)


def _tell(gathered: Sequence[Part], decoded: Decoded, *, shed: bool) -> None:
    """Give each read its own part of what became of all of them."""
    refused: list[list[Refused]] = [[] for _ in gathered]
    for reject in decoded.rejects:
        refused[reject.read].append(Refused(reject.line, reject.reason, reject.lines))
    for part, lines, known in zip(gathered, decoded.lines, refused, strict=True):
        if part.offered.tell is not None:
            part.offered.tell(Outcome(lines, list(all_refused(known, lines)) if shed else known))
        if part.last:
            part.offered.settled.set()
