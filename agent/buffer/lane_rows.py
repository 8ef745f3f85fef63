"""The lanes' rows: which of them may be leased, and which key of a crowd is the next."""

import sqlite3
from collections.abc import Container, Iterable, Iterator

from agent.buffer import Limits, fitting
from agent.buffer.file import Damage
from agent.buffer.lanes import Lane, Queue, Stranger

# Cast, as a damaged row holds anything; whether it is one is looked at when it is read whole.
SIZES = """SELECT id, ifnull(CAST(events AS INTEGER), 0), ifnull(CAST(size AS INTEGER), 0),
    ifnull(length(packed), 0) FROM chunk"""
SIZE_BY_ID = f"{SIZES} WHERE id = ?"
SIZES_BEYOND_CURSOR = f"{SIZES} WHERE project = ? AND key IS ? AND id > ? ORDER BY id LIMIT ?"
NEXT_KEY = "SELECT key FROM chunk WHERE project = ? AND key > ? ORDER BY key LIMIT 1"
COUNT_LANE = "SELECT count(*), max(id), sum(events) FROM chunk WHERE project = ? AND key = ?"


class LaneRows:
    """The table `chunk`, looked at by project and key; an index finds all that is asked here."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._run = connection.execute
        self._last: dict[str, str] = {}  # of each project, the key of its crowd that was found last

    def oldest(self, turns: Iterable[tuple[Lane, Queue]], limits: Limits) -> tuple[Lane, list[int]] | None:
        """The chunks that are next, at least one, and whose they are.

        Raises `Damage` where none is found of the events that wait in a lane.
        """
        for lane, queue in turns:
            if ids := fitting(self._candidates(lane, queue, limits.events), limits):
                return lane, ids
            raise Damage("chunks are not where their index has them")
        return None

    def _candidates(self, lane: Lane, queue: Queue, most: int) -> Iterator[tuple[int, int, int, int]]:
        """The lane's chunks that may be leased, those that came back first: id, events, size, packed."""
        none = True
        for ident in queue.offer(most):
            none = False
            yield self._size(ident)
        for row in self._run(SIZES_BEYOND_CURSOR, (*lane, queue.cursor, most)):
            none = False
            yield row
        for ident in queue.offer_all(most) if none else ():
            yield self._size(ident)

    def _size(self, ident: int) -> tuple[int, int, int, int]:
        row: tuple[int, int, int, int] | None = self._run(SIZE_BY_ID, (ident,)).fetchone()
        if row is None:
            raise Damage("a chunk is not in its table any more")
        return row

    def next_stranger(self, project: str, known: Container[str | None]) -> Stranger | None:
        """The next key without a lane, in the order of keys and around; None where each has one."""
        for place in (self._last.get(project, ""), ""):
            key = place
            while row := self._run(NEXT_KEY, (project, key)).fetchone():
                (key,) = row
                if key not in known:
                    self._last[project] = key
                    return Stranger(key, *self._run(COUNT_LANE, (project, key)).fetchone())
        return None
