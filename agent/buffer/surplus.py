"""Says when the file gives free pages back: those that nobody needed for a while, in small steps.

Else a file that held a backlog is large for good: on a host that always has some events it is never idle.
Nothing is done here; time is an argument, in seconds.
"""

from math import inf

# Pages that stayed free for so long are more than the coming and going of deliveries needs.
WATCHED_SECONDS = 5.0
# 1 MiB: measured, 6 ms with its sync, for which a put may have to wait.
STEP_PAGES = 64
# Between two steps: 10 GiB are given back in ten minutes, and the file is free nine tenths of the time.
STEP_SECONDS = 0.05


class Surplus:
    """The free pages of one file, looked at whenever something was done with it."""

    def __init__(self) -> None:
        self._least = 0  # how many were free at every look since the last turn
        self._spare = 0  # how many are not needed, as they were free all the time before
        self._turn = 0.0  # when the watching begins anew
        self._step = 0.0  # before it nothing is given back

    def step(self, free: int, now: float) -> int:
        """How many of the free pages are to be given back now."""
        self._least, self._spare = min(self._least, free), min(self._spare, free)
        if now >= self._turn:
            self._spare, self._least, self._turn = self._least, free, now + WATCHED_SECONDS
        if not self._spare or now < self._step:
            return 0
        pages = min(self._spare, STEP_PAGES)
        self._spare, self._least, self._step = self._spare - pages, self._least - pages, now + STEP_SECONDS
        return pages

    def due(self, free: int) -> float:
        """When to look again though nothing is done: never where no page is free."""
        if not free:
            return inf
        return self._step if self._spare else self._turn
