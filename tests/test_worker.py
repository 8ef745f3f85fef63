"""The delivery loop against the strict stand-in for PostHog, over real sockets; waits are jumped over."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import trio
from sources import line
from trio.testing import MockClock

from agent import config
from agent.buffer import Buffer, Entry
from agent.buffer.memory import open_memory
from agent.clock import Clock
from agent.deliver.client import Client
from agent.deliver.worker import Delivery
from agent.events import Read
from agent.metrics import Metrics
from agent.sink import Afterwards, Fault, Reply, Request, Sink, serving
from agent.vouch import Door, Rules

MEMORY = config.Buffer(path="/memory", kind="memory")
KEY = config.Secret("phc_test")


@pytest.fixture
def mock_clock() -> MockClock:
    """Trio's own clock for tests, running as fast as a real one but able to jump ahead."""
    return MockClock(rate=1.0)


class Outgoing(NamedTuple):
    """A delivery that runs, what it empties, and where it goes."""

    buffer: Buffer
    delivery: Delivery
    sink: Sink
    clock: MockClock

    async def put(self, lines: Sequence[bytes], each: int = 1000) -> None:
        """Put lines into the buffer, in chunks of `each`."""
        for start in range(0, len(lines), each):
            read = Read(b"".join(lines[start : start + each]), Clock().now())
            decoded = DOOR.vouch([read], start)
            await self.buffer.put(decoded.chunks, decoded.tally)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the clock jump over waits until the condition holds."""
        with trio.fail_after(100_000):
            while not condition():
                await trio.sleep(0.002)
                self.clock.jump(0.5)

    async def emptied(self) -> None:
        """Until nothing is buffered."""
        await self.until(lambda: self.buffer.stats().events == 0)

    def total(self, joint: str, reason: str = "") -> int:
        """One total of the books."""
        return self.buffer.books()[Entry(joint, "default", reason)]


DOOR = Door(
    Rules(
        source="app",
        project="default",
        properties={},
        distinct_id="",
        max_event=100_000,
        max_batch_events=1000,
        max_batch_size=5 * 2**20,
    )
)


@asynccontextmanager
async def delivering(sink: Sink, clock: MockClock, **settings: Any) -> AsyncIterator[Outgoing]:
    """A delivery of the default project to a sink, with the given settings, for a block."""
    async with serving(sink) as url, open_memory(MEMORY) as buffer:
        delivery = config.Delivery(**{"linger": 0.05, **settings})
        project = config.Project(host=url, api_key=KEY, delivery=delivery)
        async with Client(delivery) as client, trio.open_nursery() as nursery:
            out = Delivery(project, buffer, client, Metrics(), Clock().now)
            nursery.start_soon(out.run)
            yield Outgoing(buffer, out, sink, clock)
            nursery.cancel_scope.cancel()


def poison(number: int) -> bytes:
    """An event that passes the door, but that PostHog refuses: a number beyond a double, in sealed bytes."""
    return line(number).replace(b'"n":', b'"bad":1e999,"n":')


def numbers(sink: Sink) -> list[int]:
    return sorted(event.properties["n"] for event in sink.events)


@pytest.mark.parametrize("compression", ["gzip", "none"])
async def test_events_arrive_once(mock_clock: MockClock, compression: str) -> None:
    """What was put arrives, each event once, with its uuid, key and time."""
    async with delivering(Sink(), mock_clock, compression=compression) as out:
        await out.put([line(number) for number in range(2500)])
        await out.emptied()
        assert numbers(out.sink) == list(range(2500))
        assert {event.api_key for event in out.sink.events} == {"phc_test"}
        assert len({event.uuid for event in out.sink.events}) == 2500
        assert all(event.sent_at is not None for event in out.sink.events)
        assert out.total("delivered") == 2500


async def test_batches_keep_their_limits(mock_clock: MockClock) -> None:
    """No request carries more events than configured."""
    async with delivering(Sink(), mock_clock, max_batch_events=100) as out:
        await out.put([line(number) for number in range(1000)], each=40)
        await out.emptied()
        seen = [event.request for event in out.sink.events]
        assert max(map(seen.count, set(seen))) <= 100
        assert out.sink.taken == 1000


async def test_a_short_batch_waits_for_company(mock_clock: MockClock) -> None:
    """Chunks that come within the linger leave in one request."""
    async with delivering(Sink(), mock_clock, linger=5.0) as out:
        for number in range(10):
            await out.put([line(number)])
        await out.emptied()
        assert (out.sink.requests, out.sink.taken) == (1, 10)


async def test_a_batch_that_is_too_large_is_halved(mock_clock: MockClock) -> None:
    """413 makes smaller batches; everything arrives, nothing is buried, and the size is remembered."""

    def strict(request: Request) -> Reply | None:
        return Reply(413, b"too large") if len(request.body) > 20_000 else None

    sink = Sink(script=strict)
    async with delivering(sink, mock_clock, compression="none") as out:
        await out.put([line(number) for number in range(1000)])
        await out.emptied()
        assert (sink.taken, out.total("delivered")) == (1000, 1000)
        refused = sink.statuses[413]
        await out.put([line(number) for number in range(1000)], each=100)
        await out.emptied()
        assert sink.taken == 2000
        assert sink.statuses[413] <= refused + 3


async def test_the_culprit_is_buried_and_its_neighbours_arrive(mock_clock: MockClock) -> None:
    """Of a thousand events PostHog refuses three: those are dead with its words, the others delivered."""
    async with delivering(Sink(keep=2000), mock_clock) as out:
        culprits = {5, 500, 999}
        await out.put([poison(n) if n in culprits else line(n) for n in range(1000)])
        await out.emptied()
        assert numbers(out.sink) == [n for n in range(1000) if n not in culprits]
        assert (out.total("delivered"), out.total("dead", "rejected")) == (997, 3)
        assert out.sink.requests <= 1 + 2 * 3 * 10
        assert out.buffer.stats().dead_letters == 3


async def test_without_a_witness_nobody_is_buried(mock_clock: MockClock) -> None:
    """Where PostHog refuses everything the fault may be ours: the project is held and keeps its events."""
    sink = Sink(script=lambda _request: Reply(400, b"no"))
    async with delivering(sink, mock_clock) as out:
        await out.put([line(number) for number in range(100)])
        await out.until(lambda: out.delivery.pace.hold is not None)
        assert out.delivery.pace.hold is not None
        assert out.delivery.pace.hold.reason == "rejected"
        assert out.buffer.stats().events == 100
        assert out.total("dead", "rejected") == 0
        sink._script = None
        await out.emptied()
        assert numbers(sink) == list(range(100))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(401, b"API key is not valid"), "key"),
        (Reply(403, b"forbidden"), "key"),
        (Reply(402, b"pay"), "billing"),
        (Reply(404, b"not here"), "host"),
        (Reply(302, b"", {"location": "https://elsewhere/"}), "host"),
        (Reply(200, b"<!DOCTYPE html><html>log in</html>", {"content-type": "text/html"}), "host"),
        (Reply(400, b"<html>bad gateway</html>", {"content-type": "text/html"}), "host"),
    ],
)
async def test_what_only_a_person_can_mend_holds(mock_clock: MockClock, reply: Reply, reason: str) -> None:
    """The project is held with its reason, asked about once a minute, and loses nothing."""
    wrong = True
    sink = Sink(script=lambda _request: reply if wrong else None)
    async with delivering(sink, mock_clock) as out:
        await out.put([line(number) for number in range(50)])
        await out.until(lambda: out.delivery.pace.hold is not None)
        began = trio.current_time()
        assert out.delivery.pace.hold is not None
        assert out.delivery.pace.hold.reason == reason
        requests = sink.requests
        await out.until(lambda: sink.requests > requests)
        assert trio.current_time() - began >= 40
        assert out.buffer.stats().events == 50
        wrong = False
        await out.emptied()
        assert out.delivery.pace.hold is None
        assert numbers(sink) == list(range(50))


@pytest.mark.parametrize(
    "trouble", [Reply(408), Reply(429), Reply(500), Reply(503), Reply(504), Fault.HANG_UP, Fault.STALL]
)
async def test_what_passes_is_tried_again(mock_clock: MockClock, trouble: Reply | Fault) -> None:
    """The same events are sent again, and each arrives once."""

    def twice(request: Request) -> Reply | Fault | None:
        return trouble if request.number <= 2 else None

    sink = Sink(script=twice)
    async with delivering(sink, mock_clock, timeout=2.0, backoff_base=0.1) as out:
        await out.put([line(number) for number in range(50)])
        await out.emptied()
        assert numbers(sink) == list(range(50))
        assert sink.requests == 3
        assert out.total("delivered") == 50


async def test_retry_after_is_a_floor(mock_clock: MockClock) -> None:
    """PostHog's wish is kept, however short the backoff would be."""
    asked: list[float] = []

    def later(request: Request) -> Reply | None:
        asked.append(trio.current_time())
        return Reply(429, b"", {"retry-after": "30"}) if request.number == 1 else None

    async with delivering(Sink(script=later), mock_clock, backoff_base=0.01) as out:
        await out.put([line(number) for number in range(10)])
        await out.emptied()
        assert asked[1] - asked[0] >= 30


async def test_a_repeated_delivery_has_the_same_uuids(mock_clock: MockClock) -> None:
    """An answer that was lost makes PostHog see the events twice, and know them by their uuids."""

    def lost(request: Request) -> Afterwards | None:
        return Afterwards(Fault.HANG_UP) if request.number == 1 else None

    sink = Sink(script=lost)
    async with delivering(sink, mock_clock, backoff_base=0.1) as out:
        await out.put([line(number) for number in range(20)])
        await out.emptied()
        assert sink.taken == 40
        assert len({event.uuid for event in sink.events}) == 20
        assert len({event.timestamp for event in sink.events}) <= 40
        assert out.total("delivered") == 20


async def test_an_outage_in_the_middle_repeats_nothing(mock_clock: MockClock) -> None:
    """What was accepted before the outage is settled when the work is stopped, the rest stays."""

    def after_first(request: Request) -> Reply | None:
        return Reply(413, b"") if request.number == 1 else Reply(503) if request.number > 2 else None

    sink = Sink(script=after_first)
    async with delivering(sink, mock_clock, compression="none") as out:
        await out.put([line(number) for number in range(100)])
        await out.until(lambda: out.delivery.pace.failures > 0)
        out.delivery.drain()
        await out.until(lambda: out.total("delivered") == 50)
        assert out.buffer.stats().events == 50


async def test_draining_ends_when_all_is_delivered(mock_clock: MockClock) -> None:
    """After `drain` nobody waits for company, and `run` returns."""
    async with serving(Sink()) as url, open_memory(MEMORY) as buffer:
        settings = config.Delivery(linger=3600.0)
        project = config.Project(host=url, api_key=KEY, delivery=settings)
        async with Client(settings) as client, trio.open_nursery() as nursery:
            delivery = Delivery(project, buffer, client, Metrics(), Clock().now)
            nursery.start_soon(delivery.run)
            decoded = DOOR.vouch([Read(line(1), Clock().now())], 0)
            await buffer.put(decoded.chunks, decoded.tally)
            delivery.drain()
            with trio.fail_after(10):
                while nursery.child_tasks:
                    await trio.sleep(0.01)
        assert buffer.stats().events == 0
