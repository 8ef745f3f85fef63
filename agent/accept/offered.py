"""What a source hands to its putter, a read at a time, and hears of it, a part at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import trio

from agent.decode.ndjson import count_byte
from agent.events import Read


class Refused(NamedTuple):
    """So many lines behind each other that were refused, from which on (from 0), and why."""

    line: int
    reason: str
    lines: int = 1


class Outcome(NamedTuple):
    """What became of a read's next part: how many lines it had, and which of them were refused."""

    lines: int
    refused: Sequence[Refused]


class Offered:
    """A read on its way; all of it has arrived once `settled` is set.

    `read` is what of it is not yet gathered for a put, `lines` about how many lines that has. Who wants to
    hear is told of each part as it arrives: to keep what became of every line takes more than the lines.
    """

    def __init__(
        self,
        read: Read,
        client: object = None,
        user: object = None,
        tell: Callable[[Outcome], None] | None = None,
    ) -> None:
        self.read = read
        self.client, self.user = client, user
        self.lines = count_byte(read.lines, b"\n")
        self.tell = tell
        self.settled = trio.Event()

    def split(self, lines: int) -> Read:
        """Take the first `lines` off; what is left comes as much later as it has lines before it."""
        read = self.read
        size = len(read.lines) - len(read.lines.split(b"\n", lines)[lines])
        at = read.at._replace(wall=read.at.wall + lines, monotonic=read.at.monotonic + lines)
        self.read = read._replace(lines=read.lines[size:], at=at)
        self.lines -= lines
        return Read(read.lines[:size], read.at, origin=read.origin)

    def restore(self, first: Read) -> None:
        """Take back what `split` has taken off."""
        self.read = self.read._replace(lines=first.lines + self.read.lines, at=first.at)
        self.lines += count_byte(first.lines, b"\n")


class Part(NamedTuple):
    """A whole read or a part of one, gathered for a put."""

    offered: Offered
    read: Read
    lines: int
    last: bool


def all_refused(known: Sequence[Refused], lines: int) -> Iterator[Refused]:
    """What was refused at the door, and as `buffer_full` what was not."""
    line = 0
    for refused in (*known, Refused(lines, "", 0)):
        if refused.line > line:
            yield Refused(line, "buffer_full", refused.line - line)
        if refused.lines:
            yield refused
        line = refused.line + refused.lines


def by_line(outcomes: Iterable[Outcome]) -> dict[int, str]:
    """Which lines of all parts together were refused, and why."""
    refused: dict[int, str] = {}
    before = 0
    for outcome in outcomes:
        for line, reason, lines in outcome.refused:
            refused |= dict.fromkeys(range(before + line, before + line + lines), reason)
        before += outcome.lines
    return refused
