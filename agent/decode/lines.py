"""What every decoder makes of reads: envelopes, refusals, and where each of them stood."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from agent.envelope import Envelope, Flaws
from agent.events import Read, Reject


class Lines(NamedTuple):
    """Reads that were decoded, the events in the order in which they came.

    `lines` is how many non-empty lines each read had. `places` says of which read and which of its lines each
    envelope is; None where every line is an event. `text` holds everything that the envelopes' sealed bytes
    hold, None where nobody has laid it together yet. `own` says which envelopes clients wrote as events,
    while others were made of text; None where all are alike.
    """

    lines: list[int]
    places: list[tuple[int, int]] | None
    envelopes: list[Envelope]
    rejects: list[Reject]
    text: bytes | None = None
    own: list[bool] | None = None


class Format(Protocol):
    """How a source's lines are written."""

    def decode(self, reads: Sequence[Read], flaws: Flaws) -> Lines:
        """Each non-empty line becomes one envelope or one reject; raises nothing."""
