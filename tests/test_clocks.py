"""`agent.deliver.clocks`: whatever happens to the host's clock, PostHog finds the true instant."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.deliver.clocks import Clocks, agree, told, written
from agent.events import Chunk, Instant

NOW = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z
SECOND = 1_000_000
HOUR = 3600 * SECOND
UNKNOWN = Clocks({}, None)


def chunk(*, boot: str = "b", received_at: int = NOW, monotonic: int = 0) -> Chunk:
    return Chunk(
        project="p",
        events=1,
        size=2,
        crc=0,
        received_at=received_at,
        boot=boot,
        monotonic=monotonic,
        packed=b"",
    )


@pytest.mark.parametrize(
    ("stamped", "now", "expected"),
    [
        (chunk(monotonic=100), Instant(NOW + 9_000_000, 9_000_100, "b"), "2026-01-01T00:00:09.000Z"),
        # The clock was set forward a year while the chunk waited: still told by the old one.
        (chunk(monotonic=0), Instant(NOW + 10**13, 1_500_000, "b"), "2026-01-01T00:00:01.500Z"),
        # A board that booted in 1970 and was set right since: PostHog's correction undoes the 1970.
        (chunk(received_at=5_000_000, monotonic=5), Instant(NOW, 1_000_005, "b"), "1970-01-01T00:00:06.000Z"),
        # Another boot: nothing but the wall clock is left.
        (chunk(boot="a", monotonic=10**15), Instant(NOW + 2_000, 5, "b"), "2026-01-01T00:00:00.002Z"),
        # Nor do two boots without a name have to be the same one.
        (chunk(boot="", monotonic=0), Instant(NOW, 5_000_000, ""), "2026-01-01T00:00:00.000Z"),
        # A clock of the same name that runs backwards is not that clock.
        (chunk(monotonic=10**15), Instant(NOW, 5, "b"), "2026-01-01T00:00:00.000Z"),
    ],
)
def test_the_time_is_told_in_the_chunks_clock(stamped: Chunk, now: Instant, expected: str) -> None:
    """Event time less this is the time that passed since, whatever the wall clock did."""
    moment = told(stamped, now, UNKNOWN)
    assert moment is not None
    assert written(moment) == expected


class World:
    """A host with a clock that may be wrong, and is set now and then, in true time (µs)."""

    def __init__(self) -> None:
        self.true = NOW
        self.boots = 0
        self.ahead: dict[str, int] = {}
        self.boot(0)

    def boot(self, error: int) -> None:
        """Start anew; the wall clock is wrong by so much."""
        self.boots += 1
        self.error, self.up = error, self.true

    def now(self) -> Instant:
        """What the host's clocks show; it is noted, as the agent does every second."""
        boot = f"boot-{self.boots}"
        instant = Instant(self.true + self.error, self.true - self.up + self.boots * 777, boot)
        self.ahead[boot] = instant.wall - instant.monotonic
        return instant

    def stamped(self) -> Chunk:
        """A chunk that comes in now."""
        now = self.now()
        return chunk(boot=now.boot, received_at=now.wall, monotonic=now.monotonic)

    def found(self, waiting: Chunk, posthog: int | None = None) -> int | None:
        """The instant that PostHog finds for an event of the chunk: its time less ours, by its own clock."""
        moment = told(waiting, self.now(), Clocks(self.ahead, posthog))
        return waiting.received_at if moment is None else waiting.received_at - moment + self.true


YEARS = 56 * 365 * 24 * HOUR


@pytest.mark.parametrize("error", [0, 5 * SECOND, -YEARS, YEARS, HOUR])
def test_a_step_while_events_wait_moves_none(error: int) -> None:
    """Within one boot: stamped by a wrong clock, delivered when it is set, found at its true instant."""
    world = World()
    world.boot(error)
    waiting, at = world.stamped(), world.true
    for later in (0, 30 * SECOND, HOUR):
        world.true += later
        assert world.found(waiting) == at
        world.error = 0
        assert world.found(waiting) == at


@pytest.mark.parametrize("error", [-YEARS, -HOUR, HOUR])
def test_a_step_is_known_in_the_next_boot(error: int) -> None:
    """A board that boots in 1970, is set by the network, and is switched off before it can deliver."""
    world = World()
    world.boot(error)
    before, at = world.stamped(), world.true
    world.true += 10 * SECOND
    world.error = 0
    after, later = world.stamped(), world.true
    world.true += HOUR
    world.boot(0)
    assert world.found(before) == at
    assert world.found(after) == later


def test_a_clock_that_is_always_wrong_is_no_matter() -> None:
    """An hour ahead before the reboot and after it: the difference is the event's age all the same."""
    world = World()
    world.boot(HOUR)
    waiting, at = world.stamped(), world.true
    world.true += HOUR
    world.boot(HOUR)
    assert world.found(waiting) == at


def test_before_the_clock_is_set_the_stored_times_stand() -> None:
    """Stamped by a right clock, delivered in 1970: nothing is said of the time, or PostHog's own is used."""
    world = World()
    waiting, at = world.stamped(), world.true
    world.true += HOUR
    world.boot(-YEARS)
    assert told(waiting, world.now(), Clocks(world.ahead, None)) is None
    assert world.found(waiting) == at
    assert world.found(waiting, posthog=world.true - world.now().monotonic) == at


def test_before_the_clock_is_set_no_event_is_in_the_future() -> None:
    """Stamped in 1970, set right, delivered in 1970 again: found by PostHog's clock, else it is now."""
    world = World()
    world.boot(-YEARS)
    waiting, at = world.stamped(), world.true
    world.true += SECOND
    world.error = 0
    world.now()
    world.true += HOUR
    world.boot(-2 * YEARS)
    assert world.found(waiting) == world.true
    assert world.found(waiting, posthog=world.true - world.now().monotonic) == at


@given(st.integers(0, 4 * 10**15))
def test_a_time_is_rfc_3339(at: int) -> None:
    """Every moment is written in UTC with milliseconds and a Z."""
    text = written(at)
    assert len(text) == 24
    assert text.endswith("Z")
    assert abs(datetime.fromisoformat(text).timestamp() * 1e6 - at) < 1001


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (chunk(monotonic=0), chunk(received_at=NOW + 10**12, monotonic=10**12), True),
        (chunk(monotonic=0), chunk(received_at=NOW + 1_000_000, monotonic=0), True),
        (chunk(monotonic=0), chunk(received_at=NOW + 1_000_001, monotonic=0), False),
        (chunk(received_at=0, monotonic=0), chunk(monotonic=60_000_000), False),
        (chunk(), chunk(boot="another"), False),
    ],
)
def test_clocks_agree_within_a_second(one: Chunk, other: Chunk, together: bool) -> None:
    """Chunks share a batch where no step of the clock lies between them."""
    assert (agree(one, other), agree(other, one)) == (together, together)
