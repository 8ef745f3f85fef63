"""A buffer and its ledger through one life: calls, kills between and within them, and starts."""

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import trio
import trio.testing
from ledger import LANES, MAX_AGE, STALE, Ledger, Put, Seen, event, packed
from test_buffer_contract import assert_balanced

from agent import config
from agent.buffer import DeadEvent, Kept, Lease, Limits
from agent.buffer.memory import open_memory
from agent.buffer.sqlite import open_sqlite
from agent.buffer.store import Store
from agent.clock import Clock
from agent.events import Chunk, Instant, Tally
from agent.metrics import Metrics

MIB = 2**20
KILLED = ("buffer.db", "buffer.db-wal")  # what a kill leaves, beside a lock that nobody holds
RESERVE = "buffer.db.reserve"  # so is this, but it holds nothing, and is moved
ALL = 2**60

Call = Callable[[], Awaitable[None]]
Image = tuple[bytes, ...]


class Way(NamedTuple):
    """How a buffer is set up; a `tight` one has room for about a dozen chunks."""

    kind: Literal["sqlite", "memory"]
    when_full: Literal["block", "drop_oldest", "drop_newest"] = "block"
    max_age: float = 0.0
    tight: bool = True

    def __str__(self) -> str:
        room = "a dozen chunks" if self.tight else "an age" if self.max_age else "room"
        return f"{self.kind}, {room}, {self.when_full}"

    @property
    def sheds(self) -> str:
        """Why events may go unasked."""
        return "expired" if self.max_age else "full_oldest" if self.when_full == "drop_oldest" else ""

    @property
    def pad(self) -> int:
        """What makes events heavy, where there shall be no room for many."""
        return 6000 if self.tight else 0

    def settings(self, folder: Path) -> config.Buffer:
        """Of a file in this folder. What is beside the data takes 9 MiB of every bound."""
        size = 16 * MIB
        if self.tight:
            size = 200_000 if self.kind == "memory" else 9 * MIB + 512 * 1024
        return config.Buffer(
            kind=self.kind,
            path=str(folder / "buffer.db"),
            max_size=size,
            when_full=self.when_full,
            max_age=self.max_age,
            durability="normal",
        )


class Lived:
    """One buffer, its ledger, and the calls in flight, in trio's thread."""

    def __init__(self, nursery: trio.Nursery, way: Way, template: Path, figures: Counter[str]) -> None:
        self.nursery = nursery
        self.way = way
        self.figures = figures
        self.ledger = Ledger(way.sheds, drops_newest=way.when_full == "drop_newest", pad=way.pad)
        self.leases: list[Lease] = []  # all of this process's, also those that have ended
        self._root = Path(tempfile.mkdtemp(dir=template.parent))
        self._folders = (self._root / str(number) for number in count())
        self._events = count()
        self.cut: int | None = None  # before which of its statements the next call is killed
        self._folder = next(self._folders)
        shutil.copytree(template, self._folder)

    @property
    def durable(self) -> bool:
        return self.way.kind == "sqlite"

    async def open(self) -> None:
        """A process begins."""
        self._stop, self._stopped = trio.Event(), trio.Event()
        self.buffer: Kept = await self.nursery.start(self._live)
        self.leases = []
        if self.durable:
            await self._errand(_spill)

    async def _live(self, *, task_status: trio.TaskStatus[Kept]) -> None:
        chosen = self.way.settings(self._folder)
        opening: Any = open_sqlite(chosen, Metrics()) if self.durable else open_memory(chosen)
        async with opening as buffer:
            task_status.started(buffer)
            await self._stop.wait()
        self._stopped.set()

    async def _errand(self, work: Callable[[Store], Any]) -> None:
        """Something with the store, between its transactions."""
        await self.buffer._run(work)  # type: ignore[attr-defined]

    async def close(self) -> None:
        """As a stop does."""
        self._stop.set()
        await self._stopped.wait()
        await trio.testing.wait_all_tasks_blocked()

    async def end(self) -> None:
        """The life is over."""
        for put in self.ledger.puts:
            put.scope.cancel()
        await self.close()
        shutil.rmtree(self._root)
        self.figures["lives"] += 1
        self.figures["events acknowledged"] += len(self.ledger.where)
        self.figures["shed"] += len(self.ledger.at("shed"))

    # --- a step --------------------------------------------------------------------------------------

    async def do(self, *calls: Call) -> None:
        """Make calls at one moment and see what comes of it, or be killed in their middle."""
        self.figures["steps"] += 1
        before, spared = self.ledger.copy(), self.ledger.leased_ids
        images = await self._arm()
        for call in calls:
            self.nursery.start_soon(call)
        await self._quiet()
        if images and self.cut is not None:
            await self._trace(None)
            self.figures["of them within a call"] += 1
            cut, self.cut = self.cut, None
            await self._kill(images[cut % len(images)], before)
            return
        seen = await self.see()
        self.ledger.agree(seen, spared | self.ledger.leased_ids)
        self.ledger.agree_with(seen.stats)
        assert_balanced(self.buffer)

    async def _quiet(self) -> None:
        """Until all calls have returned but those that wait for room."""
        for _ in range(2):
            await trio.lowlevel.checkpoint()
            await self.buffer.answer()
            await trio.testing.wait_all_tasks_blocked()

    async def see(self) -> Seen:
        """What the buffer shows, at one moment: it is looked at again where that changed it."""
        while True:
            books = self.buffer.books()
            rows = dict(await self.buffer.beyond(0, ALL, ALL))
            letters = {letter.id: letter for letter in await self.buffer.letters(0, 10**6)}
            await trio.testing.wait_all_tasks_blocked()
            if self.buffer.books() == books:
                return Seen(rows, letters, books, self.buffer.stats())

    # --- being killed --------------------------------------------------------------------------------

    async def _arm(self) -> list[Image]:
        """Have the files looked at before each of the next statements, where that is due."""
        images: list[Image] = []
        if self.cut is not None and self.durable:
            folder = self._folder
            await self._trace(lambda _statement: images.append(_image(folder)))
        return images

    async def _trace(self, look: Callable[[str], object] | None) -> None:
        await self._errand(lambda store: store._connection.set_trace_callback(look))

    async def _kill(self, image: Image, before: Ledger) -> None:
        """Nothing of this process goes on, and the next begins on what it left.

        Its last call had not returned: all of it is there, or nothing.
        """
        self.figures["kills"] += 1
        for put in self.ledger.puts:
            put.scope.cancel()
        after = self.ledger.copy()
        spared = before.leased_ids | after.leased_ids
        await self.close()
        left, self._folder = self._folder, next(self._folders)
        self._folder.mkdir()
        (left / RESERVE).rename(self._folder / RESERVE)
        for name, data in zip(KILLED, image, strict=False):
            (self._folder / name).write_bytes(data)
        shutil.rmtree(left)
        await self.open()
        assert not list(self._folder.glob("*damaged*")), "a kill is no damage"
        seen = await self.see()
        without_puts = after.copy()
        without_puts.puts.clear()
        before.puts.clear()
        for self.ledger in (before, without_puts):
            with suppress(AssertionError):
                self.ledger.agree(seen, spared)
                break
        else:
            self.ledger = after
            self.ledger.agree(seen, spared)
        self.ledger.died()
        self.ledger.agree_with(seen.stats)
        assert_balanced(self.buffer)

    async def kill(self) -> None:
        """Between two calls."""
        if self.durable:
            images: list[Image] = []
            await self._errand(lambda _store: images.append(_image(self._folder)))
            await self._kill(images[0], self.ledger.copy())

    async def reopen(self) -> None:
        """A stop and a start; what waits for room is given up."""
        if self.durable:
            spared = self.ledger.leased_ids
            await self.close()
            await self.open()
            seen = await self.see()
            self.ledger.agree(seen, spared)
            self.ledger.died()
            self.ledger.agree_with(seen.stats)

    # --- calls ---------------------------------------------------------------------------------------

    def put(self, given: Sequence[tuple[int, int, bool]], *, cancelled: bool) -> Call:
        """Chunks, each of a lane and of so many events, some of them too old."""
        chunks = [self._chunk(*one) for one in given]
        put = Put(chunks)
        self.ledger.puts.append(put)

        async def call() -> None:
            with put.scope:
                if cancelled:
                    put.scope.cancel()
                tally = Tally(source="app", received=sum(one.events for one in chunks))
                put.taken = await self.buffer.put(chunks, tally)
            put.over = True

        return call

    def _chunk(self, lane: int, events: int, stale: bool) -> Chunk:
        project, key = LANES[lane]
        number = next(self._events)
        stamped = CAME[number % len(CAME)](number)
        if stale and self.way.max_age:
            stamped = Instant(NOW - int(2 * MAX_AGE * 1_000_000) + number, number, STALE)
        return msgspec.convert(
            {
                "project": project,
                "key": key,
                "received_at": stamped.wall,
                "boot": stamped.boot,
                "monotonic": stamped.monotonic,
                **packed([number, *(next(self._events) for _ in range(events - 1))], self.way.pad),
            },
            Chunk,
        )

    def take(self, limits: Limits, project: str, without: frozenset[str | None], *, cancelled: bool) -> Call:
        async def call() -> None:
            with trio.CancelScope() as scope:
                if cancelled:
                    scope.cancel()
                lease = await self.buffer.take(limits, project, without)
                self.ledger.took(lease, limits, project, without)
                self.leases += [lease] if lease is not None else []
            if scope.cancelled_caught:
                self.ledger.tried |= set(self.ledger.rows)

        return call

    def settle(self, which: int, fates: Sequence[str], *, cancelled: bool) -> Call:
        """A lease that is out; done also where the caller was cancelled."""
        live = [lease for lease in self.leases if lease in self.ledger.leases]
        if not live:
            return self.nothing
        lease = live[which % len(live)]
        dead: list[DeadEvent] = []
        rest: list[Chunk] = []
        damaged: set[int] = set()
        for number, one in enumerate(lease.chunks):
            fate = fates[number % len(fates)]
            numbers = self.ledger.numbers(one)
            if fate == "dead":
                dead += [self._dead(lease, one, event) for event in numbers]
            elif fate == "kept":
                rest.append(one)
            elif fate == "damaged":
                damaged |= set(numbers)
            elif fate == "split":  # the first was delivered
                dead += [self._dead(lease, one, event) for event in numbers[1:2]]
                if numbers[2:]:
                    rest.append(msgspec.structs.replace(one, **packed(numbers[2:], self.way.pad)))
        buried = {int(one.event[9:41], 16): one.reason for one in dead}
        kept = {number for one in rest for number in self.ledger.numbers(one)}

        async def call() -> None:
            with trio.CancelScope() as scope:
                if cancelled:
                    scope.cancel()
                await self.buffer.settle(lease, dead, rest, damaged=len(damaged))
            self.ledger.settled(lease, buried, kept, damaged)

        return call

    def _dead(self, lease: Lease, one: Chunk, number: int) -> DeadEvent:
        return DeadEvent(
            project=lease.project,
            key=lease.key,
            event=event(number, self.way.pad),
            reason="rejected",
            detail="no",
            at=NOW,
            received_at=one.received_at,
            boot=one.boot,
            monotonic=one.monotonic,
            burials=one.burials,
        )

    def release(self, which: int) -> Call:
        """Any lease that ever was."""
        if not self.leases:
            return self.nothing
        lease = self.leases[which % len(self.leases)]

        async def call() -> None:
            await self.buffer.release(lease)
            self.ledger.released(lease)

        return call

    def give_up(self, which: int) -> Call:
        """The caller of a put that waits goes away."""

        async def call() -> None:
            if self.ledger.puts:
                self.ledger.puts[which % len(self.ledger.puts)].scope.cancel()

        return call

    def replay(self, places: Sequence[int]) -> Call:
        """Some letters, some of which are not there."""
        ids = self._letters(places)

        async def call() -> None:
            replayed = await self.buffer.replay(ids)
            there = [self.ledger.letters[ident] for ident in ids if ident in self.ledger.letters]
            assert replayed.full or replayed.letters == len(there)
            self.ledger.left(there[: replayed.letters], "replayed", "waiting")

        return call

    def purge(self, places: Sequence[int]) -> Call:
        ids = self._letters(places)

        async def call() -> None:
            there = [self.ledger.letters[ident] for ident in ids if ident in self.ledger.letters]
            assert await self.buffer.purge(ids) == len(there)
            self.ledger.left(there, "purged", "forgotten")

        return call

    def _letters(self, places: Sequence[int]) -> list[int]:
        known = [*self.ledger.letters, 10**6]
        return list(dict.fromkeys(known[place % len(known)] for place in places))

    async def nothing(self) -> None:
        """There is nothing to do it with."""


_, UP, BOOT = Clock().now()
NOW = time.time_ns() // 1000

# When chunks came that nobody may take for too old.
CAME: tuple[Callable[[int], Instant], ...] = (
    lambda number: Instant(NOW + number, number, "another"),
    lambda number: Instant(number, UP + number, BOOT),  # the clock was set since, in the same boot
    lambda number: Instant(number, number, "never set"),
)


def _image(folder: Path) -> Image:
    """The files as they are at this moment."""
    return tuple(path.read_bytes() for name in KILLED if (path := folder / name).exists())


def _spill(store: Store) -> None:
    """Have little room for what is not committed, so that it is in the log before it is."""
    store._connection.execute("PRAGMA cache_size = 2")
