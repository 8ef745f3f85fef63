"""The delivery loop: leases, shipments and verdicts of one project, at its pace."""

import random
from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import NamedTuple

import structlog
import trio

from agent import crash
from agent.advice import AWAY, FOREIGN_KEYS, HOLDS
from agent.buffer import Buffer, Lease, leased
from agent.config import Project
from agent.deliver.courier import Attempt, Courier, Posting
from agent.deliver.keys import Early, Key, Keys
from agent.deliver.pace import Hold, Pace, Pass
from agent.deliver.shipment import Shipment
from agent.deliver.sizes import Sizes
from agent.deliver.verdict import (
    Accepted,
    Batch,
    Damaged,
    Judged,
    Refused,
    Rejected,
    Retry,
    Split,
    Verdict,
    for_pace,
)
from agent.events import Chunk, Instant
from agent.metrics import Metrics

log = structlog.get_logger("deliver")

# While draining at shutdown a longer wait is not sat out: the events are on disk.
DRAIN_PATIENCE = 0.5
# A shipment that found no witness is followed by one of several batches, so that a healthy one may testify.
COMPANY = 4
# A request ends by its timeout, and where v1 is not served a second one follows; a third is for a busy host.
OVERDUE_TIMEOUTS = 3


class Trouble(NamedTuple):
    """The last request that was not taken; `at` is in microseconds."""

    text: str
    at: int


class Delivery:
    """One project's way out: its workers share a pace, and one at a time looks for work."""

    def __init__(
        self,
        project: Project,
        buffer: Buffer,
        client: Posting,
        metrics: Metrics,
        now: Callable[[], Instant],
    ) -> None:
        self.project = project
        self.pace = Pace(project.delivery)
        self.keys = Keys(project.delivery.cooldown)
        self.trouble: Trouble | None = None
        self.courier = Courier(project, client, metrics, now, buffer.clocks)
        self._settings = project.delivery
        self._buffer = buffer
        self._metrics = metrics
        self._now = now
        self._uniform = random.SystemRandom().uniform
        self._turn = trio.StrictFIFOLock()
        self._recorded = trio.Event()
        self._idle: trio.CancelScope | None = None
        self._drained = trio.Event()
        self._draining = self._ending = False
        self._ended = 0
        self._asked: dict[Lease, float] = {}  # since when each request is under way
        self._searching: dict[Lease, tuple[float, Shipment]] = {}  # since when something of it was refused
        self._sizes = Sizes(project)
        self._state = ""
        self._clients_state = ""

    @property
    def hold(self) -> Hold | None:
        """Why the events of the project's own key are held, or all of them."""
        return self.pace.hold or self.keys.own

    @property
    def state(self) -> str:
        """In a word: why it is held, "waiting" to try again, or nothing where events go out."""
        hold = self.hold
        return hold.reason if hold else "waiting" if self.pace.waiting else ""

    def wedged(self, now: float) -> str:
        """Why it makes no progress and never will; empty where it does, or waits for what may still come."""
        if self._ended and not self._draining:
            return "a worker has ended"
        if any(now - since > OVERDUE_TIMEOUTS * self._settings.timeout for since in self._asked.values()):
            return "a request does not end"
        return ""

    async def run(self) -> None:
        """Deliver until cancelled, or after `drain` until nothing is left that can be delivered now."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._settings.concurrency):
                nursery.start_soon(self._work)

    def drain(self, *, begin: bool = True) -> None:
        """Wait for no company any more, and end when there is nothing to deliver, or none is to `begin`."""
        self._draining, self._ending = True, not begin
        self._wake()
        self._drained.set()
        self._look_again()

    async def _work(self) -> None:
        while await self._deliver():
            pass
        self._ended += 1

    async def _deliver(self) -> bool:
        """One lease, of which nothing stays in memory while the next is waited for; False: no more."""
        if (turn := await self._next_lease()) is None:
            return False
        lease, probe = turn
        async with leased(self._buffer, lease):
            shipment = Shipment(
                lease.chunks,
                self._most_events(lease.key),
                self._sizes.largest,
                self._settings.protocol,
                cuts=self._sizes.cuts,
            )
            try:
                await self._ship(shipment, lease, probe=probe)
            finally:
                self._searching.pop(lease, None)
                shipment.stop()
                if shipment.progressed:  # while that cannot be written, nothing more is sent
                    await self._settle(lease, shipment)
        if probe:
            self.keys.done(lease.key)
            self._look_again()
        self._sizes.learn(shipment)
        return True

    async def _next_lease(self) -> tuple[Lease, bool] | None:
        """The next chunks, once there are some and the pace allows a request; None: the draining is over.

        And whether they go out as a probe, as their key is held.
        """
        async with self._turn:
            while True:
                due = await self._something_waits()
                if not await self._may_ask() or self._ending:
                    return None
                now = trio.current_time()
                limits = self._sizes.limits(COMPANY if self.keys.need_company(now) else 1)
                closed = self.keys.closed(now)
                without = closed if due is None else Early(due, closed)
                lease = await self._buffer.take(limits, self.project.name, without)
                if lease is not None:
                    return lease, self.keys.ask(lease.key, now)
                if self._draining:
                    return None

    async def _something_waits(self) -> Collection[Key] | None:
        """Until there is something to lease of keys that are not closed: which; None: of any, in draining."""
        while not self._draining:
            now = trio.current_time()
            with trio.CancelScope(deadline=now + self.keys.next_probe(now)) as self._idle:
                return await self._buffer.ready(
                    self.project.name,
                    self._settings.max_batch_events,
                    self._settings.linger,
                    self.keys.closed(now),
                )
        return None

    def _look_again(self) -> None:
        """Other keys are closed than a while ago, or it is no time to wait."""
        if self._idle is not None:
            self._idle.cancel()

    def _most_events(self, key: Key) -> int:
        """Smaller batches each time that no witness was found: where much is poison, only few pass."""
        return max(1, self._settings.max_batch_events >> self.keys.unwitnessed(key))

    # --- one shipment ------------------------------------------------------------------------------

    async def _ship(self, shipment: Shipment, lease: Lease, *, probe: bool) -> None:
        """Ask until the shipment is over or too old; a retry is asked again when the pace allows."""
        attempt: Attempt | None = None
        while (batch := shipment.next_batch()) is not None:
            leave = await self._admitted(lease, probe=probe)
            if leave is None:
                return
            verdict: Verdict | Damaged | None = None
            wait = 0.0
            self._asked[lease] = asked = trio.current_time()
            try:
                verdict, attempt = await self.courier.carry(batch, attempt)
                shipment.receive(verdict)
            finally:
                del self._asked[lease]
                wait = self._record(leave, batch, verdict, probe=probe)
            if isinstance(verdict, Rejected | Split):
                self._searching.setdefault(lease, (trio.current_time(), shipment))
            elif isinstance(verdict, Accepted):
                self._testify(lease.key, asked)
            if wait and not await self._rested(wait, lease.until):
                return
        now = trio.current_time()
        if shipment.hold == "rejected" and self.keys.miss(lease.key, now):
            self.keys.hold(lease.key, "rejected", shipment.why, now, self._uniform)
            self._tell()

    def _testify(self, key: Key, asked: float) -> None:
        """What was asked then was taken: neither key nor way is why something was refused before that."""
        for lease, (since, shipment) in self._searching.items():
            if lease.key == key and since < asked:
                shipment.testify()

    async def _settle(self, lease: Lease, shipment: Shipment) -> None:
        now = self._now().wall
        rest = shipment.rest
        crash.point("settle.due")
        await self._buffer.settle(
            lease,
            shipment.dead(now),
            rest,
            damaged=sum(chunk.events for chunk in shipment.damaged),
            warned=shipment.warned,
        )
        crash.point("settle.done")
        for chunk in _delivered(lease.chunks, (*rest, *shipment.damaged)):
            self._metrics.accept_to_delivered_seconds.observe(max(0, now - chunk.received_at) / 1_000_000)

    # --- the pace ----------------------------------------------------------------------------------

    async def _may_ask(self) -> bool:
        """Wait until a request may go out; False when the draining is over before."""
        while True:
            wait = self.pace.wait(trio.current_time())
            if wait <= 0:
                return True
            if not await self._patient(wait):
                return False

    async def _admitted(self, lease: Lease, *, probe: bool) -> Pass | None:
        """Leave for one request; None when the key is held, or the draining or the time is over before."""
        while True:
            left = inf if lease.until is None else (lease.until - self._now().monotonic) / 1_000_000
            if left <= 0 or (self.keys.is_held(lease.key) and not probe):
                return None
            leave = self.pace.admit(trio.current_time())
            if isinstance(leave, Pass):
                return leave
            leave = min(leave, left)
            if not await self._patient(leave):
                return None

    async def _patient(self, seconds: float) -> bool:
        """Wait so long or until a verdict is recorded; False where a shutdown does not wait so long."""
        if self._draining and DRAIN_PATIENCE < seconds < float("inf"):
            return False
        with trio.move_on_after(seconds):
            await self._recorded.wait()
        return True

    async def _rested(self, seconds: float, until: int | None) -> bool:
        """Let a batch rest before it is asked about again; False where there is no time for that."""
        left = inf if until is None else (until - self._now().monotonic) / 1_000_000
        if left <= 0 or (self._draining and seconds > DRAIN_PATIENCE):
            return False
        with trio.move_on_after(min(seconds, left)):
            if self._draining:
                await trio.sleep_forever()
            await self._drained.wait()
            return False
        return True

    def _record(self, leave: Pass, batch: Batch, verdict: Verdict | Damaged | None, *, probe: bool) -> float:
        """Tell the pace; gives how long this batch should rest."""
        now = trio.current_time()
        said = for_pace(batch, verdict)
        match said:
            case Refused(hold="key" | "billing" as reason, why=text):
                self.keys.hold(batch.key, reason, text, now, self._uniform)
                if batch.key is None:
                    self.trouble = Trouble(text, self._now().wall)
                said = None  # the way is as it was
            case Retry(reason=text) | Refused(why=text) | Rejected(text) | Split(text):
                self.trouble = Trouble(text, self._now().wall)
        held = self.keys.own
        wait = self.pace.record(leave, said, now, self._uniform)
        if isinstance(said, Accepted) and self.keys.accept(batch.key, now, probe=probe):
            if held and not self.keys.own and held.reason != "rejected":  # that was about events
                self.pace.ease(held.since, now)
            self._look_again()
        if isinstance(verdict, Judged) and verdict.again:
            wait = max(wait, verdict.after or self._settings.backoff_base)
        self._tell()
        self._wake()
        return wait

    def _wake(self) -> None:
        self._recorded.set()
        self._recorded = trio.Event()

    def _tell(self) -> None:
        """One line for each change of state."""
        self._tell_clients()
        hold, state = self.hold, self.state
        if state == self._state:
            return
        self._state = state
        name = self.project.name
        if hold:
            text, hint = "delivery is held; events wait in the buffer", HOLDS[hold.reason]
            log.error(text, project=name, reason=state, why=hold.why, hint=hint)
        elif state:
            why = self.trouble and self.trouble.text
            log.warning("delivery waits to try again", project=name, why=why, hint=AWAY)
        else:
            log.info("delivery goes on", project=name)

    def _tell_clients(self) -> None:
        """The same of keys that clients sent, without any of them: one line for all."""
        state = ", ".join(self.keys.reasons)
        if state == self._clients_state:
            return
        self._clients_state = state
        name = self.project.name
        if state:
            log.warning(
                "events with keys of their own are held and wait",
                project=name,
                reason=state,
                hint=FOREIGN_KEYS,
            )
        else:
            log.info("no events with keys of their own are held any more", project=name)


def _delivered(chunks: Sequence[Chunk], others: Sequence[Chunk]) -> list[Chunk]:
    """The chunks of which nothing is left, but what was delivered or buried."""
    kept = {(chunk.received_at, chunk.monotonic) for chunk in others}
    return [chunk for chunk in chunks if (chunk.received_at, chunk.monotonic) not in kept]
