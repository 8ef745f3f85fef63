"""The last hour in samples: what came in, what went out, and what waited.

One sample costs a copy of the books and the buffer's figures, whoever looks; all else is made when asked for.
Its times are of the boot's own clock, so that pictures are right on a host whose wall clock is not.
"""

from collections import deque
from itertools import pairwise
from typing import Any, NamedTuple

from agent.buffer import Books, Stats
from agent.events import Instant

EVERY_SECONDS = 10
# An hour of intervals, each between two samples.
MOST_SAMPLES = 3600 // EVERY_SECONDS + 1


class Sample(NamedTuple):
    """Totals of the books and what the buffer held, at one moment (µs)."""

    at: int
    accepted: int
    delivered: int
    waiting: int
    oldest: float


def sample(books: Books, stats: Stats, now: Instant) -> Sample:
    """What the pictures need of this moment."""
    totals = {"accepted": 0, "delivered": 0}
    for entry, total in books.items():
        if entry.joint in totals:
            totals[entry.joint] += total
    oldest = 0.0 if stats.oldest is None else max(0, now.wall - stats.oldest) / 1_000_000
    return Sample(now.monotonic, totals["accepted"], totals["delivered"], stats.events, oldest)


class History:
    """The samples of the last hour; those of an earlier process are not among them."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=MOST_SAMPLES)

    def add(self, newest: Sample) -> None:
        """Keep one more, and forget the one of an hour ago."""
        self._samples.append(newest)

    def document(self, now: int) -> dict[str, Any]:
        """Each interval's rates, and what the buffer held at its end, as lists of equal length.

        `now` (µs) is of the samples' clock.
        """
        rows = [_interval(earlier, later, now) for earlier, later in pairwise(self._samples)]
        names = ("ago_seconds", "in_per_second", "out_per_second", "waiting", "oldest_seconds")
        columns = zip(*rows, strict=True) if rows else ((),) * len(names)
        return {"every_seconds": EVERY_SECONDS, **dict(zip(names, map(list, columns), strict=True))}


def _interval(earlier: Sample, later: Sample, now: int) -> tuple[float, ...]:
    """A buffer that lost its books to damage began anew: what it then counts is no negative rate."""
    seconds = max(later.at - earlier.at, 1) / 1_000_000
    return (
        round((now - later.at) / 1_000_000, 1),
        round(max(0, later.accepted - earlier.accepted) / seconds, 2),
        round(max(0, later.delivered - earlier.delivered) / seconds, 2),
        later.waiting,
        round(later.oldest, 1),
    )
