"""Whether the buffer's file can be written, told by the log: a line when that fails, one when it is over."""

from math import inf

import structlog

log = structlog.get_logger("buffer")

# A disk that is all but full takes a small write, then refuses a large one, each second: it is one trouble.
QUIET_SECONDS = 10.0


class Failing:
    """Writes that fail, of which the last tells by its trouble."""

    def __init__(self) -> None:
        self.due = inf  # when it has ended, on the clock that `look` is told

    def look(self, trouble: str, now: float) -> None:
        """See why the last write failed, empty if it did not, at this time (s), and tell what is new."""
        if trouble:
            if self.due == inf:
                hint = "make room on the disk, or mend it; the agent tries again every second"
                log.error("the buffer cannot be written; senders wait", error=trouble, hint=hint)
            self.due = now + QUIET_SECONDS
        elif now >= self.due:
            log.info("the buffer is written again")
            self.due = inf
