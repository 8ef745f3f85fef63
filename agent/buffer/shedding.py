"""What must go: chunks that are too old, damaged, or in the way of new ones; and how much room there is."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from agent import crash
from agent.buffer import Entry, Shed, evidence
from agent.buffer.ages import Ages
from agent.buffer.file import PAGE_BYTES, Damage, Room
from agent.buffer.lanes import Lane, Lanes
from agent.buffer.rows import DELETE_CHUNK, INDEXED, OLDEST, ROW_BYTES, STAMPS, Change
from agent.events import Instant, label_of


class Shedding:
    """Lets chunks go that are not on lease; who calls it holds a transaction open."""

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        lanes: Lanes,
        room: Room,
        *,
        drop_oldest: bool,
        ages: Ages,
    ) -> None:
        self._path = path
        self._connection = connection
        self._lanes = lanes
        self._room = room
        self._drop_oldest = drop_oldest
        self._ages = ages
        self._evidence = bool(evidence.kept(path))

    def make_room(self, size: int, change: Change) -> bool:
        """Whether so many bytes fit, if need be by shedding the oldest chunks that are not on lease."""
        missing = size - self.free()
        if self._evidence:
            evidence.make_room(self._path, max(0, -missing))
            self._evidence = bool(evidence.kept(self._path))
        if missing <= 0:
            return True
        if not self._drop_oldest:
            return False
        for ident, lane in list(self._waiting_rows(limit=-1 if missing > self._room.group else 4096)):
            missing -= self.shed(lane, ident, "full_oldest", change) + ROW_BYTES
            crash.point("shed.oldest")
            if missing <= 0 and size <= self.free():
                return True
        return False

    def free(self) -> int:
        """Bytes that `put` may still use: free pages are room."""
        pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
        free = self._connection.execute("PRAGMA freelist_count").fetchone()[0]
        return int(self._room.data - (pages - free) * PAGE_BYTES)

    def _waiting_rows(self, limit: int) -> Iterator[tuple[int, Lane]]:
        """The oldest chunks that are not on lease."""
        leased = self._lanes.leased
        for ident, project, key in self._connection.execute(f"{OLDEST} LIMIT ?", (limit,)):
            if ident not in leased:
                yield ident, (project, key)

    def shed(self, lane: Lane, ident: int, why: Shed, change: Change) -> int:
        """Let a chunk go; how many bytes it had. The index tells that, also of a damaged row."""
        row = self._connection.execute(INDEXED, (*lane, ident)).fetchone()
        if row is None:
            raise Damage("a chunk is not in its index")
        events, size = row
        self._connection.execute(DELETE_CHUNK, (ident,))
        if self._connection.execute(INDEXED, (*lane, ident)).fetchone() is not None:
            raise Damage("a chunk is not what its index says")
        change.books[Entry("shed", label_of(*lane), why)] += events
        change.events -= events
        change.bytes -= size
        change.lanes.append(lambda: self._lanes.drop(lane, ident, events))
        return int(size)

    def expire(self, change: Change) -> None:
        """Shed what is older than `max_age`."""
        if not self._ages.bounded:
            return
        lanes: dict[int, Lane] = {}

        def stamps() -> Iterator[tuple[int, Instant]]:
            for ident, project, key, *stamped in rows:
                lanes[ident] = (project, key)
                yield ident, Instant(*stamped)

        with closing(self._connection.execute(STAMPS, (self._ages.after,))) as rows:
            too_old = self._ages.too_old(stamps(), self._lanes.leased)
        for ident in too_old:
            self.shed(lanes[ident], ident, "expired", change)
            crash.point("shed.expired")
