"""Which chunks may be taken next: a cursor for each project and key, and what is out on lease.

Clients make up keys, so of each project only so many lanes are known here. The chunks of all other keys are
the project's *crowd*: they wait as they lie in the buffer, and when there is a place for one more lane, the
next key of the crowd gets it. A key has a lane with all of its chunks, or none.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple

Lane = tuple[str, str | None]

# Of each project; one takes 0.5 KB, and to look through all of them takes 0.2 ms. No host's programs report
# to so many projects. Twice as many as keys are held (`deliver.keys`), so that those keep no others out.
MOST_LANES = 2048


class Queue:
    """One lane's chunks by id: those behind the cursor were taken once; some of them came back.

    Ids rise as chunks are put. What is returned goes to the back: it is offered again once the cursor has
    passed every chunk that was there when it came back. `events` is those that wait, `leased` the chunks that
    do not.
    """

    __slots__ = ("chunks", "cursor", "events", "leased", "newest", "returned")

    def __init__(self, chunks: int = 0, events: int = 0, newest: int = 0) -> None:
        self.cursor = 0
        self.newest = newest
        self.chunks = chunks
        self.events = events
        self.leased = 0
        self.returned: dict[int, int] = {}  # an id is offered once the cursor is there

    def offer(self, limit: int) -> list[int]:
        """Ids that came back and are due again, oldest first."""
        due: list[int] = []
        for chunk, after in self.returned.items():
            if after > self.cursor or len(due) == limit:
                break
            due.append(chunk)
        return due

    def offer_all(self, limit: int) -> list[int]:
        """The same where nothing lies beyond the cursor, as what was there has been shed."""
        self.cursor = self.newest
        return self.offer(limit)


class Stranger(NamedTuple):
    """A key of the crowd with all that it has: so many chunks and events, and the newest one's id."""

    key: str
    chunks: int
    newest: int
    events: int


class _Project:
    """The lanes of one project by key, in the order of their turns; and what its crowd has.

    `worked` is keys of which something was settled lately. They never go to the crowd, so that a key that
    works does not wait behind those that somebody makes up. At most half as many as there are lanes: so the
    others are left to the crowd.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.queues: dict[str | None, Queue] = {}
        self.worked: dict[str, None] = {}
        self.crowd = 0  # chunks
        self.events = 0  # that wait, in lanes and in the crowd
        self.own_turn = False

    @property
    def has_place(self) -> bool:
        """Whether one more key may have a lane."""
        return len(self.queues) - (None in self.queues) < self._most

    def admits(self, key: str | None) -> bool:
        """Whether a key without a lane may have one now: only where it has nothing in the crowd."""
        return key is None or key in self.worked or (not self.crowd and self.has_place)

    def work(self, key: str) -> str | None:
        """Events of this key were settled; the key that therefore no longer counts as one that worked."""
        self.worked.pop(key, None)
        self.worked[key] = None
        if len(self.worked) <= self._most // 2:
            return None
        oldest = next(iter(self.worked))
        del self.worked[oldest]
        return oldest

    def join_crowd(self, key: str | None) -> bool:
        """Whether this key, which is not about to be asked, gave its lane to those that have none."""
        queue = self.queues.get(key)
        if queue is None or queue.leased or key is None or key in self.worked:
            return False
        if not self.crowd and len(self.queues) - (None in self.queues) <= self._most:
            return False
        del self.queues[key]
        self.crowd += queue.chunks
        return True


class Lanes:
    """All lanes; those of one project take turns, so that no key waits for another's backlog.

    Every other turn is the project's own key's, however many others there are. `changed` collects how many
    events wait in lanes whose number changed; who shows it empties it.
    """

    def __init__(self, most: int = MOST_LANES) -> None:
        self._most = most
        self.leased: set[int] = set()
        self.changed: dict[Lane, int] = {}
        self._projects: dict[str, _Project] = {}

    @property
    def waiting(self) -> dict[str, int]:
        """The events of each project that nobody has on lease."""
        return {name: project.events for name, project in self._projects.items() if project.events > 0}

    def add(self, lane: Lane, chunks: int, newest: int, events: int) -> None:
        """Chunks are in the buffer, all of one lane; the newest has this id."""
        name, key = lane
        project = self._projects.setdefault(name, _Project(self._most))
        queue = project.queues.get(key)
        if queue is None:
            if not project.admits(key):
                project.crowd += chunks
                project.events += events
                return
            queue = project.queues[key] = Queue()
        queue.newest = max(queue.newest, newest)
        queue.chunks += chunks
        self._wait(lane, queue, events)

    def turns(self, project: str, without: Container[str | None]) -> Iterator[tuple[Lane, Queue]]:
        """The project's lanes that have something, whose turn it is first; without those of some keys."""
        lanes = self._projects.get(project)
        if lanes is None:
            return
        if lanes.own_turn and (own := lanes.queues.get(None)) and own.events > 0 and None not in without:
            yield (project, None), own
        for key, queue in lanes.queues.items():
            if queue.events > 0 and key not in without:
                yield (project, key), queue

    def lease(self, lane: Lane, chunks: Iterable[int], events: int) -> None:
        """Chunks go out on lease, and their lane to the end of the turns."""
        project, key = self._projects[lane[0]], lane[1]
        queue = project.queues[key] = project.queues.pop(key)
        project.own_turn = key is not None
        taken = set(chunks)
        self.leased |= taken
        queue.leased += len(taken)
        queue.cursor = max(queue.cursor, *taken)
        for chunk in taken & queue.returned.keys():
            del queue.returned[chunk]
        self._wait(lane, queue, -events)

    def recall(self, lane: Lane, leased: Iterable[int], events: int, before: Iterable[int]) -> None:
        """Of chunks that were just added these are out on lease; those `before` the newest of them wait."""
        self.lease(lane, leased, events)
        queue = self._projects[lane[0]].queues[lane[1]]
        queue.returned.update(dict.fromkeys(before, queue.cursor))

    def give_back(self, lane: Lane, chunks: Iterable[int], events: int) -> None:
        """Leased chunks wait again, at the back; those of a key that has not worked so far in the crowd."""
        project, key = self._projects[lane[0]], lane[1]
        queue = project.queues[key]
        again = list(chunks)
        self.leased.difference_update(again)
        queue.leased -= len(again)
        queue.returned.update(dict.fromkeys(again, queue.newest))
        self._wait(lane, queue, events)
        if project.join_crowd(key):
            self.changed[lane] = 0

    def forget(self, lane: Lane, chunks: Iterable[int]) -> None:
        """Leased chunks are settled."""
        done = set(chunks)
        project, key = self._projects[lane[0]], lane[1]
        queue = project.queues[key]
        self.leased -= done
        queue.leased -= len(done)
        queue.chunks -= len(done)
        if key is not None and done and (oldest := project.work(key)) and project.join_crowd(oldest):
            self.changed[lane[0], oldest] = 0
        self._tidy(lane, queue)

    def drop(self, lane: Lane, chunk: int, events: int) -> None:
        """A chunk that was not on lease is gone."""
        project = self._projects[lane[0]]
        queue = project.queues.get(lane[1])
        if queue is None:
            project.crowd -= 1
            project.events -= events
            return
        queue.chunks -= 1
        queue.returned.pop(chunk, None)
        self._wait(lane, queue, -events)
        self._tidy(lane, queue)

    def welcome(self, next_stranger: Callable[[str, Container[str | None]], Stranger | None]) -> None:
        """Give the places that are free to keys of the crowd: `next_stranger` knows who has none yet."""
        for name, project in self._projects.items():
            while project.crowd > 0 and project.has_place:
                stranger = next_stranger(name, project.queues.keys())
                if stranger is None:
                    break
                key, chunks, newest, events = stranger
                project.queues[key] = Queue(chunks, events, newest)
                project.crowd -= chunks
                self.changed[name, key] = events

    def _wait(self, lane: Lane, queue: Queue, events: int) -> None:
        """So many events more wait in a lane."""
        queue.events += events
        self._projects[lane[0]].events += events
        self.changed[lane] = queue.events

    def _tidy(self, lane: Lane, queue: Queue) -> None:
        """Forget an empty lane: keys that clients make up must not be kept for ever."""
        if queue.chunks <= 0:
            del self._projects[lane[0]].queues[lane[1]]
