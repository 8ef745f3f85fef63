"""The delivery loop: leases, shipments and verdicts of one project, at its pace."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import NamedTuple, Protocol

import structlog
import trio

from agent.buffer import PARTING_SECONDS, Buffer, Lease, Limits, leased
from agent.config import Project
from agent.deliver import wire
from agent.deliver.client import Reply
from agent.deliver.pace import Pace, Pass
from agent.deliver.shipment import Shipment
from agent.events import Chunk, Instant
from agent.metrics import Metrics

log = structlog.get_logger("deliver")

# While draining at shutdown a longer wait is not sat out: the events are on disk.
DRAIN_PATIENCE = 0.5
# A shipment that found no witness is followed by one of several batches, so that a healthy one may testify.
COMPANY = 4
# How a batch size that PostHog refused is recovered: by this part of itself after each success.
RECOVERY = 1 / 16


class Posting(Protocol):
    """What posts a body; `client.Client` is one."""

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str]
    ) -> Reply | wire.Retry | wire.Refused: ...


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
        self.trouble: Trouble | None = None
        self.statuses: Counter[int] = Counter()
        self._settings = project.delivery
        self._buffer = buffer
        self._client = client
        self._metrics = metrics
        self._now = now
        self._uniform = random.SystemRandom().uniform
        self._url = project.host.rstrip("/") + "/batch/"
        self._headers = wire.headers(
            {name: value.reveal() for name, value in self._settings.headers.items()},
            self._settings.compression,
        )
        self._turn = trio.StrictFIFOLock()
        self._recorded = trio.Event()
        self._idle: trio.CancelScope | None = None
        self._draining = False
        self._largest = self._settings.max_batch_size
        self._unwitnessed = 0
        self._state = ""

    async def run(self) -> None:
        """Deliver until cancelled, or after `drain` until nothing is left that can be delivered now."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._settings.concurrency):
                nursery.start_soon(self._work)

    def drain(self) -> None:
        """Wait for no company any more, and end when there is nothing to deliver."""
        self._draining = True
        self._wake()
        if self._idle is not None:
            self._idle.cancel()

    async def _work(self) -> None:
        while (lease := await self._next_lease()) is not None:
            async with leased(self._buffer, lease):
                shipment = Shipment(lease.chunks, self._most_events(), self._largest)
                try:
                    await self._ship(shipment, lease.until)
                finally:
                    shipment.stop()
                    if shipment.progressed:
                        with trio.move_on_after(PARTING_SECONDS, shield=True):
                            await self._settle(lease, shipment)
            self._learn(shipment)

    async def _next_lease(self) -> Lease | None:
        """The next chunks, once there are some and the pace allows a request; None: the draining is over."""
        async with self._turn:
            while True:
                await self._something_waits()
                if not await self._may_ask():
                    return None
                lease = await self._buffer.take(self._limits(), self.project.name)
                if lease is not None or self._draining:
                    return lease

    async def _something_waits(self) -> None:
        if self._draining:
            return
        with trio.CancelScope() as self._idle:
            await self._buffer.ready(
                self.project.name, self._settings.max_batch_events, self._settings.linger
            )
        self._idle = None

    def _limits(self) -> Limits:
        company = COMPANY if self._unwitnessed else 1
        return Limits(self._settings.max_batch_events * company, self._largest * company)

    def _most_events(self) -> int:
        """Smaller batches each time that no witness was found: where much is poison, only few pass."""
        return max(1, self._settings.max_batch_events >> self._unwitnessed)

    # --- one shipment ------------------------------------------------------------------------------

    async def _ship(self, shipment: Shipment, until: int | None) -> None:
        """Ask until the shipment is over or too old; a retry is asked again when the pace allows."""
        while (batch := shipment.next_batch()) is not None:
            leave = await self._admitted(until)
            if leave is None:
                return
            verdict: wire.Verdict | None = None
            try:
                body = self._body(batch)
                if isinstance(body, wire.Damaged):
                    shipment.receive(body)
                    continue
                verdict = await self._post(body)
                shipment.receive(verdict)
            finally:
                self._record(leave, verdict)
        if shipment.hold == "rejected":
            now = trio.current_time()
            self.pace.begin("rejected", shipment.why, now, self._uniform)
            self._tell()

    def _body(self, batch: wire.Batch) -> bytes | wire.Damaged:
        key = batch.key
        if key is None:
            key = self.project.api_key.reveal() if self.project.api_key else ""
        return wire.body(
            batch,
            key,
            wire.sent_at(batch.pieces[0], self._now()),
            historical_migration=self._settings.historical_migration,
            compression=self._settings.compression,
        )

    async def _post(self, body: bytes) -> wire.Verdict:
        started = trio.current_time()
        reply = await self._client.post(self._url, body, self._headers)
        status = reply.status if isinstance(reply, Reply) else 0
        self.statuses[status] += 1
        self._metrics.requests.labels(self.project.name, str(status)).inc()
        self._metrics.request_seconds.observe(trio.current_time() - started)
        self._metrics.request_body_bytes.observe(len(body))
        if isinstance(reply, Reply):
            return wire.read_reply(reply.status, reply.headers, reply.body_start, self._now().wall)
        return reply

    async def _settle(self, lease: Lease, shipment: Shipment) -> None:
        now = self._now().wall
        rest = shipment.rest
        await self._buffer.settle(
            lease, shipment.dead(now), rest, sum(chunk.events for chunk in shipment.damaged)
        )
        for chunk in _delivered(lease.chunks, (*rest, *shipment.damaged)):
            self._metrics.accept_to_delivered_seconds.observe(max(0, now - chunk.received_at) / 1_000_000)

    def _learn(self, shipment: Shipment) -> None:
        """What one shipment teaches the next."""
        if shipment.hold == "rejected":
            self._unwitnessed = min(self._unwitnessed + 1, self._settings.max_batch_events.bit_length())
        elif shipment.accepted:
            self._unwitnessed = 0
        if (size := shipment.split_size) is not None:
            self._largest = max(1, size // 2)
            log.info("PostHog takes smaller batches only", project=self.project.name, bytes=self._largest)
        elif shipment.accepted and self._largest < self._settings.max_batch_size:
            grown = self._largest + max(1, int(self._largest * RECOVERY))
            self._largest = min(grown, self._settings.max_batch_size)

    # --- the pace ----------------------------------------------------------------------------------

    async def _may_ask(self) -> bool:
        """Wait until a request may go out; False when the draining is over before."""
        while True:
            wait = self.pace.wait(trio.current_time())
            if wait <= 0:
                return True
            if not await self._patient(wait):
                return False

    async def _admitted(self, until: int | None) -> Pass | None:
        """Leave for one request; None when the draining, or the events' time (µs), is over before."""
        while True:
            left = inf if until is None else (until - self._now().wall) / 1_000_000
            if left <= 0:
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

    def _record(self, leave: Pass, verdict: wire.Verdict | None) -> None:
        self.pace.record(leave, verdict, trio.current_time(), self._uniform)
        match verdict:
            case wire.Retry(reason=text) | wire.Refused(why=text) | wire.Rejected(text) | wire.Split(text):
                self.trouble = Trouble(text, self._now().wall)
        self._tell()
        self._wake()

    def _wake(self) -> None:
        self._recorded.set()
        self._recorded = trio.Event()

    def _tell(self) -> None:
        """One line for each change of state."""
        hold = self.pace.hold
        state = hold.reason if hold else "waiting" if self.pace.failures else ""
        if state == self._state:
            return
        self._state = state
        name = self.project.name
        if hold:
            log.error("delivery is held; events wait in the buffer", project=name, reason=state, why=hold.why)
        elif state:
            log.warning("delivery waits to try again", project=name, why=self.trouble and self.trouble.text)
        else:
            log.info("delivery goes on", project=name)


def _delivered(chunks: Sequence[Chunk], others: Sequence[Chunk]) -> list[Chunk]:
    """The chunks of which nothing is left, but what was delivered or buried."""
    kept = {(chunk.received_at, chunk.monotonic) for chunk in others}
    return [chunk for chunk in chunks if (chunk.received_at, chunk.monotonic) not in kept]
