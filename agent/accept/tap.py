"""Where people can watch a source's events as they pass into the buffer.

It costs a look at an empty list where nobody watches. Who watches gets the packed chunks, which are there
anyhow, and opens them in its own time; who is slow misses some, and holds up nobody.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import trio

from agent.events import CHUNK_BYTES, Chunk

# What waits for one watcher, packed: a second of 10,000 events of 340 bytes is a third of it.
QUEUE_BYTES = CHUNK_BYTES
# The same where chunks are tiny: a second of a source whose events come one by one, acknowledged.
QUEUE_CHUNKS = 1000


class Passed(NamedTuple):
    """A chunk that is in the buffer since now, and the name of the source that it came from."""

    source: str
    chunk: Chunk


class View:
    """One watcher's queue; `missed` counts the events that came while it was full."""

    def __init__(self) -> None:
        self.missed = 0
        self._waiting: deque[Passed] = deque()
        self._bytes = 0
        self._some = trio.Event()

    def show(self, source: str, chunks: Sequence[Chunk]) -> None:
        """These are in the buffer."""
        for chunk in chunks:
            if self._waiting and (
                self._bytes + len(chunk.packed) > QUEUE_BYTES or len(self._waiting) >= QUEUE_CHUNKS
            ):
                self.missed += chunk.events
                continue
            self._waiting.append(Passed(source, chunk))
            self._bytes += len(chunk.packed)
        self._some.set()

    async def next(self) -> Passed:
        """The next chunk, once there is one."""
        while not self._waiting:
            self._some = trio.Event()
            await self._some.wait()
        passed = self._waiting.popleft()
        self._bytes -= len(passed.chunk.packed)
        return passed


class Tap:
    """One source's; `views` are those who watch it."""

    def __init__(self, source: str) -> None:
        self.views: list[View] = []
        self._source = source

    def show(self, chunks: Sequence[Chunk]) -> None:
        """These are in the buffer."""
        for view in self.views:
            view.show(self._source, chunks)


@contextmanager
def watched(taps: Iterable[Tap]) -> Iterator[View]:
    """What passes at any of these taps, for a block."""
    view, places = View(), list(taps)
    for tap in places:
        tap.views.append(view)
    try:
        yield view
    finally:
        for tap in places:
            tap.views.remove(view)
