"""Which chunks may be taken next: a cursor for each project and key, and what is out on lease."""

from collections import deque
from collections.abc import Iterable

Lane = tuple[str, str | None]


class Queue:
    """One lane's chunks by id: those behind the cursor were taken once; some of them came back.

    Ids rise as chunks are put. What is returned goes to the back: it is offered again once the cursor has
    passed every chunk that was there when it came back.
    """

    def __init__(self) -> None:
        self.cursor = 0
        self.newest = 0
        self.chunks = 0
        self.returned: deque[tuple[int, int]] = deque()  # (id, offered once the cursor is here)

    def offer(self, limit: int) -> list[int]:
        """Ids that came back and are due again, oldest first."""
        due: list[int] = []
        for chunk, after in self.returned:
            if after > self.cursor or len(due) == limit:
                break
            due.append(chunk)
        return due

    def give_back(self, chunks: Iterable[int]) -> None:
        """Chunks are no longer on lease."""
        self.returned.extend((chunk, self.newest) for chunk in chunks)

    def drop(self, chunk: int) -> None:
        """A chunk that waited is gone."""
        self.chunks -= 1
        if chunk <= self.cursor:
            self.returned = deque(entry for entry in self.returned if entry[0] != chunk)


class Lanes:
    """All lanes; those of one project take turns, so that no key waits for another's backlog."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[Lane, Queue]] = {}
        self.leased: set[int] = set()

    def put(self, lane: Lane, chunk: int) -> None:
        """A chunk is in the buffer."""
        queue = self._queues.setdefault(lane[0], {}).setdefault(lane, Queue())
        queue.newest = max(queue.newest, chunk)
        queue.chunks += 1

    def add(self, lane: Lane, chunks: int, newest: int) -> None:
        """A lane was found in the database with so many chunks."""
        queue = self._queues.setdefault(lane[0], {}).setdefault(lane, Queue())
        queue.chunks, queue.newest = chunks, newest

    def turns(self, project: str) -> list[tuple[Lane, Queue]]:
        """The project's lanes, whose turn it is first."""
        return list(self._queues.get(project, {}).items())

    def lease(self, lane: Lane, chunks: Iterable[int]) -> None:
        """Chunks go out on lease, and their lane to the end of the turns."""
        queues = self._queues[lane[0]]
        queue = queues.pop(lane)
        queues[lane] = queue
        taken = set(chunks)
        self.leased |= taken
        queue.cursor = max(queue.cursor, *taken)
        while queue.returned and queue.returned[0][0] in taken:
            queue.returned.popleft()

    def give_back(self, lane: Lane, chunks: Iterable[int]) -> None:
        """Leased chunks wait again, at the back."""
        again = list(chunks)
        self.leased.difference_update(again)
        self._queues[lane[0]][lane].give_back(again)

    def forget(self, lane: Lane, chunks: Iterable[int]) -> None:
        """Leased chunks are settled."""
        done = set(chunks)
        self.leased -= done
        self._queues[lane[0]][lane].chunks -= len(done)
        self._tidy(lane)

    def drop(self, lane: Lane, chunk: int) -> None:
        """A chunk that was not on lease is gone."""
        self._queues[lane[0]][lane].drop(chunk)
        self._tidy(lane)

    def _tidy(self, lane: Lane) -> None:
        """Forget an empty lane: keys that clients make up must not be kept for ever."""
        if self._queues[lane[0]][lane].chunks <= 0:
            del self._queues[lane[0]][lane]
