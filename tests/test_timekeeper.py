"""`agent.timekeeper`: a clock that is set is noticed, counted and remembered."""

from pathlib import Path

import trio
from trio.testing import MockClock

from agent import config
from agent.buffer.memory import open_memory
from agent.buffer.sqlite import open_sqlite
from agent.clock import Clock
from agent.events import Instant
from agent.metrics import Metrics
from agent.timekeeper import Timekeeper

SECOND = 1_000_000


class Wristwatch(Clock):
    """A clock that can be set."""

    def __init__(self, boot: str = "boot-1", wall: int = 0) -> None:
        super().__init__()
        self.instant = Instant(wall, 500, boot)

    def now(self) -> Instant:
        """What it shows."""
        return self.instant

    def set(self, by: int) -> None:
        """Set it."""
        self.instant = self.instant._replace(wall=self.instant.wall + by)

    def go_on(self, by: int) -> None:
        """Let time pass."""
        wall, monotonic, boot = self.instant
        self.instant = Instant(wall + by, monotonic + by, boot)


async def test_steps_are_counted_and_noted(autojump_clock: MockClock) -> None:
    """Small differences are not steps, but a step that is small is noted all the same."""
    watch = Wristwatch()
    async with (
        open_memory(config.Buffer(path="/memory", kind="memory")) as buffer,
        trio.open_nursery() as nursery,
    ):
        keeper = Timekeeper(watch, buffer)
        await keeper.look()
        assert buffer.clocks() == {"boot-1": -500}
        nursery.start_soon(keeper.run)
        await trio.sleep(3)
        watch.go_on(3 * SECOND)
        await trio.sleep(3)
        assert keeper.steps == 0
        watch.set(20_000)
        await trio.sleep(3)
        assert (keeper.steps, buffer.clocks()["boot-1"]) == (0, 19_500)
        watch.set(56 * 365 * 86400 * SECOND)
        await trio.sleep(3)
        assert keeper.steps == 1
        assert keeper.last is not None
        assert keeper.last.by == 56 * 365 * 86400 * SECOND
        assert buffer.clocks() == {"boot-1": watch.instant.wall - watch.instant.monotonic}
        nursery.cancel_scope.cancel()


async def test_boots_are_remembered_over_restarts(tmp_path: Path) -> None:
    """Also a step that happened while no agent ran; where the kernel names no boot nothing is noted."""
    settings = config.Buffer(path=str(tmp_path / "b.db"))
    first, second = Wristwatch("boot-1", 70 * SECOND), Wristwatch("boot-2", 80 * SECOND)
    async with open_sqlite(settings, Metrics()) as buffer:
        await Timekeeper(first, buffer).look()
    first.set(3600 * SECOND)
    async with open_sqlite(settings, Metrics()) as buffer:
        keeper = Timekeeper(first, buffer)
        await keeper.look()
        assert keeper.steps == 1
    async with open_sqlite(settings, Metrics()) as buffer:
        await Timekeeper(second, buffer).look()
        await Timekeeper(Wristwatch(""), buffer).look()
        assert buffer.clocks() == {"boot-1": 3670 * SECOND - 500, "boot-2": 80 * SECOND - 500}
