"""Tells a delivery when there is something for it to take, without anybody polling."""

from collections.abc import Collection, Container, Mapping
from math import inf
from typing import NamedTuple

import trio

from agent.buffer.lanes import Lane

Key = str | None


class Queued(NamedTuple):
    """The events of one lane that may be leased, and since when (trio's clock) they wait for company."""

    events: int
    since: float


class Waiting:
    """How many events of each project and key may be leased, and who waits for them.

    Each lane has a linger of its own, from when it has something: so that of many small lanes none waits for
    the others' lingers. A lease that leaves some behind begins it anew: else a busy lane's batches would be
    short.
    """

    def __init__(self) -> None:
        self._queued: dict[str, dict[Key, Queued]] = {}
        self._more = trio.Event()

    def show(self, changed: Mapping[Lane, int]) -> None:
        """So many there are now of these."""
        more = False
        now = trio.current_time()
        for (project, key), events in changed.items():
            lanes = self._queued.setdefault(project, {})
            before = lanes.get(key, Queued(0, now))
            more = more or events > before.events
            if events > 0:
                lanes[key] = Queued(events, now if events < before.events else before.since)
            else:
                lanes.pop(key, None)
        if more:
            self._more.set()
            self._more = trio.Event()

    async def ready(
        self, project: str, events: int, linger: float, without: Container[Key]
    ) -> Collection[Key]:
        """See `Buffer.ready`."""
        while True:
            due, next_due = self._due(project, events, linger, without)
            if due:
                return due
            more = self._more
            with trio.move_on_at(next_due):
                await more.wait()

    def _due(
        self, project: str, enough: int, linger: float, without: Container[Key]
    ) -> tuple[Collection[Key], float]:
        """The keys that have enough or have waited long enough; when the next one has."""
        now, next_due = trio.current_time(), inf
        due = set()
        for key, (events, since) in self._queued.get(project, {}).items():
            if key in without:
                continue
            if events >= enough or since + linger <= now:
                due.add(key)
            else:
                next_due = min(next_due, since + linger)
        return due, next_due
