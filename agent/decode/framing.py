"""Frames syslog on streams (RFC 6587): counted frames or ended lines in, whole lines out."""

import re

from agent.decode.ndjson import LineReader, Unfinished
from agent.events import SAMPLE_BYTES

# MSG-LEN SP (RFC 6587, 3.4.1). Nine digits are more than any frame; what some senders put between two frames
# is passed over.
_BETWEEN = b"\r\n\0"
_COUNT = re.compile(rb"[\r\n\0]*([1-9][0-9]{0,8}) ")
_UNFINISHED_COUNT = re.compile(rb"[\r\n\0]*(?:[1-9][0-9]{0,8})?")
# A stream is counted if it begins so: text may begin with a number too, a frame holds a PRI or JSON.
_COUNTED = re.compile(rb"[1-9][0-9]{0,8} [<{@]")
_UNDECIDED = re.compile(rb"(?:[1-9][0-9]{0,8} ?)?")
# A frame may end with the line end of its sender, which belongs to no message.
_LINE_END = 2


class FrameReader:
    """One connection's syslog: bytes in as they come, whole lines out, each ended by a newline.

    Its first bytes tell its framing. In counted frames a newline is part of the message, and becomes NUL;
    else a newline or a NUL (glibc) ends one. Where a count is broken, what follows is taken as lines.

    An unfinished frame or line longer than `longest` bytes is refused: its beginning is kept as a sample, the
    rest is skipped. (One that comes whole is handed on, for the door to refuse.)
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._lines = LineReader(longest)
        self._counted: bool | None = None  # None until enough has come to tell
        self._parts: list[bytes] = []  # of the unfinished frame, or of its count
        self._held = 0
        self._due = 0  # bytes of the unfinished frame; 0 while its count is not known
        self._skipping = 0  # bytes that are still to come of a refused frame
        self._refused: bytes | None = None

    @property
    def pending(self) -> int:
        """How many bytes of the unfinished frame or line are held."""
        return self._held + self._lines.pending

    @property
    def due(self) -> bool:
        """Whether a counted frame has begun of which more must come: an end now cuts it off."""
        return self._due > 0 or (self._counted is True and self._held > 0)

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` completes; what is left of it waits for the next call."""
        if self._counted is False:
            return self._feed_lines(data)
        if self._skipping:
            skipped = min(self._skipping, len(data))
            self._skipping -= skipped
            data = data[skipped:]
        if self._held + len(data) < self._due:
            self._hold(data)
            return b""
        data = b"".join((*self._parts, data))
        self._parts.clear()
        self._held = 0
        if self._counted is None:
            data = data.lstrip(_BETWEEN)
            if _UNDECIDED.fullmatch(data):
                self._hold(data)
                return b""
            self._counted = _COUNTED.match(data) is not None
        return self._feed_frames(data) if self._counted else self._feed_lines(data)

    def _feed_frames(self, data: bytes) -> bytes:
        """Cut whole frames off `data`, which begins where a frame or its count does."""
        frames: list[bytes] = []
        at = 0
        if self._due:
            frames.append(data[: self._due])
            at, self._due = self._due, 0
        while count := _COUNT.match(data, at):
            start = count.end()
            end = start + int(count[1])
            if end > len(data):
                self._due = end - start
                self._hold(data[start:])
                break
            frames.append(data[start:end])
            at = end
        whole = b"".join([frame.replace(b"\n", b"\0") + b"\n" for frame in frames])
        if count is not None:
            return whole
        if _UNFINISHED_COUNT.fullmatch(data, at):
            self._hold(data[at:].lstrip(_BETWEEN))
            return whole
        self._counted = False
        return whole + self._feed_lines(data[at:])

    def _feed_lines(self, data: bytes) -> bytes:
        return self._lines.feed(data.replace(b"\0", b"\n") if b"\0" in data else data)

    def _hold(self, data: bytes) -> None:
        """Keep the beginning of a frame; of one that is too long, no more than tells who sent it."""
        if data:
            self._parts.append(data)
            self._held += len(data)
        if self._due > self._longest + _LINE_END and self._held >= SAMPLE_BYTES:
            self.refuse()

    def refuse(self) -> None:
        """Refuse the unfinished frame or line now: it is counted, and the rest of it skipped."""
        if self._due:
            self._refused = self._take()[:SAMPLE_BYTES]
            return
        self._counted = False
        self._feed_lines(self._take())
        self._lines.refuse()

    def _take(self) -> bytes:
        """What is held, no longer held; of a frame, the rest will be skipped."""
        held = b"".join(self._parts)
        if self._due:
            self._skipping = self._due - len(held)
        self._parts.clear()
        self._held = self._due = 0
        return held

    def take_refused(self) -> bytes | None:
        """The beginning of what the last `feed` or `refuse` gave up, once."""
        refused, self._refused = self._refused, None
        return self._lines.take_refused() if refused is None else refused

    def begin_anew(self) -> None:
        """After a line by itself: what comes next tells its framing anew. After a frame nothing changes."""
        if not self._counted:
            self._counted = None

    def unfinished(self) -> Unfinished:
        """What is held now."""
        if self._counted is False:
            return self._lines.unfinished()
        return Unfinished(b"".join(self._parts), self._skipping, self._due, self._counted)

    def resume(self, unfinished: Unfinished) -> None:
        """Go on where another reader stopped."""
        self._counted = unfinished.counted
        if self._counted is False:
            self._lines.resume(unfinished)
            return
        self._skipping, self._due = unfinished.skipping, unfinished.due
        self._hold(unfinished.held)

    def finish(self) -> bytes:
        """The last frame or line, which did not come to its end; empty where there is none."""
        return self._take().replace(b"\n", b"\0") or self._lines.finish()
