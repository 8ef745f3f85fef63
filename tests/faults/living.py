"""A buffer that lives through a story while its writes are recorded, and says what it owes.

Every part of a story ends as a kill ends it.
"""

import ctypes
import errno
import os
import random
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio
from damaged import chunk_of, events, events_in, uuids
from power import mark
from test_buffer_contract import dead, put, take, total
from test_sqlite import opened
from trio.testing import MockClock

from agent import config
from agent.buffer import BufferBroken, Limits
from agent.buffer.file import PAGE_BYTES
from agent.buffer.sqlite import SqliteBuffer, open_sqlite
from agent.metrics import Metrics
from agent.pack import crc32

MIB = 2**20

Durability = Literal["full", "normal"]


class Life:
    """A buffer in a story. Where an event may be is said before it changes and when that is done.

    `w`: it waits for delivery, `d`: it is a dead letter, `n`: nowhere.
    """

    def __init__(self, path: Path, recording: Path, durability: Durability, part: str) -> None:
        self.path = path
        self._recording = recording
        self.durability = durability
        self.chance = random.Random(part)  # events of its own for each part of a story
        self.buffer: SqliteBuffer

    def say(self, places: str, some: Iterable[str], known: Mapping[str, Any] | None = None) -> None:
        """Where these events may be from now on."""
        mark(self._recording, {"places": places, "uuids": list(some), "known": known or {}})

    @asynccontextmanager
    async def open(self, **settings: object) -> AsyncIterator[None]:
        """The buffer for a block."""
        given = {"max_size": 16 * MIB, "durability": self.durability, **settings}
        async with opened(self.path, **given) as self.buffer:
            yield

    async def put(self, chunks: int, count: int, pad: int, key: str | None = None) -> list[list[str]]:
        """Put new events; their uuids by chunk."""
        made = [chunk_of(events(self.chance, count, pad), key=key) for _ in range(chunks)]
        known = {
            uuid: [crc32(event), key, one.received_at]
            for one in made
            for uuid, event in uuids(events_in(one)).items()
        }
        self.say("wn", known, known)
        await put(self.buffer, *made)
        self.say("w", known)
        return [list(uuids(events_in(one))) for one in made]

    async def settle(self, most: int, *, buried: int = 0, kept: int = 0) -> None:
        """Deliver so many chunks at most; of the first, some events are refused, and some not yet sent."""
        lease = await take(self.buffer, Limits(10**6, 2**40))
        first, whole = lease.chunks[0], events_in(lease.chunks[0])
        bad, left = whole[:buried], whole[len(whole) - kept :]
        rest = [*([chunk_of(left, key=first.key)] if left else ()), *lease.chunks[most:]]
        sent = [event for one in lease.chunks[:most] for event in events_in(one)]
        gone = uuids(sent).keys() - uuids(bad).keys() - uuids(left).keys()
        self.say("wn", gone)
        self.say("wd", uuids(bad))
        letters = [
            msgspec.structs.replace(dead(event=event, key=first.key), received_at=first.received_at)
            for event in bad
        ]
        await self.buffer.settle(lease, dead=letters, rest=rest)
        self.say("n", gone)
        self.say("d", uuids(bad))

    async def letters(self, work: Callable[[list[int]], Awaitable[object]], places: str) -> None:
        """Replay or purge the oldest dead letter."""
        (letter,) = await self.buffer.letters(0, 1)
        (uuid,) = uuids([letter.event])
        self.say("d" + places, [uuid])
        await work([letter.id])
        self.say(places, [uuid])

    async def give_back(self) -> None:
        """What it does by itself after five quiet seconds."""
        await self.buffer._in_thread(partial(self.buffer._store.give_back_pages, 64))


async def birth(life: Life) -> None:
    """The file is made, and everything happens in it for the first time; then it is killed."""
    async with life.open():
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(life.put, 1, 6, 20 * number)
        await life.settle(1, buried=3, kept=2)
        await life.put(2, 4, 50, "phc_other")
        await life.buffer.note_clock("boot", 1)
        await life.buffer.note_drops("app", "socket", 7)
        await life.letters(life.buffer.replay, "w")
        await life.letters(life.buffer.purge, "n")
        for _ in range(3):
            await life.put(4, 50, 2000)
            await life.settle(3, buried=1)
        await life.give_back()
        await life.put(1, 5, 50)
        await life.settle(2)
        os._exit(0)


async def start(life: Life) -> None:
    """The file is made, and nothing is put."""
    async with life.open():
        os._exit(0)


async def days(life: Life) -> None:
    """It is found as it was killed, works, stops, starts, works, and is killed again."""
    async with life.open():
        await life.put(3, 10, 100)
        await life.settle(3, buried=1)
        await life.give_back()
    async with life.open():
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(life.put, 2, 20, 1000)
        await life.settle(5, kept=3)
        await life.letters(life.buffer.replay, "w")
        os._exit(0)


async def flood(life: Life) -> None:
    """More than there is room for: the oldest goes."""
    async with life.open():
        there = [uuid for _ in range(12) for one in await life.put(1, 40, 9000) for uuid in one]
    async with life.open(when_full="drop_oldest"):
        for _ in range(16):
            before = total(life.buffer, "shed", "full_oldest")
            life.say("wn", there)
            new = await life.put(1, 40, 9000)
            shed = total(life.buffer, "shed", "full_oldest") - before
            life.say("n", there[:shed])
            there = there[shed:]
            life.say("w", there)
            there += new[0]
        assert total(life.buffer, "shed", "full_oldest")
        os._exit(0)


async def harm(life: Life) -> None:
    """Its index is destroyed, and no event with it."""
    async with life.open():
        for _ in range(6):
            await life.put(5, 40, 4000)
        await life.settle(3, buried=4)
    with closing(sqlite3.connect(f"file:{life.path}?immutable=1", uri=True)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'chunk_lane'").fetchone()
    descriptor = os.open(life.path, os.O_WRONLY)
    os.pwrite(descriptor, bytes(PAGE_BYTES), (page - 1) * PAGE_BYTES)
    os.fsync(descriptor)
    os.close(descriptor)


async def mending(life: Life) -> None:
    """A start carries all over; it works, and is killed."""
    async with life.open():
        await life.put(2, 10, 100)
        await life.settle(3, buried=1)
        os._exit(0)


async def again(life: Life) -> None:
    """It is found as a power cut left it, works a little, and is killed."""
    async with life.open():
        await life.put(2, 10, 100)
        await life.settle(1)
        os._exit(0)


def failing() -> ctypes.CDLL:
    """What fails syncs, in this process."""
    shim = ctypes.CDLL(None)
    shim.faults_arm_syncs.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_int)
    return shim


async def refusal(life: Life) -> None:
    """Syncs fail, of log and database, for a while and again; senders give up; it is killed, or stops.

    Of what was refused each size is there, so that what comes behind it is shorter or longer.
    """
    chance = life.chance
    shim = failing()

    def arm(often: float) -> None:
        count = chance.choice((1, 2, 3, 9, 40)) if chance.random() < often else 0
        shim.faults_arm_syncs(chance.randrange(3), count, chance.choice((errno.EIO, errno.ENOSPC)))

    async def send(seconds: float) -> None:
        chunks, count, pad = (
            chance.choice((1, 1, 6)),
            chance.choice((1, 5, 30)),
            chance.choice((20, 500, 4000)),
        )
        with trio.move_on_after(seconds):
            await life.put(chunks, count, pad)

    arm(0.3)
    settings = config.Buffer(path=str(life.path), max_size=16 * MIB, durability=life.durability)
    with suppress(BufferBroken):  # it could not open: a service is started again
        async with open_sqlite(settings, Metrics()) as life.buffer:
            for _ in range(chance.randrange(4, 16)):
                arm(0.6)
                match chance.randrange(8):
                    case 0 | 1 | 2:
                        await send(0.5)
                    case 3 | 4:
                        await send(60)
                    case 5 if life.buffer.stats().unleased:
                        await life.settle(chance.randrange(1, 4), buried=1)
                    case 6:
                        with suppress(BufferBroken):
                            await life.buffer.note_clock("boot", chance.randrange(100))
                    case _:
                        await life.give_back()
            await life.buffer.answer()  # a write that is under way would not be in the recording
            if chance.random() < 0.7:
                os._exit(0)
    os._exit(0)


async def shorter(life: Life) -> None:
    """Two commits are refused as no sync succeeds, then a shorter one is not; it is killed."""
    shim = failing()
    async with life.open():
        await life.put(1, 5, 50)
        shim.faults_arm_syncs(0, 10**6, errno.EIO)
        for count in (30, 20):
            with trio.move_on_after(0.5):
                await life.put(1, count, 9000)
        shim.faults_arm_syncs(0, 0, 0)
        await life.put(1, 5, 50)
        os._exit(0)


STORIES: dict[str, tuple[Callable[[Life], Awaitable[None]], ...]] = {
    "start": (start,),
    "life": (birth, days),
    "flood": (flood,),
    "rescue": (harm, mending),
    "again": (again,),
    "shorter": (shorter,),
    "refusal": (refusal,) * 5,
    "refused rescue": (harm, *(refusal,) * 4),
}


if __name__ == "__main__":
    _, path, recording, durability, story = sys.argv
    kept = msgspec.convert(durability, Durability)
    name, _, seed = story.partition(":")
    for number, part in enumerate(STORIES[name]):
        # Each is a process of its own, and this one has loaded what it needs.
        if not (child := os.fork()):
            # The agent waits a second after each failure; here that takes none.
            clock = MockClock(autojump_threshold=0) if part is refusal else None
            life = Life(Path(path), Path(recording), kept, f"{part.__name__} {number} {seed}")
            trio.run(part, life, clock=clock)
            os._exit(0)
        failed = os.waitpid(child, 0)[1]
        if failed:
            sys.exit(f"{part.__name__}: {failed}")
