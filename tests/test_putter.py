"""The putter: what it was offered is put or booked, whatever ends it."""

import time
from collections.abc import Sequence
from itertools import accumulate

import msgspec
import pytest
import trio
from sources import line

from agent import config
from agent.accept.offered import Outcome
from agent.accept.putter import MOST_LINES, Putter
from agent.buffer import Entry
from agent.buffer.memory import open_memory
from agent.clock import Clock
from agent.decode.lines import Lines
from agent.decode.objects import Json
from agent.envelope import Flaws
from agent.events import CHUNK_BYTES, Cut, Read
from agent.vouch import Door, Rules

RULES = Rules(
    source="app",
    project="default",
    properties={},
    distinct_id="",
    max_event=CHUNK_BYTES,
    max_batch_events=1000,
    max_batch_size=CHUNK_BYTES,
)


class Slow(Json):
    """Takes its time for each put."""

    def decode(self, reads: Sequence[Read], flaws: Flaws) -> Lines:
        time.sleep(0.05)
        return super().decode(reads, flaws)


class Counting(Json):
    """Tells how many lines each put had."""

    def __init__(self, max_event: int) -> None:
        super().__init__(max_event)
        self.lines: list[int] = []

    def decode(self, reads: Sequence[Read], flaws: Flaws) -> Lines:
        decoded = super().decode(reads, flaws)
        self.lines.append(sum(decoded.lines))
        return decoded


@pytest.mark.parametrize("even", [1, 7, 464, 1000])
async def test_short_lines_do_not_hold_others_up(even: int) -> None:
    """A put has a bound in lines too, however many a read has; each is told of in its read."""
    rules = msgspec.structs.replace(RULES, max_batch_events=even)
    form = Counting(CHUNK_BYTES)
    async with open_memory(config.Buffer(path="/memory", kind="memory")) as buffer:
        putter = Putter("app", Door(rules, form), buffer)
        count = 3 * MOST_LINES + 7
        first, second = list[Outcome](), list[Outcome]()
        putter.offer(Read(b"x\n" * count, Clock().now()), tell=first.append)
        putter.offer(Read(line(1) + b"x\n" * 3, Clock().now()), tell=second.append)
        putter.close()
        await putter.run()
        assert max(form.lines) <= MOST_LINES
        assert sum(part.lines for part in first) == sum(len(part.refused) for part in first) == count
        before = accumulate((part.lines for part in second), initial=0)
        refused = [at + one.line for at, part in zip(before, second, strict=False) for one in part.refused]
        assert refused == [1, 2, 3]
        assert buffer.books()[Entry("received", "app", "")] == count + 4


async def test_what_a_stop_left_no_time_for_is_booked() -> None:
    """A putter that is cut short counts the lines that it was offered and did not put."""
    settings = config.Buffer(path="/memory", kind="memory")
    large = line(1, pad="x" * (CHUNK_BYTES - 1000))
    async with open_memory(settings) as buffer:
        putter = Putter("app", Door(RULES, Slow(CHUNK_BYTES)), buffer)
        for _ in range(7):
            putter.offer(Read(large, Clock().now()))
        putter.offer(Read(b"\n" + line(2), Clock().now(), Cut("truncated", "")))
        with trio.move_on_after(0.1):
            await putter.run()
        books = buffer.books()
        accepted, shed = books[Entry("accepted", "app", "")], books[Entry("shed", "app", "shutdown")]
        assert 0 < accepted < 7
        assert accepted + shed == books[Entry("received", "app", "")] == 9


async def test_blank_lines_hold_nobody_up() -> None:
    """There is nothing to put of them, but between two parts of a long read others have their turn."""
    async with open_memory(config.Buffer(path="/memory", kind="memory")) as buffer:
        putter = Putter("app", Door(RULES), buffer)
        putter.offer(Read(b"\n" * (8 * MOST_LINES), Clock().now()), urgent=True)
        putter.close()
        turns = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(putter.run)
            while putter.left():
                await trio.lowlevel.checkpoint()
                turns += 1
        assert turns >= 8
