"""How old chunks are, so that `max_age` takes none for what the host's clock was set to.

Ids rise as chunks are put, so they are the order of time, whatever the wall clock did meanwhile. What is put
again later than it came (a replayed dead letter) only waits until it is the oldest.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from agent.clock import Clock
from agent.events import Chunk, Instant

# 2026-01-01, the year in which the agent was written: a clock that shows less has not been set.
SET = 1_767_225_600_000_000

# In µs. What was of unknown age is looked at again so often: `max_age` is meant in hours or days.
AGAIN = 60_000_000

# So many are looked at in one commit, which takes some milliseconds.
AT_ONCE = 1024


def age(stamped: Instant, now: Instant, ahead: Mapping[str, int]) -> int | None:
    """How long ago that was, in µs; None where no clock tells.

    In the same boot its own clock tells, which nobody sets. Of another boot it is the wall clocks, that one's
    as it was set at last. Where either was never set, or the two contradict each other, any age would be a
    guess, and none may cost an event that was acknowledged: it waits, within `max_size`.
    """
    if stamped.boot and stamped.boot == now.boot:
        return now.monotonic - stamped.monotonic
    came = stamped.monotonic + ahead[stamped.boot] if stamped.boot in ahead else stamped.wall
    return now.wall - came if SET <= came <= now.wall else None


class Ages:
    """Says which chunks are older than `max_age`, which is in seconds; 0 is never.

    `clocks` tells how far each boot's wall clock was ahead of its monotonic one (µs) at last. `after` is the
    id from which on to look: up to it no chunk's age was known, so that a large backlog of such is not read
    at each look.
    """

    def __init__(self, max_age: float, clocks: Callable[[], Mapping[str, int]]) -> None:
        self.bounded = max_age > 0
        self.after = 0
        self._most = int(max_age * 1_000_000)
        self._clocks = clocks
        self._clock = Clock()
        self._began = self._clock.now().monotonic

    def too_old(self, chunks: Iterable[tuple[int, Instant]], leased: Container[int]) -> list[int]:
        """The ids of those that are too old and not leased; they are beyond `after`, in the order of ids.

        Reads no further than to the first that is young, as what lies behind it came later.
        """
        now, ahead = self._clock.now(), self._clocks()
        found: list[int] = []
        passing = True
        for number, (ident, stamped) in enumerate(chunks):
            if number == AT_ONCE:
                return found
            old = age(stamped, now, ahead)
            passing = passing and old is None
            if passing:
                self.after = ident
            if old is None or ident in leased:
                continue
            if old <= self._most:
                break
            found.append(ident)
        if now.monotonic >= self._began + AGAIN:
            self.after, self._began = 0, now.monotonic
        return found

    def came(self, stamped: Instant | None) -> int | None:
        """When (µs) that was, by the wall clock as it is set now; what nobody can tell counts as now."""
        if stamped is None:
            return None
        now = self._clock.now()
        return now.wall - (age(stamped, now, self._clocks()) or 0)

    def until(self, chunks: Sequence[Chunk]) -> int | None:
        """When (µs, by this boot's own clock) the oldest is too old; None where that is never.

        One of unknown age counts as new: its lease ends after `max_age`, and then it is looked at again.
        """
        if not self.bounded:
            return None
        now, ahead = self._clock.now(), self._clocks()
        return now.monotonic + self._most - max(age(stamp(one), now, ahead) or 0 for one in chunks)


def stamp(chunk: Chunk) -> Instant:
    """When a chunk came, by the clocks of its boot."""
    return Instant(chunk.received_at, chunk.monotonic, chunk.boot)
