"""A process whose writes fail as it is told: it lives through them, and says what became of its events."""

import ctypes
import json
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import trio
from test_buffer_contract import ALL, assert_balanced, chunk, dead, take
from trio.testing import MockClock

from agent import config
from agent.buffer import Buffer, BufferBroken, leased
from agent.buffer.sqlite import open_sqlite
from agent.events import Chunk, Tally
from agent.metrics import Metrics

# Small enough that the log is written back to the database within one story.
MIB = 2**20
# More than calls fail in a row: some openings make one only.
ATTEMPTS = 60


async def story(path: Path, owed: set[int], gone: set[int]) -> None:
    """Open it, put, deliver, bury, put again, close; what was acknowledged and what was settled is noted."""
    async with open_sqlite(config.Buffer(path=str(path), max_size=16 * MIB), Metrics()) as buffer:

        async def put(number: int) -> None:
            one = chunk(number, size=200_000)
            if await buffer.put([one], Tally(source="app", received=one.events)):
                owed.add(number)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(put, number)
        async with leased(buffer, await take(buffer)) as lease:
            numbers = [one.crc for one in lease.chunks]
            await buffer.settle(lease, dead=[dead()], rest=lease.chunks[3:])
            gone |= set(numbers[:3])
        with suppress(BufferBroken):
            await buffer.note_clock("boot", 1)
        for number in range(6, 9):
            await put(number)


async def found(path: Path) -> set[int]:
    """What a start after all of it finds, in a buffer whose books balance."""
    async with open_sqlite(config.Buffer(path=str(path), max_size=16 * MIB), Metrics()) as buffer:
        assert_balanced(buffer)
        return {one.crc for one in await _all(buffer)}


async def _all(buffer: Buffer) -> list[Chunk]:
    return list(lease.chunks) if (lease := await buffer.take(ALL, "default")) is not None else []


async def one(shim: ctypes.CDLL, first: int, count: int, error: int) -> str:
    """What is wrong after the calls from `first` on failed, empty where nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "buffer.db"
        owed: set[int] = set()
        gone: set[int] = set()
        shim.faults_arm(first, count, error)
        try:
            for _ in range(ATTEMPTS):
                with suppress(BufferBroken):  # it could not open: a service is started again
                    await story(path, owed, gone)
                    break
            else:
                return "it never opened"
        finally:
            shim.faults_arm(0, 0, 0)
        there = await found(path)
    if missing := owed - gone - there:
        return f"lost: {sorted(missing)}"
    if len(owed) != 9:
        return f"only {len(owed)} of 9 were acknowledged"
    return f"there again: {sorted(gone & there)}" if gone & there else ""


async def main() -> None:
    shim = ctypes.CDLL(None)
    shim.faults_arm.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_int)
    shim.faults_calls.restype = ctypes.c_long
    wrong = []
    for first, count, error in json.loads(sys.argv[1]):
        if said := await one(shim, first, count, error):
            wrong.append([first, count, error, said])
    shim.faults_arm(0, 0, 0)
    folder = Path(tempfile.mkdtemp())
    await story(folder / "buffer.db", set(), set())
    calls = shim.faults_calls()
    shutil.rmtree(folder)
    sys.stderr.write(json.dumps({"calls": calls, "wrong": wrong}) + "\n")


if __name__ == "__main__":
    # The agent waits a second after each failure; here that takes none.
    trio.run(main, clock=MockClock(autojump_threshold=0))
