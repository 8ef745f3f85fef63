"""The putter: what it was offered is put or booked, whatever ends it."""

import time
from collections.abc import Sequence

import trio
from sources import line

from agent import config
from agent.accept.putter import Putter
from agent.buffer import Entry
from agent.buffer.memory import open_memory
from agent.clock import Clock
from agent.decode.lines import Lines
from agent.decode.objects import Json
from agent.envelope import Flaws
from agent.events import CHUNK_BYTES, Cut, Read
from agent.vouch import Door, Rules


class Slow(Json):
    """Takes its time for each put."""

    def decode(self, reads: Sequence[Read], flaws: Flaws) -> Lines:
        time.sleep(0.05)
        return super().decode(reads, flaws)


async def test_what_a_stop_left_no_time_for_is_booked() -> None:
    """A putter that is cut short counts the lines that it was offered and did not put."""
    rules = Rules(
        source="app",
        project="default",
        properties={},
        distinct_id="",
        max_event=CHUNK_BYTES,
        max_batch_events=1000,
        max_batch_size=CHUNK_BYTES,
    )
    settings = config.Buffer(path="/memory", kind="memory")
    large = line(1, pad="x" * (CHUNK_BYTES - 1000))
    async with open_memory(settings) as buffer:
        putter = Putter("app", Door(rules, Slow(CHUNK_BYTES)), buffer)
        for _ in range(7):
            putter.offer(Read(large, Clock().now()))
        putter.offer(Read(b"\n" + line(2), Clock().now(), Cut("truncated", "")))
        with trio.move_on_after(0.1):
            await putter.run()
        books = buffer.books()
        accepted, shed = books[Entry("accepted", "app", "")], books[Entry("shed", "app", "shutdown")]
        assert 0 < accepted < 7
        assert accepted + shed == books[Entry("received", "app", "")] == 9
