"""Sources on real sockets before a buffer in memory, for tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import trio

from agent import config
from agent.accept.handed import HandedSource
from agent.accept.offered import Offered
from agent.accept.source import Source, opened
from agent.buffer import Books, Buffer, Entry, Limits
from agent.buffer.memory import open_memory
from agent.clock import Clock
from agent.events import Origin, Read
from agent.pack import inflate
from agent.systemd import NOTHING, Passed

PROJECT = config.Project(api_key=config.Secret("phc_test"))
OTHER = config.Project(name="other one", api_key=config.Secret("phc_other"))


class Taken(NamedTuple):
    """A source that runs, its buffer, and the event that stops it."""

    source: Source
    buffer: Buffer
    stop: trio.Event

    def total(self, joint: str, reason: str = "") -> int:
        """One total of the books."""
        return self.buffer.books()[Entry(joint, self.source.settings.name, reason)]

    async def settled(self, events: int) -> Books:
        """The books once so many attempts at an event are in them."""
        while self.total("received") < events:
            await trio.sleep(0.005)
        return self.buffer.books()

    async def events(self, count: int) -> list[dict[str, Any]]:
        """Lease everything that is buffered, once there are so many."""
        while self.buffer.stats().events < count:
            await trio.sleep(0.005)
        found: list[dict[str, Any]] = []
        while (lease := await self.buffer.take(Limits(10_000, 2**30), "default")) is not None:
            for chunk in lease.chunks:
                found += msgspec.json.decode(b"[" + inflate(chunk.packed, chunk.size, chunk.crc) + b"]")
        return found


@asynccontextmanager
async def taking(
    settings: config.Source,
    *,
    max_size: int = 2**30,
    when_full: Any = "block",
    passed: Passed = NOTHING,
    handed: HandedSource | None = None,
) -> AsyncIterator[Taken]:
    """A running source for a block; it is stopped and has put everything when the block is left.

    It goes on where another one has `handed` it over.
    """
    path = "/memory"
    kept = config.Buffer(path=path, kind="memory", max_size=max_size, when_full=when_full)
    with opened(settings, passed) as sockets:
        async with open_memory(kept) as buffer, trio.open_nursery() as nursery:
            source = Source(settings, PROJECT, sockets, buffer, Clock(), (PROJECT, OTHER), handed)
            stop = trio.Event()
            nursery.start_soon(source.run, stop)
            with trio.fail_after(20):
                yield Taken(source, buffer, stop)
            stop.set()


def origins(taken: Taken) -> list[Origin | None]:
    """Who the door is told sent what, from now on."""
    found: list[Origin | None] = []
    offer = taken.source.putter.offer

    def noting(read: Read, **how: Any) -> Offered:
        found.append(read.origin)
        return offer(read, **how)

    taken.source.putter.offer = noting  # type: ignore[method-assign, assignment]  # a window, not another putter
    return found


def stream(folder: Path, **settings: Any) -> config.UnixStream:
    """Settings of a Unix stream in a folder."""
    return config.UnixStream(name="app", project="default", path=str(folder / "s"), **settings)


def datagram(folder: Path, **settings: Any) -> config.UnixDatagram:
    """Settings of a Unix datagram socket in a folder."""
    return config.UnixDatagram(name="app", project="default", path=str(folder / "d"), **settings)


def tcp(**settings: Any) -> config.Tcp:
    """Settings of a TCP listener on any free port."""
    return config.Tcp(name="app", project="default", **{"listen": "127.0.0.1:0", **settings})


def http(**settings: Any) -> config.Http:
    """Settings of an HTTP listener on any free port."""
    return config.Http(name="app", project="default", listen="127.0.0.1:0", **settings)


def udp(**settings: Any) -> config.Udp:
    """Settings of a UDP socket on any free port."""
    return config.Udp(name="app", project="default", listen="127.0.0.1:0", **settings)


def line(number: int = 0, **fields: object) -> bytes:
    """A good event on a line of its own."""
    event = {"event": "e", "distinct_id": "d", "properties": {"n": number}, **fields}
    return msgspec.json.encode(event) + b"\n"
