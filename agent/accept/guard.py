"""Lets one hostile client end only itself: the one place where any exception is caught."""

from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger("accept")


async def guarded(work: Callable[[], Awaitable[None]], what: str) -> None:
    """Do the work of one client; an exception that nobody foresaw is logged and ends that client alone."""
    try:
        await work()
    except Exception:
        log.exception("a client's work failed; the others go on", what=what)
