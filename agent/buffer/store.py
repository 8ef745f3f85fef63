"""The buffer's rows: each call is one transaction on the file, made in a worker thread, never two at once."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import structlog

from agent import config, crash
from agent.buffer import Entry, Lease, Replayed, revived
from agent.buffer.ages import Ages
from agent.buffer.copies import Copies
from agent.buffer.entries import entries_put, entries_settle
from agent.buffer.file import BEGIN_ANEW, Damage, Ownership, Room, close_beside_log
from agent.buffer.lane_rows import LaneRows
from agent.buffer.lanes import Lane, Lanes
from agent.buffer.opening import Found, opened, reopened
from agent.buffer.remains import keep
from agent.buffer.reserve import Reserve
from agent.buffer.rows import (
    CHUNK_BY_ID,
    DELETE_CHUNK,
    ENTER,
    FIRST_STAMP,
    IDS_UPTO,
    INSERT_CHUNK,
    ROW_BYTES,
    Change,
    Deposit,
    Settlement,
    Taking,
    chunk_of,
    row_of,
)
from agent.buffer.shedding import Shedding
from agent.buffer.space import give_back, give_back_room, is_torn
from agent.buffer.stray import Names
from agent.events import Chunk, Instant

log = structlog.get_logger("buffer")


class Store:
    """The database of one buffer, open. Its attributes show what is committed."""

    def __init__(self, settings: config.Buffer, lock: int | None = None) -> None:
        self.path = path = Path(settings.path)
        self.room = Room.of(settings.max_size)
        self.max_size = settings.max_size
        self._when_full = settings.when_full
        self._max_age = settings.max_age
        self._full = settings.durability == "full"
        self.reserve = Reserve(path, self.room.reserve)
        self._leases: set[Lease] = set()  # neither settled nor released
        self.ownership = Ownership(path, lock)
        try:
            opened(path, self._load, max_size=settings.max_size, full=self._full)
            crash.point("start.opened")
            self.reserve.hold()
        except BaseException:
            self.ownership.close()
            raise

    def _load(self, found: Found) -> None:
        """Count what is there. A lease dies with its process; those of this one stay out."""
        self._connection, self._doubt, self.books, lanes, self.letters, self.notes = found
        self._rows = LaneRows(self._connection)
        self.copies = Copies(self._connection, self.path)
        self.lanes = Lanes()
        self.events = self.bytes = 0
        leased = {(lease.project, lease.key) for lease in self._leases}
        for project, key, chunks, newest, events, size in sorted(
            lanes, key=lambda row: row[:2] not in leased
        ):
            self.lanes.add((project, key), chunks, newest, events)
            self.events += events
            self.bytes += size
        for lane in leased:
            leases = [lease for lease in self._leases if (lease.project, lease.key) == lane]
            ids = {ident for lease in leases for ident in lease.ids}
            before = [row[0] for row in self._connection.execute(IDS_UPTO, (*lane, max(ids)))]
            events = sum(chunk.events for lease in leases for chunk in lease.chunks)
            self.lanes.recall(lane, ids, events, [ident for ident in before if ident not in ids])
        self.ages = Ages(self._max_age, lambda: self.notes.clocks)
        drops = self._when_full == "drop_oldest"
        self._shedding = Shedding(
            self.path, self._connection, self.lanes, self.room, drop_oldest=drops, ages=self.ages
        )
        self._names = Names(self.path, self._connection)
        self._look_around()

    def stay(self) -> None:
        """Go on under the files' names where somebody took these away. Raises `Astray` while that fails."""
        if not self._names.lead_here() and self._names.restore(self.ownership):
            self._connection.close()
            self.reserve.held = False
            knowing = partial(opened, books=self.books, leases=self._leases)
            knowing(self.path, self._load, max_size=self.max_size, full=self._full)

    def rescue(self, why: str) -> None:
        """Go on with what can be read of the database, and with all that is out on lease."""
        close_beside_log(self._connection, self.path)
        found = reopened(
            self.path, why, max_size=self.max_size, full=self._full, books=self.books, leases=self._leases
        )
        self._load(found)

    def close(self) -> None:
        """Checkpoint, close, and give the file up.

        Raises sqlite3.Error when the checkpoint fails; it is closed all the same, and the log beside it holds
        what the next start reads.
        """
        crash.point("close.begun")
        try:
            self._connection.execute(BEGIN_ANEW)
            crash.point("close.checkpointed")
        finally:
            self._connection.close()
            crash.point("close.closed")
            self.ownership.close()

    # --- one transaction -------------------------------------------------------------------------

    def commit(
        self, settlements: Sequence[Settlement], deposits: Sequence[Deposit], *, closing: bool, room: bool
    ) -> None:
        """All of it or, when it raises sqlite3.Error, nothing of it; without `room` no chunk is taken."""
        with self._transaction() as change:
            change.room = room
            for settlement in settlements:
                self._settle(settlement, change)
            self._shedding.expire(change)
            taken = self._deposit_all(deposits, change, closing=closing)
        for deposit, count in zip(deposits, taken, strict=True):
            deposit.taken = count

    @contextmanager
    def _transaction(self) -> Iterator[Change]:
        """All that the block does is committed with the books of it, and shown; nothing, where it raises."""
        change = Change()
        with self._doubt.watched():
            self._connection.execute("BEGIN IMMEDIATE")
            crash.point("commit.begun")
            try:
                yield change
                entered = [(*entry, total) for entry, total in change.books.items()]
                self._connection.executemany(ENTER, entered)
                crash.point("commit.entered")
                self._connection.execute("COMMIT")
                crash.point("commit.written")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        self._apply(change)

    def _apply(self, change: Change) -> None:
        """Show what was committed."""
        for step in change.lanes:
            step()
        self.books.update(change.books)
        self.events += change.events
        self.bytes += change.bytes
        self.letters.apply(change)
        self._look_around()

    def _look_around(self) -> None:
        row = self._connection.execute(FIRST_STAMP, (0,)).fetchone()
        self.first = Instant(*row[3:]) if row else None
        self.free_pages: int = self._connection.execute("PRAGMA freelist_count").fetchone()[0]
        self.free_bytes = self._shedding.free()

    # --- putting ---------------------------------------------------------------------------------

    def _deposit_all(self, deposits: Sequence[Deposit], change: Change, *, closing: bool) -> list[int | None]:
        """What each put got; one that waits for room is not overtaken by a smaller one."""
        taken: list[int | None] = []
        full = False
        for deposit in deposits:
            got = None if full and deposit.chunks else self._deposit(deposit, change, closing=closing)
            full = full or got is None
            taken.append(got)
        return taken

    def _deposit(self, deposit: Deposit, change: Change, *, closing: bool) -> int | None:
        """How many events were taken; None when there is no room and it must wait."""
        if deposit.written is not None:
            return deposit.written
        events = deposit.events
        if deposit.chunks and not (change.room and self._shedding.make_room(deposit.bytes, change)):
            if self._when_full == "drop_newest":
                change.books.update(entries_put(deposit.tally, 0, events))
                return 0
            if not closing:
                return None
            change.books.update(entries_put(deposit.tally, 0, 0))
            change.books[Entry("shed", deposit.tally.source, "shutdown")] += events
            return 0
        for chunk in deposit.chunks:
            self._insert(chunk, change)
            crash.point("put.inserted")
        change.books.update(entries_put(deposit.tally, events, 0))
        return events

    def _insert(self, chunk: Chunk, change: Change) -> None:
        lane: Lane = (chunk.project, chunk.key)
        ident = self._connection.execute(INSERT_CHUNK, row_of(chunk)).lastrowid
        assert ident is not None  # noqa: S101  # an INSERT has one
        change.count(chunk)
        change.lanes.append(lambda: self.lanes.add(lane, 1, ident, chunk.events))

    # --- taking and settling ---------------------------------------------------------------------

    def take(self, taking: Taking) -> None:
        """Lease the oldest chunks of one of the project's lanes; writes nothing, but where one is damaged."""
        while found := self._rows.oldest(self.lanes.turns(taking.project, taking.without), taking.limits):
            lane, ids = found
            chunks = [self._chunk(lane, ident) for ident in ids]
            if None in chunks:
                broken = [ident for ident, one in zip(ids, chunks, strict=True) if one is None]
                self._shed_damaged(lane, broken)
                continue
            whole = tuple(chunk for chunk in chunks if chunk is not None)
            self.lanes.lease(lane, ids, sum(chunk.events for chunk in whole))
            until = self.ages.until(whole)
            taking.lease = Lease(project=lane[0], key=lane[1], chunks=whole, ids=tuple(ids), until=until)
            self._leases.add(taking.lease)
            crash.point("take.found")
            return

    def _chunk(self, lane: Lane, ident: int) -> Chunk | None:
        row = self._connection.execute(CHUNK_BY_ID, (ident,)).fetchone()
        if row is None:
            raise Damage("a chunk of the index is not in the table")
        return chunk_of(lane, row)

    def _shed_damaged(self, lane: Lane, ids: Sequence[int]) -> None:
        """Let chunks go that are not as they were written; the index knows how many events they had."""
        with self._transaction() as change:
            for ident in ids:
                self._shedding.shed(lane, ident, "damaged", change)
        log.error(
            "chunks in the buffer are damaged; their events are counted as damaged, the others go on",
            chunks=len(ids),
            hint="look for the disk's errors: dmesg",
        )

    def welcome(self) -> None:
        """Let keys that wait in a crowd have the lanes that are free."""
        self.lanes.welcome(self._rows.next_stranger)

    def release(self, lease: Lease) -> None:
        """Give a lease back; nothing where it was settled."""
        if lease in self._leases:
            self._leases.discard(lease)
            events = sum(chunk.events for chunk in lease.chunks)
            self.lanes.give_back((lease.project, lease.key), lease.ids, events)

    def _settle(self, settlement: Settlement, change: Change) -> None:
        """Forget the lease, bury the dead, keep the rest in its chunks' places."""
        lease, lane = settlement.lease, (settlement.lease.project, settlement.lease.key)
        kept, homeless = keep(self._connection, lease, settlement.rest)
        for chunk in kept.values():
            change.count(chunk)
        for chunk in homeless:
            self._insert(chunk, change)
        crash.point("settle.kept")
        gone = [ident for ident in lease.ids if ident not in kept]
        self._connection.executemany(DELETE_CHUNK, [(ident,) for ident in gone])
        crash.point("settle.forgotten")
        for dead in settlement.dead:
            self.letters.bury(dead, change)
            crash.point("settle.buried")
        entries = entries_settle(
            lease, settlement.dead, settlement.rest, settlement.damaged, settlement.warned
        )
        change.books.update(entries)
        change.events -= sum(chunk.events for chunk in lease.chunks)
        change.bytes -= sum(len(chunk.packed) for chunk in lease.chunks)
        change.lanes.append(lambda: self._leases.discard(lease))
        change.lanes.append(lambda: self.lanes.forget(lane, gone))
        if kept:
            events = sum(chunk.events for chunk in kept.values())
            change.lanes.append(lambda: self.lanes.give_back(lane, kept, events))

    # --- dead letters ----------------------------------------------------------------------------

    def replay(self, ids: Sequence[int]) -> Replayed:
        """Dead letters become chunks again, as many as there is room for."""
        with self._transaction() as change:
            letters, damaged = self.letters.told_apart(ids)
            for number, letter in enumerate(letters):
                chunk = revived(letter)
                if self._shedding.free() < len(chunk.packed) + ROW_BYTES:
                    return Replayed(number, full=True, damaged=damaged)
                self.letters.take_out(letter, "replayed", change)
                crash.point("replay.taken_out")
                self._insert(chunk, change)
                crash.point("replay.inserted")
        return Replayed(len(letters), full=False, damaged=damaged)

    def purge(self, ids: Sequence[int]) -> int:
        """Dead letters are forgotten; how many of them there were."""
        with self._transaction() as change:
            letters = self.letters.of_ids(ids)
            for letter in letters:
                self.letters.take_out(letter, "purged", change)
        return len(letters)

    def purge_upto(self, newest: int) -> int:
        """See `DeadLetters.purge_upto`."""
        with self._transaction() as change:
            return self.letters.purge_upto(newest, change)

    def note_clock(self, boot: str, ahead: int) -> None:
        """See `Buffer.note_clock`."""
        with self._transaction():
            self.notes.note_clock(boot, ahead)
        self.notes.read_clocks()

    def note_drops(self, source: str, socket: str, total: int) -> None:
        """See `Buffer.note_drops`."""
        with self._transaction() as change:
            self.notes.note_drops(source, socket, total, change)

    def give_back_pages(self, most: int) -> None:
        """Return up to `most` free pages to the filesystem, unless it has no room for the change itself."""
        try:
            with self._doubt.watched():
                give_back(self._connection, most)
        except (sqlite3.Error, UnicodeDecodeError):
            self.free_pages = 0  # none to give back until the next commit has looked
            return
        crash.point("pages.given_back")
        self._look_around()

    def give_back_room(self) -> None:
        """Let a full disk have what is free in the files, until it has room for the reserve again."""
        give_back_room(self._connection, self._doubt, self.path, self.reserve, self.room)
        self._look_around()

    def is_torn(self, error: sqlite3.Error) -> bool:
        """Whether a full disk is said where the file is damaged."""
        return is_torn(self._connection, self.path, self.room, error)
