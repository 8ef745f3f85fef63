"""What a sync has failed for is in no log that is gone on with.

The kernel tells once of writes that failed, takes them for done, and says of the next sync that all is well
(fsync(2)). The commit that was refused for it stands in the log, whole by its checksums, and perhaps on no
disk. A shorter one in its place would leave its end behind, like a log that is damaged in its middle; and
a next start takes it for good, and would go on behind what a power cut may take away.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.buffer.file import BEGIN_ANEW, is_full

# What is in memory at a time: a log has up to 24 MiB.
STEP_BYTES = 1024 * 1024


class Doubt:
    """Whether the log of an open database may hold what was refused: then it begins anew before a commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.open = False

    def settle(self) -> None:
        """Have none. Raises sqlite3.Error where the disk does not let it."""
        if self.open:
            self._connection.execute(BEGIN_ANEW)
            self.open = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The block is one commit."""
        self.settle()
        try:
            yield
        except sqlite3.Error as error:
            # A disk that is full says so at a write: then the log has no end of that commit.
            self.open = self.open or not is_full(error)
            raise


def write_anew(log: Path) -> None:
    """Have a log on the disk as it is read, before anything relies on it; nobody has it open."""
    descriptor = os.open(log, os.O_RDWR | os.O_CLOEXEC)
    try:
        at = 0
        while part := os.pread(descriptor, STEP_BYTES, at):
            at += os.pwrite(descriptor, part, at)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
