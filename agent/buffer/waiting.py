"""Tells a delivery when there is something for it to take, without anybody polling."""

from collections.abc import Mapping

import trio


class Waiting:
    """How many events of each project may be leased, and who waits for them."""

    def __init__(self) -> None:
        self._events: dict[str, int] = {}
        self._more = trio.Event()

    def show(self, events: Mapping[str, int]) -> None:
        """So many there are now."""
        more = any(count > self._events.get(project, 0) for project, count in events.items())
        self._events = dict(events)
        if more:
            self._more.set()
            self._more = trio.Event()

    async def ready(self, project: str, events: int, linger: float) -> None:
        """Return when `events` of a project are there, or some have been for `linger` seconds."""
        while self._events.get(project, 0) <= 0:
            await self._more.wait()
        with trio.move_on_after(linger):
            while self._events.get(project, 0) < events:
                await self._more.wait()
