"""In which clock a chunk was stamped, and what time it is there: so that no event loses its instant.

Stored times are never rewritten, as they are part of PostHog's identity of an event. PostHog takes the time
of an event less the time at which the request says that it was sent, and adds its own
(`rust/common/types/src/timestamp.rs`). So that second time is told in the clock in which the chunk was
stamped, wrong as that may have been: the difference is then the event's true age.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from agent.events import Chunk, Instant

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# PostHog moves a batch's events by one offset; two chunks further apart than this need two batches. Within
# it are the readings of one clock that was never stepped, which differ by microseconds.
AGREEMENT = 1_000_000


class Clocks(NamedTuple):
    """What is known of other clocks than this boot's, in microseconds.

    `ahead` is how far each boot's wall clock was ahead of its monotonic one when it was last looked at;
    `posthog` how far PostHog's clock is ahead of this boot's monotonic one, by its last answer, or None.
    """

    ahead: Mapping[str, int]
    posthog: int | None


def told(chunk: Chunk, now: Instant, clocks: Clocks) -> int | None:
    """The present moment in the clock in which the chunk was stamped, in microseconds.

    - In the same boot that clock is continued by the monotonic one, so that a step of the wall clock since
      then does not move the events.
    - Of another boot it is known whether its clock was set after the chunk was stamped, and by how much; what
      it was set to is taken to be what the wall clock shows now.
    - Where the wall clock is then behind the chunk, this boot's clock has not been set yet (a board that
      boots in 1970); PostHog's own stands for it. None where that is not known either, and the chunk's is
      right as it is.
    """
    ahead = chunk.received_at - chunk.monotonic
    if chunk.boot and chunk.boot == now.boot and now.monotonic >= chunk.monotonic:
        return now.monotonic + ahead
    wrong = ahead - clocks.ahead.get(chunk.boot, ahead)
    if now.wall + wrong >= chunk.received_at:
        return now.wall + wrong
    if clocks.posthog is not None:
        return max(chunk.received_at, now.monotonic + clocks.posthog + wrong)
    return None if abs(wrong) <= AGREEMENT else chunk.received_at


def written(moment: int) -> str:
    """A time in microseconds as PostHog reads it: RFC 3339, UTC, to the millisecond."""
    return (EPOCH + timedelta(microseconds=moment)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def agree(one: Chunk, other: Chunk) -> bool:
    """Whether one `told` is true for both: the same boot, and no step of the clock between them."""
    step = (one.received_at - one.monotonic) - (other.received_at - other.monotonic)
    return one.boot == other.boot and abs(step) <= AGREEMENT
