"""`agent.deliver.pace`: one step back for one outage, one probe, and never before it was asked to."""

import heapq
import random
from math import inf
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.deliver.pace import OUTAGE, PROBE_SECONDS, Hold, Pace, Pass
from agent.deliver.verdict import Accepted, Refusal, Refused, Rejected, Retry, Split, Verdict


class Settings(NamedTuple):
    """The delivery settings that a pace reads, with their defaults; without the recovery of the rate."""

    backoff_base: float = 1.0
    backoff_max: float = 30.0
    max_attempts: int = 0
    cooldown: float = 60.0
    concurrency: int = 8
    linger: float = 0.0


BUSY = Retry(None, "HTTP 503")


def lowest(low: float, high: float) -> float:
    return low


def highest(low: float, high: float) -> float:
    return high


def admitted(pace: Pace, now: float) -> Pass:
    leave = pace.admit(now)
    assert isinstance(leave, Pass)
    return leave


def admitted_all(pace: Pace, now: float) -> list[Pass]:
    leaves = []
    while isinstance(leave := pace.admit(now), Pass):
        leaves.append(leave)
    return leaves


def held(pace: Pace) -> Hold:
    assert pace.hold is not None
    return pace.hold


def held_for(pace: Pace) -> str:
    return pace.hold.reason if pace.hold is not None else ""


def warm(concurrency: int = 8, **settings: float) -> Pace:
    """A pace that has found out that all it may have at once is welcome."""
    pace = Pace(Settings(concurrency=concurrency, **settings))  # type: ignore[arg-type]
    while pace.concurrency < concurrency:
        for leave in admitted_all(pace, 0.0):
            pace.record(leave, Accepted(), 0.0, lowest)
    return pace


@pytest.mark.parametrize("failures", range(1, 12))
def test_the_nth_wait_is_drawn_between_its_bounds(failures: int) -> None:
    """uniform(base/4, min(backoff_max, base * 2^n))."""
    for uniform, bound in ((lowest, 0.25), (highest, min(30.0, 2.0**failures))):
        pace, now = Pace(Settings()), 0.0
        wait = 0.0
        for _ in range(failures):
            now = max(now, pace.ready_at)
            wait = pace.record(admitted(pace, now), BUSY, now, uniform)
        assert wait == pytest.approx(bound)
        assert pace.hold is None
        if failures >= OUTAGE:
            assert pace.ready_at - now == pytest.approx(bound)


def test_a_wait_stays_finite_for_ever() -> None:
    """A year of failures neither overflows nor waits longer than `backoff_max`."""
    pace, now = Pace(Settings()), 0.0
    for _ in range(5000):
        pace.record(admitted(pace, now), BUSY, now, highest)
        assert pace.ready_at - now <= 30.0
        now = pace.ready_at


@pytest.mark.parametrize("after", [0.5, 3.0, 3600.0])
def test_retry_after_is_a_floor(after: float) -> None:
    """Nobody comes back before it, and those who were told the same second come back apart."""
    early, late = Pace(Settings()), Pace(Settings())
    for pace, uniform in ((early, lowest), (late, highest)):
        pace.record(admitted(pace, 10.0), Retry(after, "HTTP 429"), 10.0, uniform)
    assert 10.0 + after < early.ready_at < late.ready_at <= 10.0 + after + 2.0
    assert early.admit(10.0) == early.wait(10.0) == pytest.approx(early.ready_at - 10.0)


def test_eight_failures_in_one_second_are_one_step() -> None:
    """Workers that meet the same outage do not add up to a long wait, nor open the breaker."""
    pace = warm(max_attempts=3)
    leaves = admitted_all(pace, 0.0)
    assert len(leaves) == 8
    waits = [pace.record(leave, BUSY, 0.1, lowest) for leave in leaves]
    assert (pace.failures, pace.hold, pace.in_flight) == (1, None, 0)
    assert waits == [0.25] * 8


def test_a_lone_failure_stops_only_its_batch() -> None:
    """Among acceptances it halves the window; several without any between are an outage."""
    pace = warm()
    first, second, third, *others = admitted_all(pace, 0.0)
    assert pace.record(first, BUSY, 0.0, highest) == 2.0
    assert (pace.concurrency, pace.waiting, pace.failures) == (4, False, 1)
    assert pace.record(second, Accepted(), 0.1, highest) == 0.0
    assert (pace.concurrency, pace.failures) == (4, 0)
    pace.record(third, BUSY, 0.2, highest)  # an echo: it was sent before the window was halved
    assert (pace.concurrency, pace.waiting) == (4, False)
    for leave in others:
        pace.record(leave, None, 0.3, highest)
    for _ in range(OUTAGE):
        assert not pace.waiting
        pace.record(admitted(pace, 0.3), BUSY, 0.3, highest)
    assert (pace.concurrency, pace.waiting, pace.ready_at) == (1, True, 0.3 + 2**OUTAGE)


def test_after_an_outage_the_rate_recovers_slowly() -> None:
    """First no more requests than in quiet times, then twice as many each time that as long has passed."""
    pace = Pace(Settings(linger=0.5))
    now = 0.0
    while now < 66.0:
        pace.record(admitted(pace, now), BUSY, now, highest)
        now = max(pace.ready_at, now + 1)
    pace.record(admitted(pace, now), Accepted(), now, lowest)
    begun, times = now, []
    while now < begun + 120:
        if isinstance(leave := pace.admit(now), Pass):
            times.append(now - begun)
            pace.record(leave, Accepted(), now, lowest)
        else:
            now += min(leave, 1.0)
            continue
        if len(times) > 5000:
            break
    spread = begun - (OUTAGE - 1) - 30.0  # the first failures were no outage; waits are up to 30 s
    assert 30 < spread < 60
    for second in range(int(spread)):
        assert len([at for at in times if second <= at < second + 1]) <= 3
    assert len([at for at in times if spread <= at < 3 * spread]) < 2 * 4 * 2 * spread


def test_a_short_outage_is_soon_forgotten() -> None:
    """Up to half a minute the waits themselves have spread who comes back."""
    pace = warm(linger=0.5)
    for _ in range(OUTAGE):
        pace.record(admitted(pace, 0.0), BUSY, 0.0, lowest)
    pace.record(admitted(pace, 30.0), Accepted(), 30.0, lowest)
    for _ in range(5):
        pace.record(admitted(pace, 30.0), Accepted(), 30.0, lowest)


def test_a_held_key_comes_back_gently() -> None:
    """What one key's events have to tell after hours of a hold is spread like after an outage."""
    pace = warm(linger=0.5)
    pace.ease(0.0, 3600.0)
    leaves = admitted_all(pace, 3600.0)
    assert (len(leaves), pace.concurrency, pace.hold) == (1, 1, None)
    pace.record(leaves[0], Accepted(), 3600.0, lowest)
    assert pace.admit(3600.0) == pytest.approx(0.5)


def test_an_echo_is_heard_where_it_asks_for_time() -> None:
    """A late reply of the same outage counts no further step, but its `Retry-After` is kept."""
    pace = warm()
    first, second, third, *_ = admitted_all(pace, 0.0)
    pace.record(first, BUSY, 0.0, lowest)
    pace.record(second, Retry(20.0, "HTTP 429"), 0.1, lowest)
    assert (pace.failures, round(pace.ready_at, 6)) == (1, 20.1)
    pace.record(third, Accepted(), 0.2, lowest)
    assert (pace.failures, round(pace.ready_at, 6)) == (1, 20.1)


def test_after_a_wait_one_probe_and_then_all() -> None:
    """While it is not known whether PostHog is back, one request asks and the others wait for it."""
    pace = warm()
    for _ in range(OUTAGE):
        pace.record(admitted(pace, 0.0), BUSY, 0.0, lowest)
    probe = admitted(pace, 1.0)
    assert (probe.probe, pace.concurrency, pace.admit(1.0)) == (True, 1, inf)
    pace.record(probe, Accepted(), 1.1, lowest)
    assert len(admitted_all(pace, 1.1)) == pace.concurrency == 1


def test_stragglers_do_not_hold_up_the_probe() -> None:
    """Requests that still hang from before the failure take no part in it."""
    pace = warm()
    leaves = admitted_all(pace, 0.0)
    pace.record(leaves[0], Retry(0.5, "HTTP 503"), 0.0, lowest)
    probe = admitted(pace, 1.0)
    assert probe.probe
    pace.record(probe, Accepted(), 1.1, lowest)
    pace.record(leaves[1], BUSY, 30.0, lowest)
    assert (pace.failures, pace.in_flight) == (0, 6)


def test_a_probe_given_up_makes_way_for_the_next() -> None:
    """A worker that was cancelled, or whose batch could not be built, blocks nobody."""
    pace = Pace(Settings())
    for _ in range(OUTAGE):
        pace.record(admitted(pace, 0.0), BUSY, 0.0, lowest)
    pace.record(admitted(pace, 1.0), None, 1.0, lowest)
    assert admitted(pace, 1.0).probe
    assert pace.in_flight == 1


def test_concurrency_is_found_from_one() -> None:
    """It starts with one request, grows while it is needed, and stops at the bound."""
    pace = Pace(Settings(concurrency=3))
    assert (pace.wait(0.0), pace.in_flight) == (0.0, 0)
    widths = []
    for _ in range(5):
        leaves = admitted_all(pace, 0.0)
        widths.append(len(leaves))
        for leave in leaves:
            pace.record(leave, Accepted(), 0.0, lowest)
    assert widths == [1, 2, 3, 3, 3]


def test_concurrency_grows_only_where_it_is_wanted() -> None:
    """One worker's successes say nothing about how eight would fare."""
    pace = Pace(Settings())
    for _ in range(50):
        pace.record(admitted(pace, 0.0), Accepted(), 0.0, lowest)
    assert pace.concurrency == 1


def test_concurrency_halves_and_then_grows_slowly() -> None:
    """After 429, 5xx or a timeout half of it is left, and each further round adds one."""
    pace = warm()
    for now in (0.0, 1.0):
        pace.record(admitted(pace, now), BUSY, now, lowest)
    assert pace.concurrency == 2
    pace.record(admitted(pace, 3.0), Accepted(), 3.0, lowest)
    widths = []
    out = admitted_all(pace, 3.0)
    for _ in range(10):
        pace.record(out.pop(), Accepted(), 3.0, lowest)
        out += admitted_all(pace, 3.0)
        widths.append(len(out))
    assert widths == [2, 2, 3, 3, 3, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("reason", ["key", "billing", "host"])
def test_a_refusal_holds_and_is_probed_about_once_a_minute(reason: Refusal) -> None:
    """One worker probes, the others wait; only an acceptance ends it, and then slowly."""
    pace = warm()
    leaves = admitted_all(pace, 0.0)
    for leave in leaves:
        pace.record(leave, Refused(reason, "HTTP 4xx"), 5.0, lowest)
    assert pace.hold == (reason, "HTTP 4xx", 5.0, 5.0 + PROBE_SECONDS[0])
    for probe_at in (50.0, 95.0):
        assert pace.admit(probe_at - 1.0) == pytest.approx(1.0)
        probe = admitted(pace, probe_at)
        assert pace.admit(probe_at) == inf
        pace.record(probe, Refused(reason, "HTTP 4xx"), probe_at, lowest)
    assert held(pace).since == 5.0
    pace.record(admitted(pace, 200.0), Accepted(), 200.0, lowest)
    assert (held_for(pace), pace.failures) == ("", 0)
    assert len(admitted_all(pace, 200.0)) == 1


def test_an_echo_moves_the_probe_of_a_hold() -> None:
    """Where a late reply asks for more time than the hold does, status shows the later probe."""
    pace = warm()
    first, second, *_ = admitted_all(pace, 0.0)
    pace.record(first, Refused("key", "HTTP 401"), 0.0, lowest)
    pace.record(second, Retry(600.0, "HTTP 503"), 1.0, lowest)
    assert held(pace).probe_at == pace.ready_at == 601.0


def test_a_refusal_is_heard_though_it_is_an_echo() -> None:
    """A 401 that comes behind a 503 of the same round is still a 401."""
    pace = warm()
    first, second, *_ = admitted_all(pace, 0.0)
    pace.record(first, BUSY, 0.0, lowest)
    pace.record(second, Refused("key", "HTTP 401"), 0.1, lowest)
    assert held_for(pace) == "key"


@pytest.mark.parametrize("verdict", [Rejected("bad"), Split("large")])
def test_halving_goes_on_during_a_probe(verdict: Verdict) -> None:
    """An answer about the batch says nothing about the hold: the next batch may ask at once."""
    pace = Pace(Settings())
    pace.record(admitted(pace, 0.0), Refused("key", "HTTP 401"), 0.0, lowest)
    pace.record(admitted(pace, 60.0), verdict, 60.0, lowest)
    assert pace.hold is not None
    assert admitted(pace, 60.0).probe


def test_an_outage_during_a_hold_leaves_the_hold() -> None:
    """A probe without an answer learns nothing about the key."""
    pace = Pace(Settings())
    pace.record(admitted(pace, 0.0), Refused("key", "HTTP 401"), 0.0, lowest)
    pace.record(admitted(pace, 60.0), Retry(100.0, "HTTP 503"), 60.0, lowest)
    assert (held(pace).reason, held(pace).since) == ("key", 0.0)
    assert 160.0 < pace.ready_at <= 162.0


def test_the_breaker_opens_after_max_attempts() -> None:
    """Silence for at least `cooldown`, then one probe; it stays open until one is accepted."""
    pace = Pace(Settings(max_attempts=3, cooldown=20.0))
    for now in (0.0, 1.0, 2.0):
        assert pace.hold is None
        pace.record(admitted(pace, now), BUSY, now, lowest)
    assert pace.hold == ("breaker", "HTTP 503", 2.0, 22.0)
    assert pace.admit(21.0) == pytest.approx(1.0)
    pace.record(admitted(pace, 22.0), BUSY, 22.0, highest)
    assert pace.hold == ("breaker", "HTTP 503", 2.0, 47.0)
    pace.record(admitted(pace, 47.0), Accepted(), 47.0, lowest)
    assert pace.hold is None
    assert len(admitted_all(pace, 47.0)) == 1


def test_without_max_attempts_the_breaker_never_opens() -> None:
    """0 means for ever: a wait between two tries is not a hold."""
    pace, now = Pace(Settings(max_attempts=0)), 0.0
    for _ in range(200):
        pace.record(admitted(pace, now), BUSY, now, highest)
        now = pace.ready_at
        assert pace.hold is None


moves = st.lists(
    st.tuples(
        st.sampled_from([Accepted(), BUSY, Retry(5.0, "x"), Rejected("x"), Refused("key", "x"), None]),
        st.integers(0, 7),
        st.floats(0, 40),
    ),
    max_size=60,
)


@given(moves, st.integers(1, 8), st.integers(0, 3), st.integers(0, 2**32))
def test_the_bounds_hold_whatever_happens(
    moves: list[tuple[Verdict | None, int, float]], concurrency: int, attempts: int, seed: int
) -> None:
    """Never more at once than allowed, never two probes of a round, never before a floor, never stuck."""
    rng = random.Random(seed)
    pace = Pace(Settings(concurrency=concurrency, max_attempts=attempts))
    out: list[Pass] = []
    now = floor = 0.0
    for verdict, which, passing in moves:
        now += passing
        for leave in admitted_all(pace, now):
            assert now >= floor
            out.append(leave)
        assert pace.in_flight == len(out)
        assert 1 <= pace.concurrency <= concurrency
        assert len([leave for leave in out if leave.probe]) <= len({leave.round for leave in out})
        if out:
            pace.record(out.pop(which % len(out)), verdict, now, rng.uniform)
            if isinstance(verdict, Retry) and verdict.after:
                floor = max(floor, now + verdict.after)
    for leave in out:
        pace.record(leave, None, now, rng.uniform)
    assert admitted_all(pace, now + 1000.0)


def test_many_agents_come_back_gently() -> None:
    """300 agents after an hour's outage: in the minute of the return under twice the steady requests."""
    rng = random.Random(3)
    down, up = 600.0, 4200.0
    steady = 300 / 2.0  # each agent posts every 2 s while all is well
    agents = [Pace(Settings()) for _ in range(300)]
    turns = [(rng.uniform(0, 2), number) for number in range(300)]
    heapq.heapify(turns)
    rates: dict[int, int] = {}
    while turns[0][0] < up + 120:
        now, number = heapq.heappop(turns)
        pace = agents[number]
        leave = pace.admit(now)
        if isinstance(leave, Pass):
            rates[int(now)] = rates.get(int(now), 0) + 1
            pace.record(leave, BUSY if down <= now < up else Accepted(), now, rng.uniform)
            leave = 2.0
        heapq.heappush(turns, (now + leave, number))
    during = [rates.get(second, 0) for second in range(700, 4200)]
    after = [rates.get(second, 0) for second in range(4200, 4260)]
    assert max(during) < steady / 2
    assert max(after) < 2 * steady
    assert all(pace.failures == 0 for pace in agents)
