"""Lets one hostile client end only itself: the one place where any exception is caught."""

from collections.abc import Awaitable, Callable
from math import inf

import structlog
import trio

log = structlog.get_logger("accept")

HINT = "this is a mistake of the agent's: please report it with these lines"
# What one client can do thousands of times a second must not fill the log; the first time tells enough.
TOLD_SECONDS = 60.0


class Guard:
    """Stands between the clients of one source and the others."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._told = -inf
        self._times = 0

    async def keep(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do one client's work; an exception that nobody foresaw is logged and ends that client alone."""
        try:
            await work()
        except Exception:
            self._times += 1
            if trio.current_time() - self._told >= TOLD_SECONDS:
                text = "a client's work failed; the others go on"
                log.exception(text, what=self._what, times=self._times, hint=HINT)
                self._told, self._times = trio.current_time(), 0
