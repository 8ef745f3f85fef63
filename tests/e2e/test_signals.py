"""Signals at any instant of an agent's life: none kills it, none is lost, and it always ends in order."""

import json
import os
import random
import signal
import socket
import sqlite3
import time
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path
from threading import Event, Thread

import pytest
import trio
from processes import Running, configure, running, started
from sources import line

from agent.sink import Sink, serving

# One write of a client, which then waits for its acknowledgement.
TOGETHER = 20
# As /proc has them: bit 0 is signal 1.
HELD = sum(1 << number - 1 for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))


class Client(Thread):
    """One connection that must last: lines, and the agent's word on them before there are more."""

    def __init__(self, agent: Running) -> None:
        super().__init__(daemon=True)
        self.accepted = 0
        self.over = Event()
        self.failed = ""
        self._path = agent.stream

    def run(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(self._path)
            sock.sendall(b'{"ack":true}\n')
            told, sent = sock.makefile("rb"), 0
            try:
                while not self.over.is_set():
                    sock.sendall(b"".join(line(sent + number) for number in range(TOGETHER)))
                    sent += TOGETHER
                    while self.accepted < sent:
                        self.accepted = json.loads(told.readline())["accepted"]
            except (OSError, ValueError) as error:
                self.failed = repr(error)


def taking(process: int) -> list[str]:
    """Its threads that would take a signal: with no handler at that instant, that kills the process."""
    found = []
    for thread in Path(f"/proc/{process}/task").iterdir():
        try:
            fields = dict(field.split(":", 1) for field in (thread / "status").read_text().splitlines())
        except OSError:  # it has ended
            continue
        if fields["State"].split()[0] not in "ZX" and HELD & ~int(fields["SigBlk"], 16):
            found.append(fields["Name"].strip())
    return found


@pytest.mark.parametrize("reloads", [2, pytest.param(60, marks=pytest.mark.slow, id="at length")])
async def test_a_storm_of_reloads_kills_nothing(tmp_path: Path, reloads: int) -> None:
    """SIGHUP after SIGHUP, also while one agent becomes the next: the process and its clients live on."""
    sink = Sink(keep=10_000_000)  # all of them
    async with serving(sink) as url, running(configure(tmp_path, url)) as agent:
        clients = [Client(agent) for _ in range(4)]
        for client in clients:
            client.start()
        signals = 0
        with trio.fail_after(20 + 5 * reloads):
            while agent.log().count("event=replaced") < reloads and agent.process.poll() is None:
                agent.send(signal.SIGHUP)
                signals += 1
                assert not taking(agent.process.pid)
                await trio.sleep(random.choice((0.001, 0.01, 0.1)) * random.random())
        assert agent.process.poll() is None, f"after {signals} signals\n{agent.log()}"
        for client in clients:
            client.over.set()
            await trio.to_thread.run_sync(client.join, 20)
            assert not client.failed, agent.log()
        accepted = sum(client.accepted for client in clients)
        assert accepted
        await agent.until(delivered=accepted)
        assert sink.taken == accepted
        agent.send(signal.SIGTERM)
        with trio.fail_after(10):
            assert await agent.process.wait() == 0, agent.log()


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.slow, id="at length")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_in_a_reload_is_in_order(tmp_path: Path, times: int, number: signal.Signals) -> None:
    """The stop comes at any instant of a reload, and is obeyed by the agent that is, or by the next."""
    async with serving(Sink()) as url:
        for place in range(times):
            async with AsyncExitStack() as stack:
                agent = await stack.enter_async_context(running(configure(tmp_path, url)))
                before = agent.log().count("event=stopped")
                agent.send(signal.SIGHUP)
                wait = 1.5 * (place + random.random()) / times
                await trio.sleep(wait)
                agent.send(number)
                asked = time.monotonic()
                with trio.move_on_after(15):
                    await agent.process.wait()
                took = time.monotonic() - asked
                assert agent.process.returncode == 0, f"{wait:.3f} s after the reload\n{agent.log()}"
                assert agent.log().count("event=stopped") == before + 1
                assert took < 5, f"{took:.1f} s, {wait:.3f} s after the reload\n{agent.log()}"


@pytest.mark.parametrize("times", [3, pytest.param(60, marks=pytest.mark.slow, id="at length")])
async def test_signals_in_a_start_are_not_lost(tmp_path: Path, times: int) -> None:
    """As soon as the command has begun: SIGHUP does not end it, SIGTERM does, in order."""
    config = configure(tmp_path, "http://127.0.0.1:9")
    for _ in range(times):
        async with started(config) as agent:
            with trio.fail_after(10):
                while taking(agent.process.pid):
                    await trio.sleep(0.001)
            for number in (signal.SIGHUP, signal.SIGTERM):
                await trio.sleep(random.uniform(0, 0.3))
                agent.send(number)
            with trio.fail_after(10):
                assert await agent.process.wait() == 0, agent.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_start_that_waits_for_its_configuration_can_be_ended(
    tmp_path: Path, number: signal.Signals
) -> None:
    """A file that never comes to its end (here a FIFO) holds nobody up."""
    os.mkfifo(config := tmp_path / "config.toml")
    async with started(config) as agent:
        with trio.fail_after(10):
            for waits in (False, True):  # held first, then not
                while bool(taking(agent.process.pid)) != waits:
                    await trio.sleep(0.001)
            agent.send(number)
            assert await agent.process.wait() == 0
        assert not agent.log()


async def test_a_stop_in_a_flood_of_lines_over_their_rate_keeps_its_time(tmp_path: Path) -> None:
    """Two bytes a line, far more than is allowed: what was read is refused or counted as shed, in order."""
    config = configure(tmp_path, "http://127.0.0.1:9")
    path = f'path = "{tmp_path}/events.sock"'
    config.write_text(config.read_text().replace(path, f"{path}\nuid_events_per_second = 20000"))
    async with running(config) as agent:

        async def flood() -> None:
            async with await trio.open_unix_socket(agent.stream) as client:
                with suppress(trio.BrokenResourceError):
                    while True:
                        await client.send_all(b"x\n" * 30_000)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(flood)
            await trio.sleep(4)
            agent.send(signal.SIGTERM)
            asked = trio.current_time()
            with trio.fail_after(30):
                assert await agent.process.wait() == 0
            assert trio.current_time() - asked < 5, agent.log()
            nursery.cancel_scope.cancel()
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as database:
        books = dict(database.execute("SELECT joint, sum(total) FROM books GROUP BY joint"))
    assert books["received"] == books["rejected"] + books.get("shed", 0) > 0
