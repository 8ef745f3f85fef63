"""Room on the disk that is kept for deliveries: whatever fills the disk, they go on and empty it.

To settle what was delivered the log needs some pages, and to write the log back the database may have to grow
by as much. A file beside it holds that room, and is given up when the disk is full. Until it is made again
nothing new is taken.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

from agent import crash

FULL = "the disk is full: what deliveries need of it is kept for them"


class Reserve:
    """The file `.reserve` beside a database. `trouble` says why it could not be made the last time."""

    def __init__(self, database: Path, size: int) -> None:
        self._path = database.with_name(database.name + ".reserve")
        self._size = size
        self.held = False
        self.trouble = ""

    def hold(self) -> bool:
        """Have it there, made if need be; False where the disk has no room for it, or takes nothing."""
        if not self.held:
            self.held = self._made()
        return self.held

    def _made(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            return self._failed(error)
        crash.point("reserve.named")
        try:
            os.ftruncate(descriptor, min(self._size, os.fstat(descriptor).st_size))
            os.posix_fallocate(descriptor, 0, self._size)
        except OSError as error:
            self.give_up()
            return self._failed(error)
        finally:
            os.close(descriptor)
        return True

    def _failed(self, error: OSError) -> bool:
        """A disk that is full passes; one that is read-only or broken has to be mended."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        in_the_way = error.errno in (errno.EISDIR, errno.ELOOP)  # something else has the name
        why = "this is no file: move it away" if in_the_way else error.strerror
        self.trouble = FULL if full else f"{self._path}: {why}"
        return False

    def give_up(self) -> None:
        """Let others have its room."""
        self.held = False
        with suppress(OSError):
            os.unlink(self._path)
