"""The words between what is sent, what comes back and what follows: batches and verdicts."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Literal

import msgspec

from agent.events import HISTORICAL, Chunk

Refusal = Literal["key", "billing", "host"]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What one POST carries: events of one project and key, whose clocks agree.

    `number` tells it from the shipment's other batches; what is left of it after a partial answer has the
    same. `long` where v1 would drop an event for a name or id over 200 bytes.
    """

    project: str
    key: str | None
    pieces: tuple[Chunk, ...]
    events: int
    size: int
    number: int = 0
    long: bool = False

    @property
    def historical(self) -> bool:
        """Whether its senders say that these are old events."""
        return bool(self.pieces[0].marks & HISTORICAL)


class Accepted(msgspec.Struct, frozen=True):
    """PostHog has taken the batch."""


class Split(msgspec.Struct, frozen=True):
    """The batch is too large."""

    reason: str


class Rejected(msgspec.Struct, frozen=True):
    """PostHog will never take this batch as it is; `reason` is its own text."""

    reason: str


class Retry(msgspec.Struct, frozen=True):
    """The same batch may be taken later, but not before `after` seconds have passed.

    `cut` where a connection was there and ended, or fell silent, without an answer: so it may be that the
    batch is too large for the way.
    """

    after: float | None
    reason: str
    cut: bool = False


class Refused(msgspec.Struct, frozen=True):
    """It is not about this batch: somebody must mend the key, the bill or the host."""

    hold: Refusal
    why: str


class Judged(msgspec.Struct, frozen=True):
    """PostHog's v1 protocol has judged each event by itself; by uuid, in small letters.

    `dead` with its reason will never be taken, `again` was not stored and may be sent again after `after`
    seconds. Of all others, which were taken, `warned` had a remark.
    """

    dead: Mapping[str, str]
    again: AbstractSet[str]
    after: float | None
    warned: int


class Absent(msgspec.Struct, frozen=True):
    """The v1 protocol is not served there."""

    why: str


Verdict = Accepted | Split | Rejected | Retry | Refused | Judged


class Damaged(msgspec.Struct, frozen=True):
    """Not a reply: a chunk that cannot be opened, so that its batch cannot be built."""

    chunk: Chunk
    why: str


def for_pace(batch: Batch, verdict: Verdict | Damaged | None) -> Verdict | None:
    """What a verdict says of PostHog's state: who judges by name takes events, unless none was stored."""
    match verdict:
        case Judged(again=again, after=after) if len(again) >= batch.events:
            return Retry(after, "PostHog could not store the events")
        case Judged():
            return Accepted()
        case Damaged():
            return None
    return verdict
