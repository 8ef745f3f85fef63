"""The default buffer: a SQLite file whose every commit serves all who wait for one (group commit).

Callers queue what they want done; one task takes all of it and has it done in one transaction, in a worker
thread. So with `durability = "full"` a disk sync is paid once a group, not once a chunk, and a caller that is
cancelled leaves its group intact. Nobody else ever touches the connection.
"""

import sqlite3
import time
from collections.abc import AsyncIterator, Collection, Container, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from math import inf
from typing import IO

import structlog
import trio

from agent import config, crash
from agent.buffer import NOBODY, Books, BufferBroken, BufferBusy, Stats
from agent.buffer.desk import Asked, Desk, Group, ring
from agent.buffer.dropping import Dropping
from agent.buffer.failing import Failing
from agent.buffer.file import Damage, advice, disk_bytes, is_damage, is_full
from agent.buffer.rows import Settlement
from agent.buffer.store import Store
from agent.buffer.stray import Astray
from agent.buffer.surplus import Surplus
from agent.buffer.unreadable import unreadable_is_damage
from agent.buffer.waiting import Waiting
from agent.metrics import Metrics

log = structlog.get_logger("buffer")

# After a put found no room, or a write failed (a full or broken disk), the next try: soon, and cheap.
RETRY_SECONDS = 1.0
# Age is looked at this often, which is meant in hours or days; and whether the files still have their names.
LOOK_SECONDS = 1.0


class SqliteBuffer(Desk):
    """A `Buffer` and `DeadLetters` on disk. `trouble` says why the last write failed, empty if it did not."""

    def __init__(self, store: Store, settings: config.Buffer, metrics: Metrics) -> None:
        super().__init__(store)
        self._settings, self._metrics = settings, metrics
        self._limiter = trio.CapacityLimiter(1)
        self._retry_at = inf  # when what could not be done is tried again unasked, on trio's clock
        self._closing = False
        self._lost = False  # the file could not be mended, and is closed
        self._astray = False  # the files have lost their names, and cannot have them again yet
        self._rescued = False  # the file was damaged, and mended, just before
        self._waiting, self._surplus = Waiting(), Surplus()
        self._dropping = Dropping(settings.when_full, store.books)
        self._failing = Failing()
        self._copying = trio.Lock()  # one copy at a time: each takes as much of the disk as the buffer
        self._copy = trio.CancelScope()
        self.trouble = ""
        self._show()

    async def ready(
        self, project: str, events: int, linger: float, without: Container[str | None] = NOBODY
    ) -> Collection[str | None]:
        """See `Buffer.ready`."""
        return await self._waiting.ready(project, events, linger, without)

    def stats(self) -> Stats:
        """See `Buffer.stats`."""
        store = self._store
        return self._stats._replace(disk_bytes=disk_bytes(store.path), oldest=store.ages.came(store.first))

    def books(self) -> Books:
        """See `Buffer.books`."""
        return self._books.copy()

    def clocks(self) -> Mapping[str, int]:
        """See `Buffer.clocks`."""
        return self._store.notes.clocks

    def share_lock(self) -> int:
        """A descriptor by which the file stays ours when it is closed."""
        return self._store.ownership.share()

    def close_door(self) -> None:
        """From now on a put that finds no room is given up, counted as shed by the shutdown."""
        self._closing = True
        self._full = False
        self._bell.set()

    async def serve(self, until: trio.CancelScope) -> None:
        """Do what is asked, all of it at once, until cancelled by `until`; the one task that uses the store.

        `until` is shielded: whoever is cancelled may still settle or release what it has on lease.
        """
        with until:
            while True:
                with trio.move_on_at(self._due()):
                    await self._bell.wait()
                self._bell = trio.Event()
                if trio.current_time() >= self._retry_at:
                    self._full, self._retry_at = False, inf
                with trio.CancelScope(shield=True):  # what was taken off the queues is done
                    await self.serve_group()
                if pages := self._surplus.step(self._store.free_pages, trio.current_time()):
                    await self._in_thread(partial(self._store.give_back_pages, pages))

    def _due(self) -> float:
        """Until when to sleep, on trio's clock, when nobody asks for anything."""
        if self._retry_at < inf:
            return self._retry_at
        due = min(self._surplus.due(self._store.free_pages), self._dropping.due, self._failing.due)
        return min(due, trio.current_time() + LOOK_SECONDS)

    async def serve_group(self) -> None:
        """Do all that is asked at this moment, or as much as one transaction should hold."""
        group = self._next_group()
        await self._in_thread(partial(self._work, group, closing=self._closing))
        if group.damage:
            self._takings = [asked for asked in group.takings if asked.what.lease is None] + self._takings
            group.takings = [asked for asked in group.takings if asked.what.lease is not None]
            self._errands = [asked for asked in group.errands if not asked.what.done] + self._errands
            group.errands = [asked for asked in group.errands if asked.what.done]
            self._bell.set()
        elif group.deposits or group.settlements or group.unserved or group.astray or self._astray:
            self.trouble = group.error
            self._astray = group.astray
            self._metrics.commit_seconds.observe(group.seconds)
        if group.settled:
            ring(group.settlements)
        else:
            self._settlements = group.settlements + self._settlements
        crash.point("put.shown")
        ring(asked for asked in group.deposits if asked.what.taken is not None or asked.abandoned)
        waiting = [asked for asked in group.deposits if asked.what.taken is None and not asked.abandoned]
        full = any(asked.what.chunks for asked in waiting) or (group.full and bool(self._deposits))
        self._full = full and not group.damage
        if not self.trouble:  # which is told by itself, and says nothing of the room
            taken = any(asked.what.taken for asked in group.deposits)
            self._tell_full(room=taken or self._store.free_bytes >= self._store.room.group)
        self._deposits = waiting + self._deposits
        self._show()
        self._takings = group.unserved + self._takings
        group.takings = [asked for asked in group.takings if asked not in group.unserved]
        if self._full or group.unserved or (self.trouble and (self._deposits or self._settlements)):
            self._retry_at = min(self._retry_at, trio.current_time() + RETRY_SECONDS)
        ring(group.releases)
        ring(group.errands)
        for asked in group.takings:
            if asked.abandoned and asked.what.lease is not None:
                self._releases.append(Asked(asked.what.lease))
                self._bell.set()
            asked.done.set()

    def _work(self, group: Group, *, closing: bool) -> None:
        """In the worker thread: do it, and where the file turns out to be damaged, have it mended.

        What was not done is then asked again.
        """
        try:
            with unreadable_is_damage():
                self._do(group, closing=closing)
        except sqlite3.Error as error:
            if not is_damage(error) or self._rescued:
                raise
            group.damage = str(error)
            self._rescue(group.damage)
        self._rescued = bool(group.damage)

    def _rescue(self, why: str) -> None:
        self._lost = True
        try:
            self._store.rescue(why)
        except (sqlite3.Error, OSError) as error:
            text = f"{self._store.path}: damaged, and cannot be mended: {error}"
            raise BufferBroken(text, advice(error)) from error
        self._lost = False

    def _stay(self, group: Group) -> None:
        """Acknowledge nothing that is in a file without its name; what is written there is not put again."""
        try:
            self._store.stay()
        except Astray as error:
            group.error, group.astray = str(error), True
            for asked in group.deposits:
                asked.what.withhold()
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, sqlite3.Error) and is_damage(error):
                raise
            self._lost = True
            raise BufferBroken(f"{self._store.path}: {error}", advice(error)) from error

    def _do(self, group: Group, *, closing: bool) -> None:
        """Write, then read. Raises sqlite3.Error where the file is damaged."""
        started = time.perf_counter()
        settlements = [asked.what for asked in group.settlements]
        deposits = [asked.what for asked in group.deposits]
        room = not deposits or self._store.reserve.hold()
        if not room and not closing:  # closing, what finds no room is counted at least
            group.error, deposits = self._store.reserve.trouble, []
        try:
            if settlements or deposits or self._settings.max_age:
                self._store.commit(settlements, deposits, closing=closing, room=room)
            group.settled = True
        except sqlite3.Error as error:
            if is_damage(error) or (not self.trouble and self._store.is_torn(error)):
                raise Damage(str(error)) from error
            group.error = str(error)
            if settlements:
                self._settle_alone(group, settlements)
        if (settlements or group.deposits) and (group.error or not self._store.reserve.held):
            self._store.give_back_room()
        self._stay(group)
        group.seconds = time.perf_counter() - started
        self._read(group)

    def _read(self, group: Group) -> None:
        """What comes after the writing."""
        for lease in group.releases:
            self._store.release(lease.what)
        for asked in group.takings:
            try:
                self._store.take(asked.what)
            except sqlite3.Error as error:
                if is_damage(error):
                    raise
                group.error = str(error)
                group.unserved.append(asked)
        for errand in group.errands:
            try:
                errand.what.work(self._store)
            except sqlite3.Error as error:
                if is_damage(error):
                    raise
                errand.what.error = str(error)
            errand.what.done = True
        self._store.welcome()

    def _settle_alone(self, group: Group, settlements: Sequence[Settlement]) -> None:
        """Deliveries must go on when there is no room for what comes in: they are what makes room."""
        for last in (False, True):
            try:
                self._store.commit(settlements, (), closing=False, room=False)
                group.settled = True
            except sqlite3.Error as error:
                if is_damage(error):
                    raise
                group.error = str(error)
                if is_full(error) and not last:
                    self._store.reserve.give_up()
                    continue
            return

    def _show(self) -> None:
        """What is committed becomes visible."""
        store = self._store
        self._books: Books = store.books.copy()
        self._dropping.look(self._books, trio.current_time())
        self._failing.look(self.trouble, trio.current_time())
        self._stats = Stats(
            events=store.events,
            bytes=store.bytes,
            disk_bytes=0,
            limit_bytes=store.max_size,
            oldest=None,
            dead_letters=store.letters.count,
            free_bytes=max(0, store.free_bytes),
            waiting=len(self._deposits) if self._full or self.trouble else 0,
            unleased=store.lanes.waiting,
            dropping=self._dropping.events,
        )
        self._waiting.show(store.lanes.changed)
        store.lanes.changed.clear()

    async def _in_thread(self, work: partial[None]) -> None:
        await trio.to_thread.run_sync(work, limiter=self._limiter)

    @asynccontextmanager
    async def copied(self) -> AsyncIterator[IO[bytes]]:
        """See `Contents.copied`. Between its steps others use the file, so that nobody waits long."""
        file = None
        async with self._copying:
            with trio.CancelScope() as self._copy:
                file = None if self._closing else await self._copied()
        if file is None:
            raise BufferBusy(f"{self._store.path}: the agent stops", "again when it runs")
        with file:
            yield file

    async def _copied(self) -> IO[bytes]:
        """The copy, made in a thread that has the file like `_in_thread`'s, but lends it."""
        us = object()

        async def lend() -> None:
            self._limiter.release_on_behalf_of(us)
            with trio.CancelScope(shield=True):
                await self._limiter.acquire_on_behalf_of(us)
            await trio.lowlevel.checkpoint_if_cancelled()

        await self._limiter.acquire_on_behalf_of(us)
        try:
            return await trio.to_thread.run_sync(
                self._store.copies.copy, self._settings.max_size, partial(trio.from_thread.run, lend)
            )
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            hint = "make room on the disk, or mend it; nothing was changed"
            raise BufferBroken(f"{self._store.path}: cannot be copied: {error}", hint) from error
        finally:
            self._limiter.release_on_behalf_of(us)

    async def finish(self) -> None:
        """Do what is still asked, then close the file. Nothing may be asked afterwards."""
        self.close_door()
        self._copy.cancel()
        await self._copying.acquire()  # for good: of a closed file there is no copy
        if not self._lost:
            await self.serve_group()
        try:
            await self._in_thread(partial(self._store.close))
        except sqlite3.Error as error:
            hint = "make room on the disk, or look for its errors: dmesg"
            log.warning("closed without a checkpoint; the next start makes it", error=str(error), hint=hint)


@asynccontextmanager
async def open_sqlite(
    settings: config.Buffer, metrics: Metrics, lock: int | None = None
) -> AsyncIterator[SqliteBuffer]:
    """The buffer for as long as the block lasts. Raises `BufferBroken` when its file cannot be used.

    `lock` is where the process that this one replaces holds it.
    """
    try:
        store = Store(settings, lock)
    except (sqlite3.Error, OSError) as error:
        raise BufferBroken(f"{settings.path}: {error}", advice(error)) from error
    buffer = SqliteBuffer(store, settings, metrics)
    serving = trio.CancelScope(shield=True)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(buffer.serve, serving)
            try:
                yield buffer
            finally:
                serving.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await buffer.finish()
