"""Frames NDJSON: cuts a byte stream into whole lines, however the network cut it, in bounded memory."""

from itertools import islice
from typing import NamedTuple

from agent.events import SAMPLE_BYTES

# What makes a line no longer than it looks: all that `bytes.isspace` knows but the newline.
_WHITE = b" \t\r\v\f"
# More of a byte among so many first ones are many: measured, both ways take as long where it is every 40th.
PROBED_BYTES, MANY = 4096, 100


def count_byte(blob: bytes, byte: bytes) -> int:
    """How often a byte occurs.

    `bytes.count` looks at each byte, `replace` only at those it finds, which of many takes ten times as long.
    """
    if blob.count(byte, 0, PROBED_BYTES) > MANY:
        return blob.count(byte)
    return len(blob) - len(blob.replace(byte, b""))


def count_lines(blob: bytes) -> int:
    """How many lines hold more than white space."""
    full = blob.translate(None, _WHITE)
    while b"\n\n" in full:
        full = full.replace(b"\n\n", b"\n")
    full = full.strip(b"\n")
    return count_byte(full, b"\n") + 1 if full else 0


def first_lines(blob: bytes, count: int) -> bytes:
    """The beginning of a blob with so many lines that hold more than white space, of which it has more."""
    lines = blob.split(b"\n")
    full = (place for place, line in enumerate(lines) if line and not line.isspace())
    end = next(islice(full, count, None))
    return b"\n".join((*lines[:end], b""))


class Unfinished(NamedTuple):
    """What a reader holds between two reads: with it another reader goes on where this one stopped.

    `skipping` is more than 0 while the rest of what was refused is skipped. Of counted frames it is how many
    bytes, and `due` how many the unfinished one has; `counted` is None while the framing is not known.
    """

    held: bytes
    skipping: int = 0
    due: int = 0
    counted: bool | None = False


class LineReader:
    """One connection's lines: bytes in as they come, whole lines out, each ended by a newline.

    An unfinished line longer than `longest` bytes is refused: its beginning is kept as a sample, the rest
    is skipped to its newline, and the lines around it are not touched. (One that grows too long only with
    the bytes that end it is handed on, for the door to refuse.)
    """

    due = False  # the end of the bytes ends a line too

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._partial: list[bytes] = []
        self._skipping = False
        self.pending = 0  # bytes of the unfinished line that are held
        self.refused: bytes | None = None  # the beginning of a line refused after the last whole one

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` completes; what is left of it waits for the next call."""
        cut = data.rfind(b"\n") + 1
        if not cut:
            self._hold(data)
            return b""
        if self._skipping:
            data, cut = self._skip(data, cut)
        if not self._partial:
            whole = data if cut == len(data) else data[:cut]
        else:
            whole = b"".join((*self._partial, data[:cut]))
            self._partial.clear()
            self.pending = 0
        if cut < len(data):
            self._hold(data[cut:])
        return whole

    def _skip(self, data: bytes, cut: int) -> tuple[bytes, int]:
        """Leave out the end of a line that was refused."""
        first = data.index(b"\n") + 1
        self._skipping = False
        return data[first:], cut - first

    def _hold(self, data: bytes) -> None:
        """Keep the beginning of a line, unless it is already too long."""
        if self._skipping or not data:
            return
        self._partial.append(data)
        self.pending += len(data)
        # One more than the longest: a carriage return may yet be followed by the newline.
        if self.pending > self._longest + 1:
            self.refuse()

    def refuse(self) -> None:
        """Refuse the unfinished line now: it is counted, and the rest of it skipped."""
        self.refused = b"".join(self._partial)[:SAMPLE_BYTES]
        self._partial.clear()
        self.pending = 0
        self._skipping = True

    def take_refused(self) -> bytes | None:
        """The beginning of the line that the last `feed` or `refuse` gave up, once."""
        refused, self.refused = self.refused, None
        return refused

    def begin_anew(self) -> None:
        """What comes next may be framed in another way: lines are not."""

    def unfinished(self) -> Unfinished:
        """What is held now."""
        return Unfinished(b"".join(self._partial), int(self._skipping))

    def resume(self, unfinished: Unfinished) -> None:
        """Go on where another reader stopped."""
        self._skipping = unfinished.skipping > 0
        self._hold(unfinished.held)  # which may be longer than is allowed now

    def finish(self) -> bytes:
        """The last line, which no newline ended; empty where there is none."""
        last = b"".join(self._partial)
        self._partial.clear()
        self.pending = 0
        return last
