"""The buffer's rows: each call is one transaction on the file, made in a worker thread, never two at once."""

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from agent import config
from agent.buffer import (
    Books,
    Entry,
    Lease,
    Replayed,
    Shed,
    revived,
    too_old_at,
)
from agent.buffer.copies import Copies
from agent.buffer.entries import entries_put, entries_settle
from agent.buffer.file import PAGE_BYTES, Ownership, Room, connect, disk_bytes
from agent.buffer.lane_rows import LaneRows
from agent.buffer.lanes import Lane, Lanes
from agent.buffer.letters import Letters
from agent.buffer.notes import Notes
from agent.buffer.rows import (
    CHUNK_BY_ID,
    COUNT_LANES,
    ENTER,
    INSERT_CHUNK,
    OLDEST,
    ROW_BYTES,
    UPDATE_CHUNK,
    Change,
    Deposit,
    Settlement,
    Taking,
    chunk_of,
    row_of,
    same_origin,
)
from agent.events import Chunk, label_of


class Store:
    """The database of one buffer, open. Its attributes show what is committed."""

    def __init__(self, settings: config.Buffer, lock: int | None = None) -> None:
        self.path = path = Path(settings.path)
        self.room = Room.of(settings.max_size)
        self.max_size = settings.max_size
        self._when_full = settings.when_full
        self._max_age = int(settings.max_age * 1_000_000)
        self.ownership = Ownership(path, lock)
        try:
            self._connection = connect(path, full=settings.durability == "full", room=self.room)
        except BaseException:
            self.ownership.close()
            raise
        self.lanes = Lanes()
        self._leases: set[Lease] = set()  # neither settled nor released
        self._rows = LaneRows(self._connection)
        self._load()

    def _load(self) -> None:
        """Count what is there. A lease died with its process, so every chunk waits."""
        run = self._connection.execute
        self.books: Books = Counter()
        for joint, label, reason, total in run("SELECT joint, label, reason, total FROM books"):
            self.books[Entry(joint, label, reason)] = total
        self.events = self.bytes = 0
        for project, key, chunks, newest, events, size in run(COUNT_LANES):
            self.lanes.add((project, key), chunks, newest, events)
            self.events += events
            self.bytes += size
        self.letters = Letters(self._connection, self.max_size)
        self.notes = Notes(self._connection)
        self.copies = Copies(self._connection, self.path)
        self._look_around()

    def close(self) -> None:
        """Checkpoint, close, and give the file up.

        Raises sqlite3.Error when the checkpoint fails; it is closed all the same, and the log beside it holds
        what the next start reads.
        """
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self._connection.close()
            self.ownership.close()

    def disk_bytes(self) -> int:
        """The bytes of all files on disk."""
        return disk_bytes(self.path)

    # --- one transaction -------------------------------------------------------------------------

    def commit(
        self, settlements: Sequence[Settlement], deposits: Sequence[Deposit], *, now: int, closing: bool
    ) -> None:
        """All of it or, when it raises sqlite3.Error, nothing of it. `now` is in microseconds."""
        with self._transaction() as change:
            for settlement in settlements:
                self._settle(settlement, change)
            self._expire(now, change)
            taken = self._deposit_all(deposits, change, closing=closing)
        for deposit, count in zip(deposits, taken, strict=True):
            deposit.taken = count

    @contextmanager
    def _transaction(self) -> Iterator[Change]:
        """All that the block does is committed with the books of it, and shown; nothing, where it raises."""
        change = Change()
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield change
            self._connection.executemany(ENTER, [(*entry, total) for entry, total in change.books.items()])
            self._connection.execute("COMMIT")
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
        row = self._connection.execute("SELECT received_at FROM chunk ORDER BY id LIMIT 1").fetchone()
        self.oldest: int | None = row[0] if row else None
        self.free_pages: int = self._connection.execute("PRAGMA freelist_count").fetchone()[0]
        self.free_bytes = self._free()

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
        events = deposit.events
        if deposit.chunks and not self._make_room(deposit.bytes, change):
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
        change.books.update(entries_put(deposit.tally, events, 0))
        return events

    def _insert(self, chunk: Chunk, change: Change) -> None:
        lane: Lane = (chunk.project, chunk.key)
        ident = self._connection.execute(INSERT_CHUNK, row_of(chunk)).lastrowid
        assert ident is not None  # noqa: S101  # an INSERT has one
        self._count(chunk, change)
        change.lanes.append(lambda: self.lanes.add(lane, 1, ident, chunk.events))

    def _make_room(self, size: int, change: Change) -> bool:
        """Whether so many bytes fit, if need be by shedding the oldest chunks that are not on lease."""
        missing = size - self._free()
        if missing <= 0:
            return True
        if self._when_full != "drop_oldest":
            return False
        for row in list(self._waiting_rows(limit=-1 if missing > self.room.group else 4096)):
            missing -= row[4] + ROW_BYTES
            self._shed(row, "full_oldest", change)
            if missing <= 0 and size <= self._free():
                return True
        return False

    def _free(self) -> int:
        """Bytes that `put` may still use: free pages are room."""
        pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
        free = self._connection.execute("PRAGMA freelist_count").fetchone()[0]
        return int(self.room.data - (pages - free) * PAGE_BYTES)

    def _waiting_rows(self, limit: int) -> Iterator[tuple[int, str, str | None, int, int, int]]:
        """The oldest chunks that are not on lease."""
        leased = self.lanes.leased
        for row in self._connection.execute(f"{OLDEST} LIMIT ?", (limit,)):
            if row[0] not in leased:
                yield row

    def _shed(self, row: tuple[int, str, str | None, int, int, int], why: Shed, change: Change) -> None:
        ident, project, key, events, size, _ = row
        self._connection.execute("DELETE FROM chunk WHERE id = ?", (ident,))
        change.books[Entry("shed", label_of(project, key), why)] += events
        change.events -= events
        change.bytes -= size
        change.lanes.append(lambda: self.lanes.drop((project, key), ident, events))

    def _expire(self, now: int, change: Change) -> None:
        """Shed what is older than `max_age`; chunks lie about in the order of their age."""
        if not self._max_age:
            return
        for row in list(self._waiting_rows(limit=1024)):
            if row[5] >= now - self._max_age:
                break
            self._shed(row, "expired", change)

    # --- taking and settling ---------------------------------------------------------------------

    def take(self, taking: Taking) -> None:
        """Lease the oldest chunks of one of the project's lanes; writes nothing."""
        for lane, queue in self.lanes.turns(taking.project, taking.without):
            ids: list[int] = []
            events = size = 0
            for ident, more_events, more_size in self._rows.candidates(lane, queue, taking.limits.events):
                events, size = events + more_events, size + more_size
                if ids and (events > taking.limits.events or size > taking.limits.size):
                    break
                ids.append(ident)
            if ids:
                rows = [self._connection.execute(CHUNK_BY_ID, (ident,)).fetchone() for ident in ids]
                chunks = tuple(chunk_of(lane, row) for row in rows)
                self.lanes.lease(lane, ids, sum(chunk.events for chunk in chunks))
                until = too_old_at(chunks, self._max_age)
                taking.lease = Lease(project=lane[0], key=lane[1], chunks=chunks, ids=tuple(ids), until=until)
                self._leases.add(taking.lease)
                return

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
        kept = self._keep(lease, settlement.rest, change)
        gone = [ident for ident in lease.ids if ident not in kept]
        self._connection.executemany("DELETE FROM chunk WHERE id = ?", [(ident,) for ident in gone])
        for dead in settlement.dead:
            self.letters.bury(dead, change)
        entries = entries_settle(
            lease, settlement.dead, settlement.rest, settlement.damaged, settlement.warned
        )
        change.books.update(entries)
        change.events -= sum(chunk.events for chunk in lease.chunks)
        change.bytes -= sum(len(chunk.packed) for chunk in lease.chunks)
        change.lanes.append(lambda: self._leases.discard(lease))
        change.lanes.append(lambda: self.lanes.forget(lane, gone))
        if kept:
            events = sum(kept.values())
            change.lanes.append(lambda: self.lanes.give_back(lane, kept, events))

    def _keep(self, lease: Lease, rest: Sequence[Chunk], change: Change) -> dict[int, int]:
        """Write what is left of the lease's chunks over them; the ids that stay, and their events."""
        places = dict(zip(lease.ids, lease.chunks, strict=True))
        left = {id(chunk) for chunk in rest}
        kept = {ident: chunk.events for ident, chunk in places.items() if id(chunk) in left}
        untouched = {id(places.pop(ident)) for ident in kept}
        for chunk in rest:
            if id(chunk) in untouched:
                self._count(chunk, change)
                continue
            ident = next((place for place, old in places.items() if same_origin(old, chunk)), None)
            if ident is None:
                self._insert(chunk, change)
                continue
            del places[ident]
            values = (chunk.events, chunk.size, chunk.crc, len(chunk.packed), chunk.packed, ident)
            self._connection.execute(UPDATE_CHUNK, values)
            self._count(chunk, change)
            kept[ident] = chunk.events
        return kept

    def _count(self, chunk: Chunk, change: Change) -> None:
        """A chunk is in the buffer."""
        change.events += chunk.events
        change.bytes += len(chunk.packed)

    # --- dead letters ----------------------------------------------------------------------------

    def replay(self, ids: Sequence[int]) -> Replayed:
        """Dead letters become chunks again, as many as there is room for."""
        with self._transaction() as change:
            letters = self.letters.of_ids(ids)
            for number, letter in enumerate(letters):
                chunk = revived(letter)
                if self._free() < len(chunk.packed) + ROW_BYTES:
                    return Replayed(number, full=True)
                self.letters.take_out(letter, "replayed", change)
                self._insert(chunk, change)
        return Replayed(len(letters), full=False)

    def purge(self, ids: Sequence[int]) -> int:
        """Dead letters are forgotten; how many of them there were."""
        with self._transaction() as change:
            letters = self.letters.of_ids(ids)
            for letter in letters:
                self.letters.take_out(letter, "purged", change)
        return len(letters)

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
            self._connection.execute(f"PRAGMA incremental_vacuum({most})").fetchall()
        except sqlite3.Error:
            self.free_pages = 0  # none to give back until the next commit has looked
            return
        self._look_around()
