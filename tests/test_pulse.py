"""How the agent's state becomes a line and signs of life; the clock jumps over the waits."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from supervisor import Told
from test_buffer_contract import chunk, put
from trio.testing import MockClock

from agent import config
from agent.buffer.memory import MemoryBuffer, open_memory
from agent.notify import Notices
from agent.pulse import Pulse, status_line

MEMORY = config.Buffer(path="/memory", kind="memory")


@pytest.fixture
def mock_clock() -> MockClock:
    """A clock that jumps to the next deadline whenever everybody waits."""
    return MockClock(autojump_threshold=0)


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    """What systemd hears of this process."""
    listener = Told(f"{tmp_path}/notify")
    listener.pid = os.getpid()
    with listener.sock:
        yield listener


@asynccontextmanager
async def beating(place: Path, watchdog: float = 0.0) -> AsyncIterator[tuple[MemoryBuffer, Pulse]]:
    """A pulse for a block, and the buffer that it tells of."""
    async with open_memory(MEMORY) as buffer, trio.open_nursery() as nursery:
        pulse = Pulse(Notices(f"{place}/notify", watchdog), buffer)
        nursery.start_soon(pulse.run)
        await trio.sleep(0.01)
        yield buffer, pulse
        nursery.cancel_scope.cancel()


class Ways:
    """Deliveries in a given state."""

    def __init__(self) -> None:
        self.ways = {"default": ""}
        self.why = ""

    def wedged(self) -> str:
        return self.why


async def test_the_line_changes_once_a_second_at_most(
    mock_clock: MockClock, told: Told, tmp_path: Path
) -> None:
    """Whatever happens in between; and it is told only when it is another."""
    async with beating(tmp_path) as (buffer, _):
        assert told.waiting() == [{"READY": "1", "STATUS": "0 events buffered"}]
        for number in range(50):
            await put(buffer, chunk(number, 100))
            await trio.sleep(0.1)
        await trio.sleep(1)
        lines = told.waiting()
        assert len(lines) <= 6
        assert lines[-1] == {"STATUS": "5,000 events buffered"}
        await trio.sleep(20)
        assert told.waiting() == []


async def test_a_sign_of_life_comes_twice_as_often_as_needed(
    mock_clock: MockClock, told: Told, tmp_path: Path
) -> None:
    """At half of the watchdog's time, from the start on."""
    async with beating(tmp_path, watchdog=60.0):
        for _ in range(4):  # more than the kernel keeps of what nobody reads
            await trio.sleep(120)
            assert told.waiting().count({"WATCHDOG": "1"}) in (4, 5)


async def test_a_delivery_that_is_wedged_ends_the_signs_of_life(
    mock_clock: MockClock, told: Told, tmp_path: Path
) -> None:
    """The line is told all the same; and when the delivery goes on, so do they."""
    async with beating(tmp_path, watchdog=60.0) as (_, pulse):
        pulse.outside = ways = Ways()
        await trio.sleep(10)
        told.waiting()
        ways.why = "delivery of default: a request does not end"
        ways.ways["default"] = "host"
        await trio.sleep(300)
        assert told.waiting() == [{"STATUS": "0 events buffered, held: host"}]
        ways.why = ""
        await trio.sleep(60)
        assert {"WATCHDOG": "1"} in told.waiting()


@pytest.mark.parametrize(
    ("events", "ways", "trouble", "expected"),
    [
        (0, {}, "", "0 events buffered"),
        (1, {"default": ""}, "", "1 event buffered, 1 project delivering"),
        (12345, {"eu": "", "us": ""}, "", "12,345 events buffered, 2 projects delivering"),
        (5, {"default": "key"}, "", "5 events buffered, held: key"),
        (
            5,
            {"eu": "key", "us": "", "old": "waiting", "x": "host"},
            "",
            "5 events buffered, 1 project delivering, waiting to try again: old, held: key (eu), host (x)",
        ),
        (7, {}, "disk full", "7 events buffered, the buffer cannot be written: disk full"),
    ],
)
def test_the_line(events: int, ways: dict[str, str], trouble: str, expected: str) -> None:
    """It says what waits, and what keeps it from going out."""
    assert status_line(events, ways, trouble) == expected
