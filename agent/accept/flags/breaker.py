"""Whether to ask a host that may be away: one call in a while finds out, the others need not wait for it.

Times are seconds of one steady clock, given as arguments.
"""

# One failure may be a call's own fault, and two happen on any network; three without an answer between are
# an outage. Who calls in the meantime waits for its timeout at most three times.
OUTAGE = 3
# Obeyed so far: PostHog counts calls by the minute (`posthog/rate_limit.py`).
LONGEST_AFTER = 60.0


class Breaker:
    """Closed while the host answers; open after `OUTAGE` failures in a row, until it answers again.

    While it is open one call each `wait` seconds is let through. None takes longer than that, so there is
    never more than one, and one that was cancelled holds nothing up.
    """

    def __init__(self, wait: float) -> None:
        self._wait = wait
        self._failures = 0
        self._next = 0.0

    @property
    def open(self) -> bool:
        """Whether there is an outage."""
        return self._failures >= OUTAGE

    def admits(self, now: float) -> bool:
        """Whether a call may ask the host now; while open it then is the one that finds out."""
        if not self.open:
            return True
        if now < self._next:
            return False
        self._next = now + self._wait
        return True

    def answered(self) -> bool:
        """The host spoke. Whether that ended an outage."""
        ended = self.open
        self._failures = 0
        return ended

    def failed(self, now: float, after: float = 0.0) -> bool:
        """It did not, or asked to be left alone for `after` seconds. Whether that began an outage."""
        self._failures += 1
        self._next = max(self._next, now + max(self._wait, min(after, LONGEST_AFTER)))
        return self._failures == OUTAGE
