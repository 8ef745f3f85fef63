"""Reads the write-ahead log of a database frame by frame, beyond the first broken one, where SQLite stops."""

import os
import struct
import sys
from typing import NamedTuple

from agent.buffer.file import PAGE_BYTES

# The log begins with a header, each frame with a head before its page
# (https://www.sqlite.org/fileformat.html, 4.1).
HEADER, FRAME = 32, 24
MAGIC = 0x377F0682  # and one more where its checksums are of big-endian words


def is_page_size(said: int) -> bool:
    """Whether SQLite has pages of so many bytes."""
    return 512 <= said <= 32768 and said & (said - 1) == 0


class Frame(NamedTuple):
    """A page in the log: where its bytes are, and how many pages the database has after this commit, or 0."""

    page: int
    at: int
    pages: int
    sound: bool  # its checksum is right


class Log:
    """The frames of a write-ahead log that belong to its last use, each looked at for itself (section 4).

    A checksum goes on from that of the frame before, as written there: so one broken frame does not make
    those behind it doubtful, where SQLite stops.
    """

    def __init__(self, descriptor: int) -> None:
        header = os.pread(descriptor, HEADER, 0)
        self._descriptor = descriptor
        self._words, self.page_bytes = "<", PAGE_BYTES
        self.sound = False  # the header is
        if len(header) == HEADER:
            magic, _, said = struct.unpack_from(">III", header)
            self._words = ">" if magic == MAGIC + 1 else "<"
            self.sound = (
                magic in (MAGIC, MAGIC + 1)
                and is_page_size(said)
                and header[24:] == struct.pack(">II", *self._sum(header[:24], 0, 0))
            )
            self.page_bytes = said if self.sound else PAGE_BYTES
        self._sums = header[24:].ljust(8, b"\0")
        self._frame = FRAME + self.page_bytes
        size = os.fstat(descriptor).st_size
        self.count = max(0, size - HEADER) // self._frame
        if not self.sound:  # this machine wrote it
            self._words = "<" if sys.byteorder == "little" else ">"
        self._salts = header[16:24] if self.sound else self._salts_of_first()

    def _salts_of_first(self) -> bytes:
        """Those of the first frame that is as it was written: a hole may have taken more than the header."""
        one, two = struct.unpack(">II", self._sums)
        for number in range(self.count):
            frame = os.pread(self._descriptor, self._frame, HEADER + number * self._frame)
            summed = self._sum(frame[:8] + frame[FRAME:], one, two)
            one, two = struct.unpack_from(">II", frame, 16)
            if summed == (one, two) and frame[:4] != bytes(4):
                return frame[8:16]
        return os.pread(self._descriptor, 8, HEADER + 8)

    def commits(self) -> list[int]:
        """Behind how many frames each commit is, by what stands in their heads alone: cheap."""
        found = []
        for number in range(self.count):
            head = os.pread(self._descriptor, FRAME, HEADER + number * self._frame)
            if head[8:16] == self._salts and head[4:8] != bytes(4):
                found.append(number + 1)
        return found

    def frames(self) -> list[Frame]:
        """All of them, with what their checksums say; those of an earlier use are never sound."""
        found: list[Frame] = []
        one, two = struct.unpack(">II", self._sums)
        for number in range(self.count):
            at = HEADER + number * self._frame
            frame = os.pread(self._descriptor, self._frame, at)
            if len(frame) < self._frame:
                break
            page, pages = struct.unpack_from(">II", frame)
            summed = self._sum(frame[:8] + frame[FRAME:], one, two)
            one, two = struct.unpack_from(">II", frame, 16)
            sound = frame[8:16] == self._salts and summed == (one, two)
            found.append(Frame(page, at + FRAME, pages, sound))
        return found

    def committed(self) -> list[Frame]:
        """All up to the last sound commit; of a broken one, what can be read of it."""
        frames = self.frames()
        sound = [number for number, frame in enumerate(frames, 1) if frame.pages and frame.sound]
        return frames[: sound[-1]] if sound else []

    def _sum(self, data: bytes, one: int, two: int) -> tuple[int, int]:
        """SQLite's checksum, going on from that of what comes before."""
        for first, second in struct.iter_unpack(f"{self._words}II", data):
            one = (one + first + two) & 0xFFFFFFFF
            two = (two + second + one) & 0xFFFFFFFF
        return one, two
