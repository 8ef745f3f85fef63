"""An agent that lives long under load: who loads it, what is watched meanwhile, and how that is judged."""

import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import trio
from processes import Running, ended

HERE = Path(__file__).parent
KIB, MIB = 1024, 1024 * 1024
# What a new process takes at least until its caches, pools and buffers are as they stay; its heap grows ever
# slower while it meets its first outages, so that of a longer life the first half is not judged: measured,
# 12 KiB/s in the first four minutes and none in the next, with 72 MiB at the end of either.
WARM_SECONDS = 45.0
# Fewer samples tell no slope.
FEWEST = 20


class Told:
    """A program of ours that is told what to do, a line each, and answers with a line of JSON."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._rest = b""

    async def be(self, order: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(order.encode() + b"\n")

    async def ask(self, order: str) -> dict[str, Any]:
        await self.be(order)
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            more = await self._process.stdout.receive_some()
            assert more, "it ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def told(program: str, *arguments: str) -> AsyncIterator[Told]:
    """One of the programs beside this file, for a block."""
    process = await trio.lowlevel.open_process(
        [sys.executable, str(HERE / program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    async with ended(process):
        yield Told(process)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def memory(pid: int, which: str = "VmRSS") -> int:
    """VmRSS or VmHWM in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(which + ":"):
            return int(line.split()[1]) * KIB
    raise LookupError(which)


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Sample(NamedTuple):
    """How the agent is at a moment, in the so manieth life."""

    life: int
    at: float
    memory: int
    descriptors: int
    database: int
    log: int


class Watch:
    """Samples of one agent after another, and the probe's latencies."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.latencies: list[tuple[float, float]] = []  # when it was sent, how long until acknowledged
        self.disturbed: list[tuple[float, float]] = []  # when the agent was reloaded, killed or restarted
        self.life = 0
        self.agent: Running | None = None

    async def run(self, every: float) -> None:
        """Take samples until cancelled."""
        while True:
            self.look()
            await trio.sleep(every)

    def look(self) -> Sample | None:
        """Take one; None where there is no agent just now."""
        if self.agent is None:
            return None
        pid, path = self.agent.process.pid, self.agent.folder / "buffer.db"
        try:
            now, taken = time.monotonic(), memory(pid)
            log = size(path.with_name("buffer.db-wal"))
            sample = Sample(self.life, now, taken, descriptors(pid), size(path), log)
        except (FileNotFoundError, LookupError, ProcessLookupError):
            return None  # it was killed
        self.samples.append(sample)
        return sample

    async def probe(self, address: Path, every: float, owed: list[int]) -> None:
        """A client of its own: one event at a time, acknowledged. `owed` counts them."""
        while True:
            try:
                async with await trio.open_unix_socket(str(address)) as stream:
                    await stream.send_all(b'{"ack":true}\n')
                    while True:
                        began = time.monotonic()
                        await stream.send_all(
                            b'{"event":"e","distinct_id":"d","properties":{"no":"no-probe-%d-"}}\n' % owed[0]
                        )
                        if b'"rejected":0' not in await stream.receive_some():
                            break
                        self.latencies.append((began, time.monotonic() - began))
                        owed[0] += 1
                        await trio.sleep(every)
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(0.02)

    def calm(self, first: float, last: float) -> list[float]:
        """The latencies of that time, without those of clients whom a reload, kill or restart let wait."""
        return [
            took
            for at, took in self.latencies
            if first <= at <= last
            and not any(at < end and at + took > begin for begin, end in self.disturbed)
        ]

    def most(self, what: str) -> int:
        """The largest of all samples."""
        return max(int(getattr(sample, what)) for sample in self.samples)

    def lives(self) -> list[list[Sample]]:
        """The samples of each life that was long enough to be warm and then judged."""
        found = []
        for life in range(self.life + 1):
            its = [sample for sample in self.samples if sample.life == life]
            warm_at = its[0].at + max(WARM_SECONDS, (its[-1].at - its[0].at) / 2) if its else 0.0
            warm = [sample for sample in its if sample.at >= warm_at]
            if len(warm) >= FEWEST:
                found.append(warm)
        return found


def slope(samples: Sequence[Sample]) -> float:
    """Bytes of memory a second: the median slope between all pairs (Theil and Sen), blind to peaks."""
    pairs = combinations(samples, 2)
    return statistics.median(
        (after.memory - before.memory) / (after.at - before.at) for before, after in pairs
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them is; 0 of none."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0
