"""An agent with a source of every kind, what its good clients see of it, and what of it must be as before."""

import json
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import trio
from certificates import Papers, make_papers
from processes import Running, running

from agent.sink import Sink, serving

MIB = 2**20
ASK = b'{"ack":true}\n'
TOML = """
[project]
host = "{url}"
api_key = "phc_test"
[[source]]
kind = "unix_stream"
path = "{folder}/events.sock"
mode = 0o666
[[source]]
kind = "unix_datagram"
path = "{folder}/events.dgram"
mode = 0o666
[[source]]
kind = "udp"
listen = "127.0.0.1:0"
[[source]]
kind = "tcp"
name = "json"
listen = "127.0.0.1:0"
[[source]]
kind = "tcp"
name = "syslog"
format = "syslog"
listen = "127.0.0.1:0"
[[source]]
kind = "tcp"
name = "logfmt"
format = "logfmt"
listen = "127.0.0.1:0"
[[source]]
kind = "tcp"
name = "tls"
listen = "127.0.0.1:0"
tls_cert = "{papers.cert}"
tls_key = "{papers.key}"
[[source]]
kind = "http"
listen = "127.0.0.1:0"
[buffer]
path = "{folder}/buffer.db"
[delivery]
linger = "20 ms"
concurrency = 1
cooldown = "1 s"
[admin]
socket = "{folder}/admin.sock"
listen = "127.0.0.1:{port}"
"""
# README: 50 MiB, 8 MiB for each source, 16 for each of the five stream sources, a batch, 64 for HTTP bodies.
MEMORY_BOUND = (50 + 8 * 8 + 5 * 16 + 5 + 64) * MIB

# A receive buffer of 32 MiB that is full of lines of a byte is work for a minute, and UDP comes behind it.
PATIENCE_SECONDS = 120

STREAMS = ("unix_stream", "json", "syslog", "logfmt", "tls")
WEB = ("http", "admin", "pages")

type_of_address = str | tuple[str, int]


def good(number: int, door: str = "json") -> bytes:
    """A good event on a line of its own, as a door wants it."""
    if door == "logfmt":
        return b"event=good distinct_id=d n=%d\n" % number
    if door == "syslog":
        return b'<13>1 - host app - - - {"event":"good","distinct_id":"d","properties":{"n":%d}}\n' % number
    return b'{"event":"good","distinct_id":"d","properties":{"n":%d}}\n' % number


class Fortress(NamedTuple):
    """The agent, where its doors are, and the sink behind it."""

    agent: Running
    doors: dict[str, type_of_address]
    sink: Sink
    tls: ssl.SSLContext

    def url(self, door: str) -> str:
        """Where requests go."""
        where = self.doors[door]
        assert isinstance(where, tuple)
        return f"http://{where[0]}:{where[1]}"

    async def connect(self, door: str) -> trio.SocketStream:
        """A client's connection, in the clear also at the door that wants TLS."""
        where = self.doors[door]
        if isinstance(where, str):
            return await trio.open_unix_socket(where)
        return await trio.open_tcp_stream(*where)

    async def agreed(self) -> trio.SSLStream[trio.SocketStream]:
        """A client that has agreed on TLS."""
        stream = trio.SSLStream(await self.connect("tls"), self.tls, server_hostname="127.0.0.1")
        await stream.do_handshake()
        return stream

    async def sent(self, door: str, lines: bytes, count: int) -> dict[str, int]:
        """Send lines to a stream, and be told what became of all of them."""
        connecting = self.agreed() if door == "tls" else self.connect(door)
        told = {"accepted": 0, "rejected": 0}
        async with await connecting as client:
            await client.send_all(ASK + lines)
            text = b""
            while sum(told.values()) < count:
                some = await client.receive_some(65536)
                assert some, text
                text += some
                *whole, text = text.split(b"\n")
                told = next((json.loads(one) for one in reversed(whole) if b"accepted" in one), told)
        return told

    async def serves(self, number: int) -> None:
        """Good clients at every door are served, and their events come to PostHog."""
        expected = set()
        with trio.fail_after(PATIENCE_SECONDS):
            for place, door in enumerate(STREAMS):
                told = await self.sent(door, good(number + place, door), 1)
                assert told == {"accepted": 1, "rejected": 0}
                expected.add(number + place)
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
                await datagram.sendto(good(number + 10), self.doors["unix_datagram"])
            expected |= {number + 10, number + 11}
            async with httpx.AsyncClient(timeout=30) as client:
                body = {"api_key": "phc_test", "batch": [json.loads(good(number + 20))]}
                answer = await client.post(f"{self.url('http')}/batch/", json=body)
                assert (answer.status_code, answer.json()) == (200, {"status": "Ok"})
                expected.add(number + 20)
                pages = self.url("pages")
                for path in ("/metrics", "/livez", "/readyz", "/status", "/"):
                    assert (await client.get(f"{pages}{path}")).status_code == 200
            while not expected <= {event.properties.get("n") for event in self.sink.events}:
                # By UDP again and again: behind a flood the kernel drops what comes.
                with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
                    await datagram.sendto(good(number + 11), self.doors["udp"])
                await trio.sleep(0.1)

    async def serves_for(self, seconds: float) -> None:
        """Again and again for a time, at least once."""
        end = trio.current_time() + seconds
        for number in count(100, 30):
            await trio.sleep(1)
            await self.serves(number)
            if trio.current_time() >= end:
                return

    async def quiet(self) -> dict[str, Any]:
        """The books, once everything that came is in them and delivered; they balance.

        What PostHog refuses is buried beside an event that it takes: now and then there is a good one.
        """
        before: dict[str, Any] = {}
        looks = 0
        with trio.fail_after(PATIENCE_SECONDS):
            while True:
                books: dict[str, Any] = (await self.agent.status())["books"]
                if books == before and not books["buffered"]:
                    break
                before = books
                looks += 1
                if books["buffered"] and looks % 5 == 0:
                    await self.sent("unix_stream", good(looks), 1)
                await trio.sleep(0.15)
        assert books["balanced"], books
        assert books["received"] == books["accepted"] + books["rejected"]
        assert books["accepted"] == books["delivered"] + books["dead"]
        return books

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.agent.process.pid}/fd"))

    def memory(self, field: str = "VmHWM") -> int:
        """Bytes of memory that it has, or at its worst had."""
        status = Path(f"/proc/{self.agent.process.pid}/status").read_text()
        return 1024 * int(status.partition(f"{field}:")[2].split()[0])

    async def holds(self, before: int) -> dict[str, Any]:
        """After an attack: it serves, its books balance, and nothing of the attackers is left in it."""
        await self.serves(10_000)
        books = await self.quiet()
        with trio.fail_after(60):
            while self.descriptors() > before:
                await trio.sleep(0.1)
        assert self.memory() <= MEMORY_BOUND, f"{self.memory() / MIB:.0f} MiB"
        assert self.agent.process.poll() is None
        log = self.agent.log()
        assert "Traceback" not in log, log[-5000:]
        assert "a client's work failed" not in log, log[-5000:]
        return books


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


def _address(text: str) -> type_of_address:
    if text.startswith("/"):
        return text
    host, _, port = text.rpartition(":")
    return host, int(port)


@asynccontextmanager
async def fortress(papers: Papers) -> AsyncIterator[Fortress]:
    """A ready agent for a block, in a folder that other users may enter; it has served each kind once."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    folder.chmod(0o755)
    try:
        sink = Sink(keep=30_000)
        async with serving(sink) as url:
            port = _free_port()
            config = folder / "config.toml"
            config.write_text(TOML.format(url=url, folder=folder, papers=papers, port=port))
            async with running(config) as agent:
                status = await agent.status()
                doors = {one["name"]: _address(one["address"]) for one in status["sources"]}
                doors |= {"admin": str(folder / "admin.sock"), "pages": ("127.0.0.1", port)}
                tls = ssl.create_default_context(cafile=papers.ca)
                fort = Fortress(agent, doors, sink, tls)
                await fort.serves(0)
                await fort.quiet()
                yield fort
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """Certificates."""
    return make_papers(tmp_path_factory.mktemp("papers"))
