"""Tells a delivery when there is something for it to take, without anybody polling."""

from collections.abc import Container, Mapping

import trio

from agent.buffer.lanes import Lane


class Waiting:
    """How many events of each project and key may be leased, and who waits for them."""

    def __init__(self) -> None:
        self._events: dict[str, dict[str | None, int]] = {}
        self._more = trio.Event()

    def show(self, changed: Mapping[Lane, int]) -> None:
        """So many there are now of these."""
        more = False
        for (project, key), events in changed.items():
            lanes = self._events.setdefault(project, {})
            more = more or events > lanes.get(key, 0)
            if events > 0:
                lanes[key] = events
            else:
                lanes.pop(key, None)
        if more:
            self._more.set()
            self._more = trio.Event()

    async def ready(self, project: str, events: int, linger: float, without: Container[str | None]) -> None:
        """See `Buffer.ready`."""
        while not self._there_are(1, project, without):
            await self._more.wait()
        with trio.move_on_after(linger):
            while not self._there_are(events, project, without):
                await self._more.wait()

    def _there_are(self, enough: int, project: str, without: Container[str | None]) -> bool:
        found = 0
        for key, events in self._events.get(project, {}).items():
            if key not in without:
                found += events
                if found >= enough:
                    return True
        return False
