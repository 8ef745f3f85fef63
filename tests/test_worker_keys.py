"""The delivery of events with keys of their own: whose key is wrong waits, and nobody else does."""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import pytest
import trio
import trio.testing
from sources import line
from test_worker import DOOR, Outgoing, at_once, delivering, jumped, mock_clock, poison
from trio.testing import MockClock

from agent.clock import Clock
from agent.deliver.keys import MOST_HELD, PROBE_SPACING
from agent.events import Read
from agent.sink import Event, Reply, Request, Result, Sink

__all__ = ["mock_clock"]  # a fixture of this module too

PROTOCOLS = pytest.mark.parametrize("protocol", ["batch", "v1"])
OWN = "phc_test"


def key_of(request: Request) -> str:
    """Whose events it carries."""
    if bearer := request.headers.get("authorization"):
        return bearer.removeprefix("Bearer ")
    body = request.body
    if request.headers.get("content-encoding") == "gzip":
        body = zlib.decompressobj(31).decompress(body)
    return str(json.loads(body)["api_key"])


class Keyed:
    """A sink that answers some keys otherwise, and counts who asked."""

    def __init__(self, answers: dict[str, Reply]) -> None:
        self.answers = answers
        self.asked: Counter[str] = Counter()
        self.sink = Sink(script=self._answer, single=self._judge, keep=100_000)

    def _answer(self, request: Request) -> Reply | None:
        key = key_of(request)
        self.asked[key] += 1
        return self.answers.get(key)

    def _judge(self, event: Event) -> Result | None:
        return Result("drop", "odd") if "bad" in event.properties else None

    def arrived(self) -> Counter[str]:
        """How many events came by each key."""
        return Counter(event.api_key for event in self.sink.events)


async def put(out: Outgoing, key: str | None, lines: Sequence[bytes]) -> None:
    """Put events that carry a key."""
    decoded = DOOR.vouch([Read(b"".join(lines), Clock().now())], 1)
    chunks = [msgspec.structs.replace(chunk, key=key) for chunk in decoded.chunks]
    await out.buffer.put(chunks, decoded.tally)


def numbered(count: int) -> list[bytes]:
    return [line(number) for number in range(count)]


def other(out: Outgoing, joint: str) -> int:
    """One total of events with keys of their own, for whatever reason."""
    return sum(total for entry, total in out.buffer.books().items() if entry[:2] == (joint, "other"))


@PROTOCOLS
@pytest.mark.parametrize(("status", "reason"), [(401, "key"), (403, "key"), (402, "billing")])
async def test_a_wrong_key_waits_alone(
    mock_clock: MockClock, protocol: str, status: int, reason: str
) -> None:
    """All others go on at once; it is asked about once a minute, and arrives whole when it is mended."""
    keyed = Keyed({"phc_wrong": Reply(status, b"API key is not valid")})
    async with delivering(keyed.sink, mock_clock, linger=0.01, protocol=protocol, concurrency=1) as out:
        began = trio.current_time()
        for key in ("phc_wrong", None, "phc_right"):
            await put(out, key, numbered(50))
        for number in range(1, 6):
            await at_once(lambda number=number: keyed.sink.taken == number * 100)  # type: ignore[misc]
            await put(out, None, numbered(50))
            await put(out, "phc_right", numbered(50))
        await at_once(lambda: out.total("delivered") + other(out, "delivered") == 600)
        assert keyed.asked["phc_wrong"] == 1
        assert (out.delivery.hold, out.delivery.pace.failures) == (None, 0)
        ((held, keys, since, _),) = out.delivery.keys.clients()
        assert (held, keys, since - began < 5) == (reason, 1, True)
        assert out.buffer.stats().events == 50
        await jumped(out, 200)
        assert 200 / 75 - 1 <= keyed.asked["phc_wrong"] - 1 <= 200 / 45 + 1
        keyed.answers.clear()
        await out.emptied()
        assert keyed.arrived() == {"phc_wrong": 50, "phc_right": 300, OWN: 300}
        assert out.delivery.keys.clients() == []


@PROTOCOLS
async def test_a_wrong_key_of_the_project_stops_no_other(mock_clock: MockClock, protocol: str) -> None:
    """What clients sent with keys that work is delivered while the configured one is held."""
    keyed = Keyed({OWN: Reply(401, b"API key is not valid")})
    async with delivering(keyed.sink, mock_clock, linger=0.01, protocol=protocol) as out:
        await put(out, None, numbered(50))
        await out.until(lambda: out.delivery.hold is not None)
        for number in range(1, 6):
            await put(out, "phc_right", numbered(10))
            await at_once(lambda number=number: keyed.sink.taken == number * 10)  # type: ignore[misc]
        assert keyed.asked[OWN] <= 8
        assert out.delivery.hold is not None
        assert out.delivery.hold.reason == "key"
        keyed.answers.clear()
        await out.emptied()
        assert out.delivery.hold is None


async def test_one_keys_poison_makes_nobody_elses_batches_smaller(mock_clock: MockClock) -> None:
    """A key of which everything is refused is held as `rejected`, and what is learnt is learnt of it."""
    keyed = Keyed({"phc_odd": Reply(400, b"no")})
    async with delivering(keyed.sink, mock_clock, linger=0.01, concurrency=1) as out:
        await put(out, "phc_odd", numbered(100))
        await out.until(lambda: bool(out.delivery.keys.clients()))
        assert [held.reason for held in out.delivery.keys.clients()] == ["rejected"]
        assert out.delivery.hold is None
        requests = keyed.asked.total()
        await put(out, None, numbered(1000))
        await out.until(lambda: out.total("delivered") == 1000)
        await put(out, "phc_right", numbered(1000))
        await out.until(lambda: other(out, "delivered") == 1000)
        assert keyed.asked.total() == requests + 2
        assert out.buffer.stats().dead_letters == 0
        asked = keyed.asked["phc_odd"]
        await jumped(out, 50)
        assert keyed.asked["phc_odd"] == asked
        keyed.answers.clear()
        await out.emptied()
        assert keyed.arrived()["phc_odd"] == 100


@PROTOCOLS
async def test_what_is_no_key_is_never_sent(mock_clock: MockClock, protocol: str) -> None:
    """Neither a body nor a header can be broken by it, and only its own events wait."""
    keyed = Keyed({})
    odd = ["phc_a\r\nX-Evil: 1", "phc_é", "k" * 65, "phx_personal", "two words"]
    async with delivering(keyed.sink, mock_clock, protocol=protocol) as out:
        for key in odd:
            await put(out, key, numbered(10))
        await put(out, None, numbered(10))
        await out.until(lambda: sum(held.keys for held in out.delivery.keys.clients()) == len(odd))
        await out.until(lambda: keyed.sink.taken == 10)
        assert out.delivery.hold is None
        assert keyed.asked == {OWN: 1}
        assert out.buffer.stats().events == 50


@pytest.mark.parametrize("reply", [Reply(404), Reply(302, b"", {"location": "https://elsewhere/"})])
async def test_a_wrong_host_concerns_all_keys(mock_clock: MockClock, reply: Reply) -> None:
    """It is the same host for each: nobody asks it but the probe."""
    wrong = True
    sink = Sink(script=lambda _request: reply if wrong else None)
    async with delivering(sink, mock_clock) as out:
        await put(out, "phc_one", numbered(10))
        await out.until(lambda: out.delivery.hold is not None)
        assert out.delivery.hold is not None
        assert (out.delivery.hold.reason, out.delivery.keys.clients()) == ("host", [])
        requests = sink.requests
        await put(out, None, numbered(10))
        await put(out, "phc_two", numbered(10))
        await jumped(out, 30)
        assert sink.requests == requests
        wrong = False
        await out.emptied()


async def test_an_outage_concerns_all_keys(mock_clock: MockClock) -> None:
    """What PostHog asks of one key's request it asks of all."""
    keyed = Keyed({"phc_one": Reply(503, b"", {"retry-after": "100"})})
    async with delivering(keyed.sink, mock_clock, linger=0.01) as out:
        await put(out, "phc_one", numbered(10))
        await out.until(lambda: out.delivery.pace.waiting)
        await put(out, None, numbered(10))
        await jumped(out, 90)
        assert keyed.sink.taken == 0
        keyed.answers.clear()
        await out.emptied()


async def test_nobody_turns_while_all_that_waits_is_held(mock_clock: MockClock) -> None:
    """The workers sleep until a probe is due or another key has events, also while the held one gets more."""
    keyed = Keyed({"phc_wrong": Reply(401), OWN: Reply(401)})
    async with delivering(keyed.sink, mock_clock, linger=0.01) as out:
        for key in ("phc_wrong", None):
            await put(out, key, numbered(2000))
        await out.until(lambda: out.delivery.hold is not None and bool(out.delivery.keys.clients()))
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        for _ in range(20):
            await put(out, "phc_wrong", numbered(10))
            await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(steps)
        assert steps.count < 20 * 20
        asked = keyed.asked.total()
        assert asked <= 20
        await put(out, "phc_right", numbered(10))
        await out.until(lambda: keyed.sink.taken == 10)
        assert keyed.asked.total() == asked + 1


class Steps(trio.abc.Instrument):
    """How often any task ran."""

    count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """One more."""
        self.count += 1


async def test_keys_that_somebody_makes_up_cost_a_bound(mock_clock: MockClock) -> None:
    """Very many are refused, a few a second are asked; the own key and one that works do not wait."""
    keyed = Keyed({})
    keyed.answers = Wrong(lambda key: key.startswith("made-up"))
    async with delivering(keyed.sink, mock_clock, linger=0.01) as out:
        await put(out, "phc_right", numbered(10))
        await out.emptied()
        for number in range(MOST_HELD + 100):
            await put(out, f"made-up-{number:04}", numbered(1))
        await out.until(lambda: sum(held.keys for held in out.delivery.keys.clients()) == MOST_HELD)
        began, before = trio.current_time(), keyed.asked.total()
        for number in range(1, 6):
            await put(out, None, numbered(10))
            await put(out, "phc_right", numbered(10))
            await at_once(lambda number=number: keyed.sink.taken == 10 + number * 20)  # type: ignore[misc]
        before += keyed.asked[OWN] + keyed.asked["phc_right"] - 1
        await jumped(out, 150)
        made_up = keyed.asked.total() - before
        passed = trio.current_time() - began
        assert 100 <= made_up <= passed / PROBE_SPACING + 1
        assert len(keyed.asked) > MOST_HELD + 50  # they take turns
        assert sum(held.keys for held in out.delivery.keys.clients()) == MOST_HELD
        assert out.buffer.stats().events == MOST_HELD + 100


async def test_small_batches_of_many_keys_leave_together(mock_clock: MockClock) -> None:
    """Each waits for company once, and none for another's; what comes meanwhile shares a batch."""
    keyed = Keyed({})
    async with delivering(keyed.sink, mock_clock, linger=100.0) as out:
        began = trio.current_time()
        keys = [None, *(f"phc_{number:02}" for number in range(30))]
        for _ in range(3):
            for key in keys:
                await put(out, key, numbered(1))
            await jumped(out, 20)
        assert keyed.sink.taken == 0
        await out.emptied()
        assert 100 <= trio.current_time() - began < 130
        assert keyed.asked == dict.fromkeys((OWN, *keys[1:]), 1)


async def test_wrong_keys_keep_no_new_one_that_works_waiting(mock_clock: MockClock) -> None:
    """Each is asked once and then held; a key that nobody has seen before is asked at once."""
    keyed = Keyed({})
    keyed.answers = Wrong(lambda key: key.startswith("made-up"))
    async with delivering(keyed.sink, mock_clock, linger=0.01) as out:
        for number in range(600):
            await put(out, f"made-up-{number:04}", numbered(1))
        await out.until(lambda: sum(held.keys for held in out.delivery.keys.clients()) == 600)
        for number in range(20):
            await put(out, f"phc_right_{number}", numbered(1))
        await at_once(lambda: keyed.sink.taken == 20)


class Wrong(dict[str, Reply]):
    """A refusal for each key of a kind."""

    def __init__(self, kind: Callable[[str], bool]) -> None:
        super().__init__()
        self._kind = kind

    def get(self, key: str, default: Reply | None = None) -> Reply | None:  # type: ignore[override]
        """The refusal, where it is of the kind."""
        return Reply(401, b"no") if self._kind(key) else default


@PROTOCOLS
async def test_they_stand_as_other_wherever_they_are_counted(mock_clock: MockClock, protocol: str) -> None:
    """Books and requests; a dead event keeps its key, and is sent with it again."""
    keyed = Keyed({"phc_wrong": Reply(401)})
    async with delivering(keyed.sink, mock_clock, linger=0.01, protocol=protocol) as out:
        await put(out, "phc_some", [line(0), poison(1), line(2)])
        await put(out, "phc_wrong", numbered(10))
        await put(out, None, numbered(5))
        await out.until(lambda: out.total("delivered") == 5 and other(out, "delivered") == 2)
        await out.until(lambda: other(out, "dead") == 1)
        (letter,) = await out.buffer.letters(0, 10)
        assert (letter.project, letter.key) == ("default", "phc_some")
        asked = keyed.asked["phc_some"]
        assert (await out.buffer.replay([letter.id])).letters == 1
        await out.until(lambda: other(out, "dead") == 2)
        assert keyed.asked["phc_some"] == asked + 1
        courier = out.delivery.courier
        assert courier.statuses == {200: 1}
        assert courier.other_statuses.total() == keyed.asked.total() - 1
        assert not any("phc" in str(entry) for entry in out.buffer.books())


async def test_no_key_is_told(mock_clock: MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever PostHog repeats of it: neither the log, the last error nor a dead letter holds it."""
    secret = "a-key-of-the-old-kind-0123456789"
    wrong = "another-key-of-the-old-kind-01234"

    def answer(request: Request) -> Reply | None:
        key = key_of(request)
        if key == wrong:
            return Reply(401, f"{key} is not valid".encode())
        return Reply(400, f"{key} sent what I cannot read".encode()) if b"1e999" in body(request) else None

    async with delivering(Sink(script=answer), mock_clock) as out:
        await put(out, secret, [line(0), poison(1)])
        await put(out, wrong, [line(0)])
        await out.until(lambda: other(out, "dead") == 1 and bool(out.delivery.keys.clients()))
        (letter,) = await out.buffer.letters(0, 10)
        assert letter.detail == "*** sent what I cannot read"
        assert out.delivery.trouble is not None
        assert out.delivery.trouble.text == "*** sent what I cannot read"
        assert "old-kind" not in repr(vars(out.delivery))
    told = capsys.readouterr()
    assert "keys of their own are held" in told.out + told.err
    assert "old-kind" not in told.out + told.err


def body(request: Request) -> bytes:
    """What a request carries, as text."""
    return zlib.decompressobj(31).decompress(request.body)


async def test_a_stop_does_not_wait_for_held_keys(mock_clock: MockClock) -> None:
    """What can be delivered is, and the rest is kept."""
    keyed = Keyed({"phc_wrong": Reply(401)})
    async with delivering(keyed.sink, mock_clock, linger=3600.0) as out:
        await put(out, "phc_wrong", numbered(1000))
        await out.until(lambda: bool(out.delivery.keys.clients()))
        await put(out, "phc_right", numbered(10))
        await put(out, None, numbered(10))
        began = trio.current_time()
        out.delivery.drain()
        with trio.fail_after(10):
            while out.total("delivered") + other(out, "delivered") < 20:
                await trio.sleep(0.01)
        assert trio.current_time() - began < 5
        assert out.buffer.stats().events == 1000
