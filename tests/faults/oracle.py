"""Holds an agent that is killed all the time to its word: clients note what it promised, a sink what came.

An acknowledged event is owed. Each event has a number, so that it is known again whatever its uuid; each life
of the agent sends a header of its own, so that it is known which life delivered what.
"""

import json
import shutil
import socket
import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random, SystemRandom
from typing import Any, NamedTuple

import httpx
import msgspec
import trio
from processes import Running, started

from agent.crash import VARIABLE
from agent.deliver.worker import COMPANY
from agent.events import SHED_AT_THE_DOOR
from agent.sink import Event, Fault, Reply, Request, Sink, serving

ASK = b'{"ack":true}\n'
HEADER = "x-life"
# What may be under way at a kill: so many requests of so many events, more of them after a lot was refused.
CONCURRENCY, BATCH = 4, 100
IN_FLIGHT = CONCURRENCY * BATCH * COMPANY
PORTAL = Reply(200, b"<!DOCTYPE html><title>Log in</title>", {"content-type": "text/html"})
CUT_OFF = Reply(200, b'{"status"', {"content-length": "100"})
PATIENCE = 120.0
MAGIC = b"SQLite format 3\0"

# What the sink does instead of what it should, in how many of a thousand requests: before it takes anything,
# and when it has taken the events.
BEFORE: Sequence[tuple[int, Reply | Fault]] = (
    (40, Reply(503, b"", {"retry-after": "0"})),
    (5, Reply(503, b"", {"retry-after": "1"})),
    (30, Reply(429, b"", {"retry-after": "0"})),
    (50, Reply(500)),
    (40, Fault.HANG_UP),
    (10, Fault.STALL),
    (15, Reply(413)),
    (20, Reply(400, b"no reason")),
    (30, PORTAL),
)
AFTERWARDS: Sequence[tuple[int, Reply | Fault]] = (
    (40, Reply(200, b"this is no JSON")),
    (40, CUT_OFF),
    (40, Fault.HANG_UP),
    (10, Fault.STALL),
    (40, Reply(500)),
    (30, Reply(429, b"", {"retry-after": "0"})),
    (30, PORTAL),
    (10, Reply(413)),
)
LATE = 50
# What holds deliveries up, or has them go by a few events at a time, for longer than most lives last.
LONG = (PORTAL, Fault.STALL, Reply(413))


class Liar(Sink):
    """A sink that fails, stalls, hangs up, and hides what it has taken; `lied` has the requests of that kind.

    `away`: it takes nothing; `brisk`: it does nothing that takes long; `well`: it does all that it should.
    """

    def __init__(self, random: Random, nursery: trio.Nursery, *, brisk: bool) -> None:
        super().__init__(keep=10**6, reject_if=("poison", "yes"), retry_rate=0.01, script=self._whim)
        self.away = self.well = False
        self.lied: set[int] = set()
        self._chance = random
        self._brisk = brisk
        self._nursery = nursery

    def be_well(self) -> None:
        """From now on it takes everything and says so."""
        self.well, self.away, self._reject_if, self._retry_rate = True, False, None, 0.0

    def _whim(self, request: Request) -> Reply | Fault | trio.Event | None:
        if self.away:
            return Reply(503)
        if self.well:
            return None
        if self._chance.randrange(1000) < LATE:
            late = trio.Event()
            self._nursery.start_soon(_set_later, late, self._chance.uniform(0.05, 0.5))
            return late
        return self._drawn(BEFORE)

    def _judge(self, request: Request) -> Reply | Fault:  # type: ignore[override]  # a fault is an answer too
        reply = super()._judge(request)
        whim = None if self.well or reply.status != 200 else self._drawn(AFTERWARDS)
        if whim is None:
            return reply
        # By v1 the answer's text says what was taken.
        if isinstance(whim, Fault) or whim.status != 200 or whim is PORTAL or "/v1/" in request.path:
            self.lied.add(request.number)
        return whim

    def _drawn(self, whims: Sequence[tuple[int, Reply | Fault]]) -> Reply | Fault | None:
        """One of them, or mostly none."""
        draw = self._chance.randrange(1000)
        for share, whim in whims:
            draw -= share
            if draw < 0:
                return None if self._brisk and whim in LONG else whim
        return None


class Judgement(NamedTuple):
    """What was found, when all is said and done."""

    owed: int
    lied: int  # came again as the sink had taken them and not said so
    doubled: int  # came again as they were in flight at a kill

    def __str__(self) -> str:
        return (
            f"{self.owed} acknowledged, none lost; {self.doubled} came again that were in flight at a kill, "
            f"{self.lied} others as the server had hidden that it took them"
        )


class Ledger:
    """What clients were told, and what the sink was sent."""

    def __init__(self) -> None:
        self.sent = 0
        self.owed: set[int] = set()
        self.given: dict[int, str] = {}
        self.acknowledgements = 0
        self.replayed = 0

    def make(self, random: Random, pad: int, poison: float) -> dict[str, Any]:
        """A new event, often with a uuid of its own."""
        self.sent += 1
        event: dict[str, Any] = {"event": "e", "distinct_id": "d", "properties": {"n": self.sent}}
        if random.random() < 0.5:
            text = f"{random.getrandbits(128):032x}"
            event["uuid"] = f"{text[:8]}-{text[8:12]}-4{text[13:16]}-a{text[17:20]}-{text[20:]}"
            self.given[self.sent] = event["uuid"]
        if pad:
            event["properties"]["pad"] = random.randbytes(random.randrange(pad)).hex()
        if random.random() < poison:
            event["properties"]["poison"] = "yes"
        return event

    def owe(self, numbers: Sequence[int]) -> None:
        """These were acknowledged."""
        self.acknowledgements += 1
        self.owed.update(numbers)


class Client:
    """Sends all the time, connects again when it is cut off, never sends twice, and notes its promises."""

    def __init__(self, ledger: Ledger, random: Random, pad: int, poison: float) -> None:
        self._ledger = ledger
        self._random = random
        self._pad = pad
        self._poison = poison

    def event(self) -> dict[str, Any]:
        """The next one."""
        return self._ledger.make(self._random, self._pad, self._poison)

    async def pause(self) -> None:
        """As real ones."""
        await trio.sleep(self._random.uniform(0.005, 0.06))


class StreamClient(Client):
    """Lines, of which some are no events; the totals that are told say which of them are owed."""

    async def run(self, connect: Callable[[], Awaitable[trio.SocketStream]]) -> None:
        """One connection after the other."""
        while True:
            try:
                stream = await connect()
            except OSError:
                await trio.sleep(0.02)
                continue
            lines: list[int | None] = []
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._send, stream, lines)
                await self._hear(stream, lines)
                nursery.cancel_scope.cancel()

    async def _send(self, stream: trio.SocketStream, lines: list[int | None]) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(ASK)
            while True:
                text = b""
                for _ in range(self._random.randrange(1, 30)):
                    if self._random.random() < 0.01:
                        lines.append(None)
                        text += b'{"event": 7}\n'
                        continue
                    event = self.event()
                    lines.append(event["properties"]["n"])
                    text += msgspec.json.encode(event) + b"\n"
                await stream.send_all(text)
                await self.pause()

    async def _hear(self, stream: trio.SocketStream, lines: Sequence[int | None]) -> None:
        """Until the connection ends; what was told before counts."""
        refused: set[int] = set()
        settled = 0
        text = b""
        with suppress(trio.BrokenResourceError):
            async for some in stream:
                *told, text = (text + some).split(b"\n")
                for one in map(json.loads, told):
                    if "line" in one:
                        refused.add(one["line"])
                        continue
                    assert one["rejected"] == sum(line <= sum(one.values()) for line in refused)
                    before, settled = settled, sum(one.values())
                    good = [lines[at] for at in range(before, settled) if at + 1 not in refused]
                    self._ledger.owe([number for number in good if number is not None])


class BatchClient(Client):
    """Batches over HTTP; a 200 is a promise for each of its good events."""

    async def run(self, url: str) -> None:
        """One request after the other."""
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            while True:
                some = [self.event() for _ in range(self._random.randrange(1, 30))]
                bad = [{"event": "e"}] if self._random.random() < 0.1 else []
                try:
                    answer = await client.post(url, json={"api_key": "phc_test", "batch": [*some, *bad]})
                except httpx.TransportError:
                    await trio.sleep(0.02)
                    continue
                if answer.status_code == 200:
                    self._ledger.owe([event["properties"]["n"] for event in some])
                else:
                    assert answer.status_code == 503, answer.text
                await self.pause()


class Trial:
    """One buffer, the agents that live and die on it, their clients and their sink."""

    def __init__(
        self,
        folder: Path,
        random: Random,
        *,
        buffer: str = 'max_size = "64 MiB"',
        protocol: str = "batch",
        pad: int = 100,
        brisk: bool = True,
    ) -> None:
        self.folder = folder
        self.ledger = Ledger()
        self.random = random
        self.lives = 0
        self.kills = 0
        self._pad = pad
        self._brisk = brisk
        self._protocol = protocol
        self._buffer = buffer
        self._port, self._http_port = _free_ports(2)
        self._url = ""

    @property
    def database(self) -> Path:
        """The buffer's file."""
        return self.folder / "buffer.db"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Its sink, for a block."""
        async with trio.open_nursery() as nursery:
            self.sink = Liar(self.random, nursery, brisk=self._brisk)
            async with serving(self.sink) as self._url:
                yield
            nursery.cancel_scope.cancel()

    # --- the agent -------------------------------------------------------------------------------

    def configure(self) -> Path:
        """The configuration of the next life."""
        self.lives += 1
        file = self.folder / "config.toml"
        file.write_text(
            f"""
            [project]
            host = "{self._url}"
            api_key = "phc_test"
            [[source]]
            kind = "unix_stream"
            path = "{self.folder}/events.sock"
            [[source]]
            kind = "tcp"
            listen = "127.0.0.1:{self._port}"
            [[source]]
            kind = "http"
            listen = "127.0.0.1:{self._http_port}"
            [admin]
            socket = "{self.folder}/admin.sock"
            listen = ""
            [delivery]
            protocol = "{self._protocol}"
            linger = "20 ms"
            backoff_base = "20 ms"
            backoff_max = "200 ms"
            cooldown = "1 s"
            timeout = "20 s"
            concurrency = {CONCURRENCY}
            max_batch_events = {BATCH}
            headers = {{ "{HEADER}" = "{self.lives}" }}
            [buffer]
            path = "{self.database}"
            {self._buffer}
            """
        )
        return file

    @asynccontextmanager
    async def living(self, crash: str = "") -> AsyncIterator[Running]:
        """An agent, which may not be ready yet, for a block; to `crash` at a point if that is said."""
        env = {VARIABLE: crash} if crash else None
        async with started(self.configure(), env=env) as agent:
            yield agent

    async def until(self, agent: Running, condition: Callable[[], bool]) -> None:
        """Wait for it as long as the agent lives."""
        with trio.fail_after(PATIENCE):
            while not condition() and agent.process.poll() is None:
                await trio.sleep(0.005)

    async def until_promised(self, agent: Running, times: int = 1) -> None:
        """Clients of this life were told that something is on disk."""
        wanted = self.ledger.acknowledgements + times
        await self.until(agent, lambda: self.ledger.acknowledgements >= wanted)

    @asynccontextmanager
    async def sending(self, poison: float = 0.002) -> AsyncIterator[None]:
        """Clients of every source that acknowledges, for a block."""
        one, two, three = (Random(self.random.getrandbits(64)) for _ in range(3))
        async with trio.open_nursery() as nursery:
            unix = StreamClient(self.ledger, one, self._pad, poison)
            nursery.start_soon(unix.run, partial(trio.open_unix_socket, str(self.folder / "events.sock")))
            tcp = StreamClient(self.ledger, two, self._pad, poison)
            nursery.start_soon(tcp.run, partial(trio.open_tcp_stream, "127.0.0.1", self._port))
            http = BatchClient(self.ledger, three, self._pad, poison)
            nursery.start_soon(http.run, f"http://127.0.0.1:{self._http_port}/batch")
            yield
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[httpx.AsyncClient]:
        """Somebody at the admin socket."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.folder / "admin.sock"))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://agent", timeout=PATIENCE
        ) as client:
            yield client

    async def replay(self) -> int:
        """Have all dead letters sent again, as far as one request goes; how many there are."""
        async with self.asking() as client:
            page = (await client.get("/dead-letters")).json()
            ids = [letter["id"] for letter in page["letters"]]
            if ids:
                answer = (await client.post("/dead-letters/replay", json={"ids": ids})).json()
                self.ledger.replayed += answer["done"]
            return int(page["kept"])

    # --- the judgement ---------------------------------------------------------------------------

    def look(self) -> None:
        """The books balance in the file as the kill left it."""
        self.kills += 1
        if not self.database.exists() or Path(f"{self.database}.new").exists():
            return  # a rescue that was cut off: the next start goes on with it
        with self.database.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return  # the next start says of it that it is damaged, and counts what is lost
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for end in ("", "-wal", "-wal.kept"):
                with suppress(FileNotFoundError):
                    shutil.copy(f"{self.database}{end}", f"{folder}/buffer.db{end.removesuffix('.kept')}")
            database = sqlite3.connect(f"{folder}/buffer.db")
            try:
                _balanced(database)
            finally:
                database.close()

    async def end(self, *, shed: bool = False) -> Judgement:
        """The sink is well: all is delivered, and replayed, and then it is judged."""
        self.sink.be_well()
        async with self.living() as agent:
            with trio.fail_after(PATIENCE):
                while True:
                    assert agent.process.poll() is None, agent.log()
                    with suppress(httpx.TransportError):
                        status = await agent.status()
                        assert status["books"]["balanced"], status["books"]
                        if not await self.replay() and not (await agent.status())["books"]["buffered"]:
                            break
                    await trio.sleep(0.05)
            books = (await agent.status())["books"]
            agent.process.terminate()
            assert await agent.process.wait() == 0
        assert books["balanced"]
        assert books["accepted"] >= len(self.ledger.owed)
        assert books["replayed"] >= self.ledger.replayed
        if not shed:
            assert books["shed"] == {}
        return self._judged(sum(books["shed"].values()))

    def _judged(self, shed: int) -> Judgement:
        came: dict[int, list[Event]] = defaultdict(list)
        for event in self.sink.events:
            came[event.properties["n"]].append(event)
        assert len(self.ledger.owed - came.keys()) <= shed
        lied = 0
        doubled = Counter[int]()
        for number, events in came.items():
            assert 0 < number <= self.ledger.sent
            assert len({event.uuid for event in events}) == 1, "an event has changed its uuid"
            assert self.ledger.given.get(number, events[0].uuid) == events[0].uuid
            for first, second in pairwise(events):
                life = int(first.headers[HEADER])
                if first.request in self.sink.lied:
                    lied += 1
                else:
                    assert int(second.headers[HEADER]) != life, "delivered twice, and nothing had happened"
                    doubled[life] += 1
        assert all(count <= IN_FLIGHT for count in doubled.values()), doubled
        return Judgement(len(self.ledger.owed), lied, doubled.total())


def _free_ports(count: int) -> list[int]:
    """Ports that stay free between two lives: nobody is given them who asks for any, as other tests do."""
    found: list[socket.socket] = []
    while len(found) < count:
        with suppress(OSError):
            port = SystemRandom().randrange(20_000, 32_768)  # ip(7): Linux gives from 32768 on
            found.append(socket.create_server(("127.0.0.1", port)))
    ports = [sock.getsockname()[1] for sock in found]
    for sock in found:
        sock.close()
    return ports


async def _set_later(event: trio.Event, seconds: float) -> None:
    await trio.sleep(seconds)
    event.set()


def _balanced(database: sqlite3.Connection) -> None:
    """Both identities, and the count of dead letters, from the tables alone."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema")}
    if not {"books", "chunk", "dead"} <= tables:
        return  # a first start that was cut off
    books = Counter[str]()
    for joint, reason, total in database.execute("SELECT joint, reason, total FROM books"):
        at_the_door = joint == "shed" and reason in SHED_AT_THE_DOOR
        books["shed at the door" if at_the_door else joint] += total
    events = database.execute("SELECT ifnull(sum(events), 0) FROM chunk").fetchone()[0]
    letters = database.execute("SELECT count(*) FROM dead").fetchone()[0]
    assert books["received"] == books["accepted"] + books["rejected"] + books["shed at the door"], books
    assert books["accepted"] + books["replayed"] == (
        books["delivered"] + books["dead"] + books["shed"] + events
    ), (books, events)
    assert books["dead"] == books["replayed"] + books["purged"] + books["dead_evicted"] + letters, books
