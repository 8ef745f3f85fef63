"""The delivery loop against the strict stand-in for PostHog, over real sockets; waits are jumped over."""

import gzip
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, NamedTuple, NoReturn

import pytest
import trio
import trio.lowlevel
import trio.testing
from sources import line
from trio.testing import MockClock

from agent import config
from agent.buffer import Entry
from agent.buffer.memory import MemoryBuffer, open_memory
from agent.clock import Clock
from agent.deliver.client import Client
from agent.deliver.worker import Delivery
from agent.events import Read
from agent.metrics import Metrics
from agent.sink import Afterwards, Event, Fault, Reply, Request, Result, Sink, serving
from agent.vouch import Door, Rules

MEMORY = config.Buffer(path="/memory", kind="memory")
KEY = config.Secret("phc_test")


@pytest.fixture
def mock_clock() -> MockClock:
    """Trio's own clock for tests, running as fast as a real one but able to jump ahead."""
    return MockClock(rate=1.0)


class Outgoing(NamedTuple):
    """A delivery that runs, what it empties, and where it goes."""

    buffer: MemoryBuffer
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


async def at_once(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Until it holds, with no wait jumped over."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.002)


async def jumped(out: Outgoing, seconds: float) -> None:
    """Let so much time pass, in steps in which what is due is done."""
    end = trio.current_time() + seconds
    await out.until(lambda: trio.current_time() >= end)


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


async def test_all_of_a_programs_events_are_bad(mock_clock: MockClock) -> None:
    """Whole batches among others' good ones: those do not wait, and in the end the bad ones are dead."""
    async with delivering(Sink(keep=20_000), mock_clock, max_batch_events=100) as out:
        for number in range(40):
            write = poison if number % 4 == 3 else line
            await out.put([write(n) for n in range(number * 100, number * 100 + 100)])
        await at_once(lambda: out.total("delivered") == 3000 or out.delivery.hold is not None, 30)
        assert out.total("delivered") == 3000
        while out.buffer.stats().events:  # who comes later is company for them
            await out.put([line(0)] * 100)
            await jumped(out, 100)
        assert out.total("dead", "rejected") == 1000


async def test_when_everything_is_refused_from_one_moment_on_nobody_is_buried(mock_clock: MockClock) -> None:
    """What was accepted until then is no witness against what is under way at that moment."""
    asked, slow = 0, trio.Event()

    def turning(_request: Request) -> Reply | trio.Event | None:
        nonlocal asked
        asked += 1
        if asked == 60:
            slow.set()  # and is taken: it was asked before
        return None if asked <= 20 else slow if asked == 21 else Reply(400, b"no")

    async with delivering(Sink(script=turning), mock_clock, max_batch_events=100) as out:
        await out.put([line(number) for number in range(10_000)], each=100)
        await at_once(lambda: out.delivery.hold is not None, 30)
        assert out.delivery.hold is not None
        assert out.delivery.hold.reason == "rejected"
        assert out.buffer.stats().dead_letters == 0
        assert out.total("delivered") == 2100


async def test_without_a_witness_nobody_is_buried(mock_clock: MockClock) -> None:
    """Where PostHog refuses everything the fault may be ours: the project is held and keeps its events."""
    sink = Sink(script=lambda _request: Reply(400, b"no"))
    async with delivering(sink, mock_clock) as out:
        await out.put([line(number) for number in range(100)])
        await out.until(lambda: out.delivery.hold is not None)
        assert out.delivery.hold is not None
        assert out.delivery.hold.reason == "rejected"
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
        await out.until(lambda: out.delivery.hold is not None)
        began = trio.current_time()
        assert out.delivery.hold is not None
        assert out.delivery.hold.reason == reason
        requests = sink.requests
        await out.until(lambda: sink.requests > requests)
        assert trio.current_time() - began >= 40
        assert out.buffer.stats().events == 50
        wrong = False
        await out.emptied()
        assert out.delivery.hold is None
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


# --- the v1 protocol -------------------------------------------------------------------------------


def by_v1(sink: Sink) -> set[bool]:
    """By which protocol events came."""
    return {"posthog-request-id" in event.headers for event in sink.events}


@pytest.mark.parametrize("compression", ["gzip", "none"])
async def test_v1_delivers_event_by_event(mock_clock: MockClock, compression: str) -> None:
    """Everything arrives once, in its own time, with its own library."""
    async with delivering(Sink(), mock_clock, protocol="v1", compression=compression) as out:
        await out.put([line(n, properties={"n": n, "$lib": "mine"}) for n in range(2500)])
        await out.emptied()
        assert numbers(out.sink) == list(range(2500))
        assert by_v1(out.sink) == {True}
        assert {event.api_key for event in out.sink.events} == {"phc_test"}
        assert {event.properties["$lib"] for event in out.sink.events} == {"mine"}
        for event in out.sink.events:
            assert event.given is not None
            given = datetime.fromisoformat(event.given)
            assert abs(event.timestamp - given) < timedelta(seconds=5)
        assert out.total("delivered") == 2500


async def test_v1_buries_what_is_dropped_and_needs_no_witness(mock_clock: MockClock) -> None:
    """Exactly those, with PostHog's word, in one request; also where nothing was taken."""
    sink = Sink(single=lambda event: Result("drop", "event_too_big") if event.properties["n"] % 2 else None)
    async with delivering(sink, mock_clock, protocol="v1") as out:
        await out.put([line(number) for number in range(100)])
        await out.emptied()
        assert numbers(sink) == list(range(0, 100, 2))
        assert (out.total("delivered"), out.total("dead", "dropped"), sink.requests) == (50, 50, 1)
        await out.put([line(101)])
        await out.emptied()
        assert out.total("dead", "dropped") == 51
        letters = await out.buffer.letters(0, 100)
        assert {(letter.reason, letter.detail) for letter in letters} == {("dropped", "event_too_big")}


async def test_v1_sends_again_only_what_was_not_stored(mock_clock: MockClock) -> None:
    """The same request by its id and time, the next attempt, and a fresh timestamp."""
    seen: list[tuple[dict[str, str], dict[str, Any]]] = []

    def note(request: Request) -> None:
        body = request.body if "content-encoding" not in request.headers else gzip.decompress(request.body)
        seen.append((dict(request.headers), json.loads(body)))

    stubborn = {3: 2, 7: 1}

    def single(event: Event) -> Result | None:
        number = event.properties["n"]
        if stubborn.get(number, 0):
            stubborn[number] -= 1
            return Result("retry", "not_persisted")
        return Result("warning", "person_processing_disabled") if number == 5 else None

    async with delivering(Sink(script=note, single=single), mock_clock, protocol="v1") as out:
        await out.put([line(number) for number in range(10)])
        await out.emptied()
        assert numbers(out.sink) == list(range(10))
        assert out.total("delivered") == 10
        assert out.total("warned") == 1
        assert out.total("replayed") == 0
    assert [[event["properties"]["n"] for event in body["batch"]] for _, body in seen] == [
        list(range(10)),
        [3, 7],
        [3],
    ]
    assert [headers["posthog-attempt"] for headers, _ in seen] == ["1", "2", "3"]
    assert len({headers["posthog-request-id"] for headers, _ in seen}) == 1
    assert len({body["created_at"] for _, body in seen}) == 1
    assert len({headers["posthog-request-timestamp"] for headers, _ in seen}) == 3


async def test_an_event_that_is_never_stored_stops_no_other(mock_clock: MockClock) -> None:
    """It goes to the back of the queue after a few tries, and is kept."""
    stubborn = True
    sink = Sink(single=lambda event: Result("retry") if stubborn and event.properties["n"] == 3 else None)
    async with delivering(sink, mock_clock, protocol="v1") as out:
        await out.put([line(number) for number in range(10)])
        await out.until(lambda: out.total("delivered") == 9)
        for number in range(10, 15):
            await out.put([line(number)])
            await out.until(lambda number=number: out.total("delivered") == number)  # type: ignore[misc]
        assert out.buffer.stats().events == 1
        stubborn = False
        await out.emptied()
        assert numbers(sink) == list(range(15))


async def test_v1_keeps_its_request_over_an_outage(mock_clock: MockClock) -> None:
    """A 503 is another attempt of the same request."""
    seen: list[tuple[str, str]] = []

    def busy(request: Request) -> Reply | None:
        seen.append((request.headers["posthog-request-id"], request.headers["posthog-attempt"]))
        return Reply(503) if len(seen) < 3 else None

    async with delivering(Sink(script=busy), mock_clock, protocol="v1", backoff_base=0.1) as out:
        await out.put([line(number) for number in range(10)])
        await out.emptied()
        assert [attempt for _, attempt in seen] == ["1", "2", "3"]
        assert len({ident for ident, _ in seen}) == 1


async def test_clients_uuids_never_meet_in_a_batch(mock_clock: MockClock) -> None:
    """What a client sends twice is delivered twice, and no request is refused for it."""
    sink = Sink()
    twice = [line(n, uuid=f"00000000-0000-4000-8000-{n:012d}") for n in range(20)]
    async with delivering(sink, mock_clock, protocol="v1") as out:
        await out.put(twice + twice[:5])
        await out.put([line(100)])
        await out.put(twice)
        await out.emptied()
        assert sink.statuses == {200: sink.requests}
        assert sink.taken == 46
        assert len({event.uuid for event in sink.events}) == 21
        assert out.total("delivered") == 46


LONG_ID = "é" * 150


@pytest.mark.parametrize("protocol", ["v1", "auto"])
async def test_what_v1_would_drop_for_its_length(mock_clock: MockClock, protocol: str) -> None:
    """`auto` sends it by `/batch`; where only v1 is allowed it is dead, and says why."""
    sink = Sink()
    async with delivering(sink, mock_clock, protocol=protocol) as out:
        await out.put([line(0), line(1, distinct_id=LONG_ID), line(2)])
        await out.put([line(3)])
        await out.emptied()
        if protocol == "auto":
            assert numbers(sink) == [0, 1, 2, 3]
            assert by_v1(sink) == {True, False}
        else:
            assert numbers(sink) == [0, 2, 3]
            (letter,) = await out.buffer.letters(0, 10)
            assert (letter.reason, letter.detail) == (
                "too_long",
                "its distinct_id has 300 bytes, and v1 takes 200",
            )
            assert out.total("dead", "too_long") == 1
        assert sink.statuses == {200: sink.requests}


async def test_auto_uses_v1_where_it_is_served(mock_clock: MockClock) -> None:
    """And says so."""
    async with delivering(Sink(), mock_clock, protocol="auto") as out:
        await out.put([line(number) for number in range(50)])
        await out.emptied()
        assert by_v1(out.sink) == {True}
        assert out.delivery.courier.protocol == "v1"


async def test_auto_falls_back_and_asks_again_later(mock_clock: MockClock) -> None:
    """Where v1 is a 404 the same batch goes by `/batch` at once; v1 is asked for again in an hour."""
    paths: list[str] = []
    served = False

    def older(request: Request) -> Reply | None:
        paths.append(request.path)
        return Reply(404, b"not found") if "/v1/" in request.path and not served else None

    async with delivering(Sink(script=older), mock_clock, protocol="auto") as out:
        for number in range(3):
            await out.put([line(number)])
            await out.emptied()
        assert paths == ["/i/v1/analytics/events", "/batch/", "/batch/", "/batch/"]
        assert out.delivery.hold is None
        assert out.delivery.courier.protocol == "batch"
        served = True
        for _ in range(8000):
            await trio.lowlevel.checkpoint()
            mock_clock.jump(0.5)
        assert len(paths) == 4
        await out.put([line(3)])
        await out.emptied()
        assert paths[4:] == ["/i/v1/analytics/events"]


async def test_v1_alone_is_held_where_it_is_not_served(mock_clock: MockClock) -> None:
    """The operator asked for it: the project waits, and its hold says what would help."""
    async with delivering(Sink(v1=False), mock_clock, protocol="v1") as out:
        await out.put([line(0)])
        await out.until(lambda: out.delivery.hold is not None)
        assert out.delivery.hold is not None
        assert out.delivery.hold.reason == "host"
        assert "auto" in out.delivery.hold.why
        assert out.buffer.stats().events == 1


async def test_a_host_that_serves_neither_is_held(mock_clock: MockClock) -> None:
    """`auto` does not take a wrong host for an older one."""
    async with delivering(Sink(status=404), mock_clock, protocol="auto") as out:
        await out.put([line(0)])
        await out.until(lambda: out.delivery.hold is not None)
        assert out.delivery.hold is not None
        assert out.delivery.hold.reason == "host"


# --- the way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["batch", "v1"])
async def test_a_way_that_lets_only_small_bodies_through(mock_clock: MockClock, protocol: str) -> None:
    """Connections that end over large bodies alone are taken for a 413; the size is learnt."""
    sink = Sink(cut_over=120_000)
    async with delivering(
        sink, mock_clock, protocol=protocol, compression="none", backoff_base=0.05, linger=0.01
    ) as out:
        await out.put([line(n, properties={"n": n, "x": "y" * 300}) for n in range(1000)])
        await out.emptied()
        assert numbers(sink) == list(range(1000))
        cut = sink.statuses[0]
        assert cut >= 3
        await out.put([line(n, properties={"n": n, "x": "y" * 300}) for n in range(1000)], each=100)
        await out.emptied()
        assert sink.taken == 2000
        assert sink.statuses[0] <= cut + 3
        assert out.buffer.stats().dead_letters == 0


async def test_an_outage_of_resets_teaches_no_size(mock_clock: MockClock) -> None:
    """Where small bodies meet the same end it is an outage: afterwards the batches are as large as before."""
    down = True
    sink = Sink(script=lambda _request: Fault.HANG_UP if down else None)
    async with delivering(sink, mock_clock, compression="none", backoff_base=0.05, linger=0.01) as out:
        await out.put([line(n, properties={"n": n, "x": "y" * 300}) for n in range(1000)])
        await out.until(lambda: sink.requests > 30)
        down = False
        await out.emptied()
        for _ in range(6):  # what was suspected is soon tried again
            requests = sink.requests
            await out.put([line(n, properties={"n": n, "x": "y" * 300}) for n in range(1000)])
            await out.emptied()
        assert sink.requests == requests + 1
        assert sink.taken == 7000


async def test_one_failure_among_many_delays_only_its_batch(mock_clock: MockClock) -> None:
    """A server that fails a third of all requests is asked on; what it refuses is sent again, once each."""
    sink = Sink(fail_rate=0.3, random=Random(5), keep=50_000)
    async with delivering(sink, mock_clock, max_batch_events=100) as out:
        await out.put([line(number) for number in range(20_000)], each=100)
        waited = 0
        while out.buffer.stats().events:
            waited += out.delivery.pace.waiting
            await trio.sleep(0.002)
            mock_clock.jump(0.02)
        assert sink.taken == 20_000
        assert sink.requests == 200 + sink.statuses[503]


async def test_a_clock_that_is_set_while_events_wait(mock_clock: MockClock) -> None:
    """A board that boots in 1970: stamped before the network set it, delivered after, found at its time."""
    host = Clock().now()
    wrong = host._replace(wall=60_000_000)
    for protocol in ("batch", "v1"):
        sink = Sink()
        async with delivering(sink, mock_clock, protocol=protocol) as out:
            decoded = DOOR.vouch([Read(line(1), wrong)], 1)
            await out.buffer.put(decoded.chunks, decoded.tally)
            await out.emptied()
            (event,) = sink.events
            assert event.given is not None
            assert event.given.startswith("1970-01-01T00:01:00")
            true = datetime.fromtimestamp(host.wall / 1e6, UTC)
            assert abs(event.timestamp - true) < timedelta(seconds=30)
            assert out.delivery.courier.ahead is not None
            assert abs(out.delivery.courier.ahead) < 60_000_000


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


class Hanging:
    """A way out on which no request ever ends, not even by its timeout."""

    async def post(self, *_: object, **__: object) -> NoReturn:
        await trio.sleep_forever()
        raise AssertionError


async def test_a_request_that_does_not_end_is_a_delivery_that_is_wedged(mock_clock: MockClock) -> None:
    """Not a moment's doubt while it may still end by its timeout, nor while nothing is to be delivered."""
    async with open_memory(MEMORY) as buffer, trio.open_nursery() as nursery:
        project = config.Project(api_key=KEY, delivery=config.Delivery(linger=0.05, timeout=30.0))
        out = Delivery(project, buffer, Hanging(), Metrics(), Clock().now)
        nursery.start_soon(out.run)
        await trio.testing.wait_all_tasks_blocked()
        assert out.wedged(trio.current_time() + 1000) == ""
        decoded = DOOR.vouch([Read(line(), Clock().now())], 0)
        await buffer.put(decoded.chunks, decoded.tally)
        while buffer.stats().unleased.get("default"):
            await trio.sleep(0.002)
        await trio.testing.wait_all_tasks_blocked()
        assert out.wedged(trio.current_time() + 60) == ""
        assert out.wedged(trio.current_time() + 100) == "a request does not end"
        nursery.cancel_scope.cancel()


async def test_a_delivery_that_ends_as_it_should_is_not_wedged(mock_clock: MockClock) -> None:
    """Its workers end once everything is delivered; a request that was answered is over."""
    async with delivering(Sink(), mock_clock) as out:
        await out.put([line(number) for number in range(10)])
        await out.emptied()
        out.delivery.drain()
        await trio.testing.wait_all_tasks_blocked()
        assert out.delivery.wedged(trio.current_time() + 1000) == ""
