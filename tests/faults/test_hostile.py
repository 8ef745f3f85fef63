"""Hostile clients at every door of one agent: they end themselves, and nobody else.

After each kind of attack the agent serves good clients at every door, its books balance, its memory is within
what the README says, its descriptors are those that it had, and its log has no mistake of its own.
"""

import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import trio
from attacks import BODIES, FLOODS, RAW, SLOW, UNREAD, Body, Raw, Slow
from certificates import Papers
from fortress import ASK, MEMORY_BOUND, MIB, STREAMS, WEB, Fortress, fortress, papers
from processes import ended

__all__ = ["papers"]
Told = Callable[[str, object], None]
LONG = pytest.mark.slow

# The pages have 16 places, and one is for who looks whether the agent is well.
AT_ONCE = 12
# What a client that never reads says ten times a second; the kernel keeps some 200 KiB of what it is told.
UNREAD_BYTES = 512
CLOSE = {"connection": "close"}


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    """A client's end of a thousand connections takes descriptors too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def exchanged(fort: Fortress, door: str, raw: Raw) -> tuple[bytes, bool]:
    """What is answered to a text, and whether the agent ended the connection."""
    answer = b""
    async with await fort.connect(door) as client, trio.open_nursery() as nursery:

        async def send() -> None:
            try:
                await client.send_all(raw.text)
                if not raw.closes:
                    await client.send_eof()
            except trio.BrokenResourceError:
                pass

        nursery.start_soon(send)
        with trio.move_on_after(10) as patience:
            try:
                while some := await client.receive_some(65536):
                    answer += some
            except trio.BrokenResourceError:
                pass
        nursery.cancel_scope.cancel()
    return answer, not patience.cancelled_caught


async def test_texts_that_can_be_read_in_two_ways(papers: Papers, record_property: Told) -> None:
    """No request is hidden in another, however lengths, chunks, lines and headers are spelled."""
    wrong = []
    async with fortress(papers) as fort:
        before, limiter = fort.descriptors(), trio.CapacityLimiter(AT_ONCE)

        async def attack(door: str, raw: Raw) -> None:
            async with limiter:
                answer, ended = await exchanged(fort, door, raw)
            statuses = re.findall(rb"HTTP/1\.1 (\d+)", answer)
            if len(statuses) > raw.answers or not ended or b"smuggled" in answer:
                wrong.append((door, raw.name, statuses, ended))

        for door in WEB:
            async with trio.open_nursery() as nursery:
                for raw in RAW:
                    nursery.start_soon(attack, door, raw)
        assert not wrong
        await fort.holds(before)
        assert "smuggled" not in {event.event for event in fort.sink.events}
        record_property("told", f"{len(WEB) * len(RAW)} requests, {fort.memory() // MIB} MiB")


async def test_bodies_that_are_bombs(papers: Papers, record_property: Told) -> None:
    """What unpacks a thousandfold or nests without end is refused; a good event beside it is taken."""
    wrong = []
    async with fortress(papers) as fort:
        before, limiter = fort.descriptors(), trio.CapacityLimiter(4)

        async def attack(client: httpx.AsyncClient, body: Body) -> None:
            headers = {"content-encoding": body.encoding} if body.encoding else {}
            async with limiter:
                url = f"{fort.url('http')}{body.path}"
                answer = await client.post(url, content=body.body, headers=headers)
            if answer.status_code not in body.statuses:
                wrong.append((body.name, answer.status_code, answer.text[:200]))

        async with httpx.AsyncClient(timeout=60) as client, trio.open_nursery() as nursery:
            for body in BODIES:
                nursery.start_soon(attack, client, body)
        assert not wrong
        await fort.holds(before)
        record_property("told", f"{len(BODIES)} bodies, {fort.memory() // MIB} MiB")


async def drip(fort: Fortress, slow: Slow, opened: Callable[[], None]) -> None:
    """One slow client, until cancelled or shown out."""
    async with await fort.connect(slow.door) as client:
        opened()
        try:
            await client.send_all(slow.begins)
            while True:
                await trio.sleep(1)
                await client.send_all(slow.drips)
        except trio.BrokenResourceError:
            return


@pytest.mark.parametrize(
    ("times", "seconds"), [(1, 1), pytest.param(20, 100, marks=LONG)], ids=["short", "long"]
)
async def test_slow_clients(papers: Papers, times: int, seconds: int, record_property: Told) -> None:
    """A byte a second in a line, a handshake, a header, a body, a chunk: meanwhile all others are served."""
    async with fortress(papers) as fort:
        before = fort.descriptors()
        opened: list[Slow] = []
        async with trio.open_nursery() as nursery:
            for slow in SLOW * times:
                nursery.start_soon(drip, fort, slow, partial(opened.append, slow))
            await fort.serves_for(seconds)
            nursery.cancel_scope.cancel()
        await fort.holds(before)
        record_property("told", f"{len(opened)} for {seconds} s, {fort.memory() // MIB} MiB")


@pytest.mark.parametrize(
    ("times", "seconds"), [(1, 2), pytest.param(8, 60, marks=LONG)], ids=["short", "long"]
)
async def test_clients_that_never_read(
    papers: Papers, times: int, seconds: int, record_property: Told
) -> None:
    """Of acknowledgements, refusals, pages and events as they pass: who reads is told all the same."""
    async with fortress(papers) as fort:
        before, sent = fort.descriptors(), []

        async def ask(door: str, text: bytes) -> None:
            connecting = fort.agreed() if door == "tls" else fort.connect(door)
            async with await connecting as client:
                try:
                    await client.send_all(ASK if door in STREAMS else b"")
                    while True:
                        await client.send_all(text * (UNREAD_BYTES // len(text)))
                        sent.append(door)
                        await trio.sleep(0.1)
                except trio.BrokenResourceError:
                    return

        async with trio.open_nursery() as nursery:
            for door, text in UNREAD * times:
                nursery.start_soon(ask, door, text)
            await fort.serves_for(seconds)
            nursery.cancel_scope.cancel()
        books = await fort.holds(before)
        told = f"{len(UNREAD) * times} clients for {seconds} s, {books['rejected']} lines refused"
        record_property("told", f"{told}, {fort.memory() // MIB} MiB")


# What is sent a thousand times: the cheapest of each kind to refuse.
BOMBS = (
    "gzip that no header tells",
    "gzip of many members",
    "deep properties",
    "deep objects",
    "deep in a batch",
)
# A thousandth of what a thousand leaks of one body would be; the allocator's own coming and going.
GROWTH_BYTES = 4 * MIB

# As many clients as a source serves at once, each of which holds half a line or half a request.
CROWDS = (
    ("unix_stream", b'{"event":"' + b"x" * 15_000),
    ("json", b'{"event":"' + b"x" * 15_000),
    ("syslog", b"900000 <13>1 - host app " + b"x" * 15_000),
    ("logfmt", b'event="' + b"x" * 15_000),
    ("tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)),
    ("http", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 15_000),
    ("http", b"POST /batch/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b" " * 15_000),
    ("pages", b"GET /"),
)


async def test_who_holds_the_pages(papers: Papers, record_property: Told) -> None:
    """Hundreds who come and say nothing: a probe is answered before it gives up (Kubernetes' at 5 s)."""
    async with fortress(papers) as fort, AsyncExitStack() as stack:
        before = fort.descriptors()
        for _ in range(300):
            await stack.enter_async_context(await fort.connect("pages"))
        begun = trio.current_time()
        async with httpx.AsyncClient(timeout=5) as client:
            for _ in range(5):
                assert (await client.get(f"{fort.url('pages')}/livez", headers=CLOSE)).status_code == 200
        record_property("told", f"five probes in {trio.current_time() - begun:.1f} s")
        await stack.aclose()
        await fort.holds(before)


# Connects as often as it is told, says what it reads, and is then stopped, as a computer is that is cut off.
PEER = """
import os, resource, signal, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
family, where, count = int(sys.argv[1]), eval(sys.argv[2]), int(sys.argv[3])
text = sys.stdin.buffer.read()
kept = []
for _ in range(count):
    kept.append(socket.socket(family))
    kept[-1].settimeout(10)
    kept[-1].connect(where)
    kept[-1].setblocking(False)
    try:
        kept[-1].send(text)
    except OSError:
        pass
os.write(1, b"there")
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=LONG)], ids=["short", "long"])
async def test_a_thousand_half_open_clients(papers: Papers, count: int, record_property: Told) -> None:
    """All at once, and stopped in the middle of what they said: clients that were there before are served."""
    async with fortress(papers) as fort, AsyncExitStack() as stack:
        before = fort.descriptors()

        async def crowd(door: str, text: bytes) -> None:
            where = fort.doors[door]
            family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET
            peer = await trio.lowlevel.open_process(
                [sys.executable, "-Sc", PEER, str(int(family)), repr(where), str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            await stack.enter_async_context(ended(peer))
            assert peer.stdin is not None
            assert peer.stdout is not None
            async with peer.stdin as told:
                await told.send_all(text)
            assert await peer.stdout.receive_some(5) == b"there"

        async with trio.open_nursery() as nursery:
            for door, text in CROWDS:
                nursery.start_soon(crowd, door, text)
        with trio.fail_after(30):
            while fort.descriptors() < before + 4 * count:
                await trio.sleep(0.05)
        connected, at_worst = fort.descriptors() - before, fort.memory("VmRSS")
        if count < 1000:
            await fort.serves(100)
        await stack.aclose()
        await fort.holds(before)
        figures = f"{connected} connections, {at_worst // MIB} MiB with them, {fort.memory() // MIB} at worst"
        record_property("told", figures)


async def crowd(*arguments: str, text: str = "") -> str:
    """What a client in a process of its own says."""
    command = [sys.executable, "-S", str(Path(__file__).with_name("crowd.py")), *arguments]
    done = await trio.run_process(command, stdin=text.encode(), capture_stdout=True)
    return done.stdout.decode()


class Flood(NamedTuple):
    """What is flooded and how, and where and how the good client comes."""

    door: str
    way: str
    beside: str = "unix_stream"
    good: str = "stream"
    connections: int = 1


# Another user's, by the same source where that is not one of datagrams. HTTP is met with what is no HTTP, and
# with requests whose bodies are the garbage; TLS with what is no TLS, and with garbage in it. By many
# connections at once a user has no more than by one.
BY_DOOR = {
    "unix_stream": Flood("unix_stream", "stream"),
    "20 unix_streams": Flood("unix_stream", "stream", connections=20),
    "unix_datagram": Flood("unix_datagram", "datagram"),
    "udp": Flood("udp", "datagram"),
    "tcp": Flood("json", "stream", "json"),
    "20 tcp": Flood("json", "stream", "json", connections=20),
    "tls": Flood("tls", "tls", "tls", "tls"),
    "20 tls": Flood("tls", "tls", "tls", "tls", connections=20),
    "no tls": Flood("tls", "stream", "tls", "tls"),
    "http": Flood("http", "http", "http", "http"),
    "no http": Flood("http", "stream", "http", "http"),
}
# The kernels of both ends hold megabytes of each TCP client that has gone: of lines of a byte they are work
# for half an hour, which is not waited for.
LINGERING = ("20 tcp", "20 tls")
# 99 of 100 events of 5,000 a second wait so long at most; tried so often, as others work on this host too.
P99_MS, TRIES = 100, 3
# And in the short form, which tells a queue that is not fair (7 s and more) from a host that is busy.
BUSY_MS = 1500


# Who comes again and again, twenty at a time: a signature is a millisecond of everybody's time.
CALLS = {
    "handshakes": Flood("tls", "calls", "tls", "tls", connections=20),
    "wrong handshakes": Flood("tls", "wrong calls", "tls", "tls", connections=20),
}


class Waits(NamedTuple):
    """Of a good client, in ms: for 99 of 100 events, and to be let in."""

    p99: float
    came: float


async def beside(fort: Fortress, ca: str, flood: Flood, texts: list[str], seconds: float) -> Waits:
    """What a good client waits while texts are poured in."""
    uid = "65534" if os.getuid() == 0 else "0"
    where = json.dumps(fort.doors[flood.door])
    async with trio.open_nursery() as nursery:
        pour = ["flood", flood.way, where, ca, str(seconds + 1), uid, str(flood.connections)]
        nursery.start_soon(partial(crowd, *pour, text=json.dumps(texts)))
        await trio.sleep(0.5)
        where = json.dumps(fort.doors[flood.beside])
        figures: dict[str, float] = json.loads(await crowd("good", flood.good, where, ca, str(seconds)))
    assert figures["accepted"] > 0  # and all that was sent, else it would not have ended
    return Waits(figures["p99"], figures["came"])


async def at_best(
    look: Callable[[], Awaitable[Waits]], wait: Callable[[Waits], float], bound: float
) -> Waits:
    """The least of some tries, until one is within the bound."""
    tries = [await look()]
    while min(map(wait, tries)) >= bound and len(tries) < TRIES:
        tries.append(await look())
    return min(tries, key=wait)


async def test_floods_beside_a_good_client(papers: Papers, record_property: Told) -> None:
    """Whatever another user pours into a source, who sends 5,000 events a second is served to the last."""
    texts = [text.decode("latin-1") for text in FLOODS.values()]
    told = []
    async with fortress(papers) as fort:
        before = fort.descriptors()
        for name in ("unix_stream", "unix_datagram", "http", "no http"):
            p99, _ = await beside(fort, papers.ca, BY_DOOR[name], texts, 1.5)
            assert p99 < BUSY_MS, name
            told.append(f"{name}: p99 {p99} ms")
        books = await fort.holds(before)
        told.append(f"{books['rejected']} lines refused, {fort.memory() // MIB} MiB")
        record_property("told", "; ".join(told))


@LONG
@pytest.mark.parametrize("name", BY_DOOR)
async def test_each_kind_of_flood(papers: Papers, name: str, record_property: Told) -> None:
    """One by one, each beside a good client whose acknowledgements come in 100 ms."""
    told = []
    slow = []
    async with fortress(papers) as fort:
        before = fort.descriptors()
        for kind, text in FLOODS.items():
            look = partial(beside, fort, papers.ca, BY_DOOR[name], [text.decode("latin-1")], 4)
            p99, _ = await at_best(look, itemgetter(0), P99_MS)
            told.append(f"{kind}: p99 {p99} ms")
            slow += [(kind, p99)] if p99 >= P99_MS else []
        if name in LINGERING:
            await fort.serves(10_000)
            books = (await fort.agent.status())["books"]
            assert books["balanced"]
            assert fort.memory() <= MEMORY_BOUND
        else:
            books = await fort.holds(before)
        told.append(f"{books['rejected']} lines refused, {fort.memory() // MIB} MiB")
        record_property("told", "; ".join(told))
    assert not slow


@pytest.mark.parametrize(
    ("seconds", "bound"), [(1.5, BUSY_MS), pytest.param(10, P99_MS, marks=LONG)], ids=["short", "long"]
)
async def test_floods_of_handshakes(
    papers: Papers, seconds: float, bound: float, record_property: Told
) -> None:
    """Whoever comes and goes in TLS all the time is not in the way of others who are there, or come."""
    told = []
    async with fortress(papers) as fort:
        before = fort.descriptors()
        for name, flood in CALLS.items():
            look = partial(beside, fort, papers.ca, flood, ["x" * 1000], seconds)
            p99, came = await at_best(look, max, bound)
            told.append(f"{name}: p99 {p99} ms, let in after {came} ms")
            assert max(p99, came) < bound, name
        await fort.holds(before)
        record_property("told", f"{'; '.join(told)}, {fort.memory() // MIB} MiB")


@pytest.mark.parametrize("times", [10, pytest.param(1000, marks=LONG)], ids=["short", "long"])
async def test_bombs_again_and_again(papers: Papers, times: int, record_property: Told) -> None:
    """One client that sends each kind of bomb a thousand times does not raise the memory with time."""
    kinds = [body for body in BODIES if body.name in BOMBS]
    assert len(kinds) == len(BOMBS)
    head = next(raw for raw in RAW if raw.name == "a large header")
    sizes = []
    async with fortress(papers) as fort:
        before = fort.descriptors()
        async with httpx.AsyncClient(timeout=60) as client:
            for _ in range(times):
                for body in kinds:
                    headers = {"content-encoding": body.encoding} if body.encoding else {}
                    url = f"{fort.url('http')}{body.path}"
                    answer = await client.post(url, content=body.body, headers=headers)
                    assert answer.status_code in body.statuses, (body.name, answer.status_code)
                await exchanged(fort, "http", head)
                sizes.append(fort.memory("VmRSS"))
        await fort.holds(before)
        early, late = max(sizes[times // 10 : times // 2]), max(sizes[times // 2 :])
        figures = f"{early / MIB:.1f} MiB in the first half, {late / MIB:.1f} in the second"
        record_property("told", f"{len(BOMBS) + 1} bombs, {times} times: {figures}")
        assert late <= early + GROWTH_BYTES
