"""A backlog that is larger than memory: held, found again after a kill, delivered, and its room given back.

ENDURANCE_BACKLOG (MiB on disk) sets the long form; it takes at most a third of what the disk has free.
"""

import base64
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from enduring import MIB, free_port, memory, size, told
from processes import Running, configure, running

BACKLOG = int(os.environ.get("ENDURANCE_BACKLOG", "10240"))

# What is promised of any backlog.
MOST_MEMORY = 100 * MIB
# Of one event: text that deflate makes a quarter smaller, as random base64 is.
TEXT = 20_000
TOGETHER = 50
UNDER_WAY = 1_000
IDLE_DATABASE = 1 * MIB


def events() -> Iterator[bytes]:
    """Numbered, and none like those before it within what deflate remembers."""
    noise = base64.b64encode(random.Random(1).randbytes(1_500_000))
    for number in range(1 << 40):
        at = number * 7919 % (len(noise) - TEXT)
        properties = b'{"no":"no-big-%d-","text":"%b"}' % (number, noise[at : at + TEXT])
        yield b'{"event":"e","distinct_id":"user-%d","properties":%b}\n' % (number, properties)


def fill(agent: Running, most: int) -> int:
    """Send until the file is so large, acknowledged; how many events it holds."""
    sent = accepted = 0
    rest = b""
    source = events()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(agent.stream)
        sock.sendall(b'{"ack":true}\n')
        full = False
        while accepted < sent or not full:
            full = full or size(agent.folder / "buffer.db") >= most
            if not full:
                sock.sendall(b"".join(next(source) for _ in range(TOGETHER)))
                sent += TOGETHER
            while accepted < sent and (full or sent - accepted > UNDER_WAY):
                *lines, rest = (rest + sock.recv(65536)).split(b"\n")
                for totals in map(json.loads, lines):
                    assert totals["rejected"] == 0
                    accepted = totals["accepted"]
    return sent


@pytest.mark.parametrize("mebibytes", [50, pytest.param(BACKLOG, marks=pytest.mark.slow, id="at length")])
async def test_a_backlog(
    tmp_path: Path, mebibytes: int, record_property: Callable[[str, object], None]
) -> None:
    """It takes little memory to hold, to find again after a kill, and to deliver, however large it is."""
    most = min(mebibytes, shutil.disk_usage(tmp_path).free // 3 // MIB) * MIB
    port = free_port()
    config = configure(
        tmp_path,
        f"http://127.0.0.1:{port}",
        f'[buffer]\npath = "{tmp_path}/buffer.db"\nmax_size = "{most * 5 // 4 // MIB + 64} MiB"',
    )
    database, peaks = tmp_path / "buffer.db", []
    began = time.monotonic()
    async with running(config) as agent:
        sent = await trio.to_thread.run_sync(fill, agent, most)
        filled = time.monotonic() - began
        peaks.append(memory(agent.process.pid, "VmHWM"))
        held = size(database)
        agent.send(signal.SIGKILL)
        await agent.process.wait()
    began = time.monotonic()
    async with running(config) as agent:
        start = time.monotonic() - began
        peaks.append(memory(agent.process.pid, "VmHWM"))
        assert (await agent.status())["buffer"]["events"] == sent
        async with told("taking.py", str(port)) as sink:
            began = time.monotonic()
            with trio.fail_after(120 + most / MIB):
                while (await agent.status())["buffer"]["events"]:
                    await trio.sleep(0.5)
            drained = time.monotonic() - began
            peaks.append(memory(agent.process.pid, "VmHWM"))
            began = time.monotonic()
            with trio.fail_after(120 + most / MIB):
                while size(database) > IDLE_DATABASE:
                    await trio.sleep(0.2)
            shrunk = time.monotonic() - began
            peaks.append(memory(agent.process.pid, "VmHWM"))
            came = await sink.ask("tell " + json.dumps({"big": sent}))
        assert (await agent.status())["books"]["balanced"]
    shown = [f"{peak / MIB:.0f}" for peak in peaks]
    said = [
        f"{sent:,} events of {TEXT:,} bytes of noise, {held / MIB:,.0f} MiB on disk, in {filled:.0f} s",
        f"a start with them in {start:.1f} s",
        f"delivered in {drained:.0f} s, lost {len(came['missing']['big'])}, twice {came['twice']}",
        f"the file small again after {shrunk:.0f} s",
        f"memory at most (MiB) filled, started, delivered, given back: {', '.join(shown)}",
    ]
    record_property("told", "; ".join(said))
    assert came["missing"]["big"] == []
    assert max(peaks) < MOST_MEMORY
