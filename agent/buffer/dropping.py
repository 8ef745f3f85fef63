"""Whether a full buffer drops events, told by its books: a line when it begins, and one when it has ended."""

from math import inf
from typing import Literal

import structlog

from agent.advice import WHEN_FULL
from agent.buffer import Books

log = structlog.get_logger("buffer")

# What is dropped within a minute of the last is of the same trouble: a sender that comes each half a minute
# must not fill the log.
QUIET_SECONDS = 60.0

REASONS = {"full_oldest", "full_newest"}


class Dropping:
    """What a buffer drops under its `when_full`, of which it never drops anything under `block`."""

    def __init__(self, when_full: Literal["block", "drop_oldest", "drop_newest"], books: Books) -> None:
        self._what = WHEN_FULL[when_full]
        self._drops = when_full != "block"
        self._total = self._before = _dropped(books)
        self.due = inf  # when it has ended, on the clock that `look` is told

    @property
    def events(self) -> int:
        """How many were dropped since it began; 0 while nothing is."""
        return self._total - self._before

    def look(self, books: Books, now: float) -> None:
        """See what the books say at this time (s), and tell what is new."""
        if not self._drops:
            return
        total = _dropped(books)
        if total > self._total:
            if self.due == inf:
                hint = "mend what holds delivery (capture-agent status), or raise buffer.max_size and reload"
                log.warning(f"the buffer is full; {self._what}", hint=hint)
            self._total, self.due = total, now + QUIET_SECONDS
        elif now >= self.due:
            log.info("the buffer drops no more events", dropped=self.events)
            self._before, self.due = total, inf


def _dropped(books: Books) -> int:
    return sum(total for entry, total in books.items() if entry.joint == "shed" and entry.reason in REASONS)
