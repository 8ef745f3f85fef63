"""Room on the disk that is kept for deliveries: whatever fills the disk, they go on and empty it.

To settle what was delivered the log needs some pages, and to write the log back the database may have to grow
by as much. A file beside it holds that room, and is given up when the disk is full. Until it is made again
nothing new is taken.
"""

import os
from contextlib import suppress
from pathlib import Path

from agent import crash


class Reserve:
    """The file `.reserve` beside a database."""

    def __init__(self, database: Path, size: int) -> None:
        self._path = database.with_name(database.name + ".reserve")
        self._size = size
        self.held = False

    def hold(self) -> bool:
        """Have it there, made if need be; False where the disk has no room for it."""
        if not self.held:
            self.held = self._made()
        return self.held

    def _made(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return False
        crash.point("reserve.named")
        try:
            os.ftruncate(descriptor, min(self._size, os.fstat(descriptor).st_size))
            os.posix_fallocate(descriptor, 0, self._size)
        except OSError:
            self.give_up()
            return False
        finally:
            os.close(descriptor)
        return True

    def give_up(self) -> None:
        """Let others have its room."""
        self.held = False
        with suppress(OSError):
            os.unlink(self._path)
