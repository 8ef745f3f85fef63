"""Reloads and restarts under load, over every kind of socket: no event is lost and no connection refused.

The sockets are a unit's, as under systemd, so that they outlive the agent. A restart may lose only what a TCP
client has written and was not acknowledged: this one waits for acknowledgements, and sends the rest again.
"""

import json
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from threading import Event, Thread

import httpx
import pytest
import trio
from processes import Running, configure
from supervisor import Supervisor

from agent.sink import Sink, serving

# A client writes so many events at a time.
TOGETHER = 50


def event(source: str, number: int) -> bytes:
    return b'{"event":"e","distinct_id":"d","properties":{"of":"%s","n":%d}}\n' % (source.encode(), number)


class Client(Thread):
    """One that sends, numbered, so many events a second until told to end; `failed` says why it could not."""

    def __init__(self, source: str, work: Callable[["Client"], None], per_second: int) -> None:
        super().__init__(daemon=True)
        self.source = source
        self.sent = 0
        self.over = Event()
        self.failed: list[str] = []
        self._work = work
        self._every = TOGETHER / per_second
        self._next = time.monotonic()

    def run(self) -> None:
        try:
            self._work(self)
        except (OSError, AssertionError) as error:
            self.failed.append(repr(error))

    def some(self) -> bytes:
        """What to write next, when it is time."""
        self._next = max(self._next + self._every, time.monotonic() - 1)
        time.sleep(max(0.0, self._next - time.monotonic()))
        return b"".join(event(self.source, self.sent + number) for number in range(TOGETHER))


def connected(family: int, address: str | tuple[str, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(address)
    return sock


def stream(client: Client, address: str) -> None:
    """A Unix stream: whole lines that the kernel took are delivered; a line cut in two is sent again."""
    sock = connected(socket.AF_UNIX, address)
    while not client.over.is_set():
        data, at = client.some(), 0
        try:
            while at < len(data):
                at += sock.send(data[at:])
        except (BrokenPipeError, ConnectionResetError):
            sock.close()
            sock = connected(socket.AF_UNIX, address)
        client.sent += data[:at].count(b"\n")
    sock.close()


def acknowledged(client: Client, address: tuple[str, int]) -> None:
    """TCP with acknowledgements: what was not acknowledged is sent again on the next connection."""
    while not client.over.is_set():
        sock, before = connected(socket.AF_INET, address), client.sent
        told = sock.makefile("rb")
        try:
            sock.sendall(b'{"ack":true}\n')
            for sent in count(TOGETHER, TOGETHER):
                sock.sendall(client.some())
                accepted = 0
                while accepted < sent:
                    if not (said := told.readline()):
                        raise ConnectionResetError
                    accepted = json.loads(said)["accepted"]
                    client.sent = before + accepted
                if client.over.is_set():
                    break
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            told.close()
            sock.close()


def datagrams(client: Client, family: int, address: str | tuple[str, int]) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        while not client.over.is_set():
            for one in client.some().splitlines(keepends=True):
                sock.send(one)
                client.sent += 1


def batches(client: Client, address: str) -> None:
    """An SDK: a batch is sent again until it is answered with 200."""
    with httpx.Client(base_url=address, timeout=20) as http:
        while not client.over.is_set():
            events = [json.loads(line) for line in client.some().splitlines()]
            while True:
                try:
                    answer = http.post("/batch/", json={"api_key": "phc_test", "batch": events})
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                    continue  # an idle connection was closed; a refused one would be a ConnectError
                assert answer.status_code in {200, 503}, answer
                if answer.status_code == 200:
                    break
            client.sent += TOGETHER


@pytest.mark.parametrize(
    ("times", "per_second"), [(2, 2000), pytest.param(20, 20_000, marks=pytest.mark.slow, id="at length")]
)
async def test_no_event_is_lost(tmp_path: Path, times: int, per_second: int) -> None:
    """Every event that a client was done with arrives at PostHog."""
    sink = Sink(keep=10_000_000)  # all of them
    unit = Supervisor()
    with unit:
        unit.stream("s", tmp_path / "events.sock")
        unit.datagram("d", tmp_path / "events.dgram")
        unit.stream("admin", tmp_path / "admin.sock")
        udp = unit.datagram("u", ("127.0.0.1", 0))
        udp.setsockopt(socket.SOL_SOCKET, 33, 32 * 1024 * 1024)  # SO_RCVBUFFORCE, as ReceiveBuffer=32M does
        tcp, http = unit.stream("t", ("127.0.0.1", 0)), unit.stream("h", ("127.0.0.1", 0))
        each = per_second // 5
        clients = [
            Client("s", lambda client: stream(client, str(tmp_path / "events.sock")), each),
            Client("t", lambda client: acknowledged(client, tcp.getsockname()), each),
            Client(
                "d", lambda client: datagrams(client, socket.AF_UNIX, str(tmp_path / "events.dgram")), each
            ),
            Client("u", lambda client: datagrams(client, socket.AF_INET, udp.getsockname()), each),
            Client("h", lambda client: batches(client, f"http://127.0.0.1:{http.getsockname()[1]}"), each),
        ]
        async with serving(sink) as url:
            config = configure(tmp_path, url)
            text = config.read_text()
            for path, name in (
                (f'path = "{tmp_path}/events.sock"', "s"),
                (f'path = "{tmp_path}/events.dgram"', "d"),
            ):
                text = text.replace(path, f'socket = "{name}"')
            text = text.replace('listen = "127.0.0.1:0"', 'socket = "u"')
            for kind, name in (("tcp", "t"), ("http", "h")):
                text += f'[[source]]\nkind = "{kind}"\nsocket = "{name}"\n'
            config.write_text(text)
            async with AsyncExitStack() as stack:
                agent: Running | None = None
                for number in range(times + 1):
                    if agent is not None:
                        agent.send(signal.SIGTERM)
                        with trio.fail_after(10):
                            assert await agent.process.wait() == 0
                    agent = await stack.enter_async_context(unit.running(config))
                    if not number:
                        for client in clients:
                            client.start()
                    await trio.sleep(0.5)
                    if number < times:
                        await agent.reloaded()
                        await trio.sleep(0.5)
                for client in clients:
                    client.over.set()
                for client in clients:
                    await trio.to_thread.run_sync(client.join, 30)
                assert agent is not None
                assert [client.failed for client in clients] == [[]] * 5
                with trio.fail_after(60):
                    while (await agent.status())["buffer"]["events"]:
                        await trio.sleep(0.1)
                came = {(one.properties["of"], one.properties["n"]) for one in sink.events}
                assert (
                    not {(client.source, number) for client in clients for number in range(client.sent)}
                    - came
                )
                status = await agent.status()
                assert status["books"]["balanced"]
                assert status["books"]["shed"] == {}
                rejected = [source["rejected"] for source in status["sources"]]
                assert rejected[0].keys() <= {"truncated"}
                assert rejected[1:3] == [{}, {}]
                assert sum(source["dropped"] or 0 for source in status["sources"]) == 0
