"""Reads the rows of chunks, and copies the whole file, for people; changes nothing."""

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

from agent import crash
from agent.buffer import BufferBroken, Shown, first_of
from agent.buffer.file import PAGE_BYTES, disk_bytes
from agent.buffer.rows import chunk_of

NEWEST = "SELECT ifnull(max(id), 0) FROM chunk"
BEYOND = """SELECT id, project, key, events, size, crc, received_at, boot, monotonic, packed, marks, burials,
    seal FROM chunk WHERE id > ? AND id <= ? ORDER BY id"""

# Between two such steps whoever waits for a commit gets it: 4 MiB are some 3 ms of a page cache's copying.
STEP_PAGES = 256


class NoRoom(BufferBroken):
    """The disk has no room for a copy now."""

    exit_code = 75


class Copies:
    """The table `chunk` as it is, and the database as a file of its own."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def newest(self) -> int:
        """See `Contents.newest`."""
        newest: int = self._connection.execute(NEWEST).fetchone()[0]
        return newest

    def beyond(self, after: int, upto: int, size: int) -> list[Shown]:
        """See `Contents.beyond`."""
        return first_of(self._shown(after, upto), size)

    def _shown(self, after: int, upto: int) -> Iterator[Shown]:
        """Those that are as they were written; delivery counts the others."""
        for ident, project, key, *rest in self._connection.execute(BEYOND, (after, upto)):
            if (chunk := chunk_of((project, key), rest)) is not None:
                yield ident, chunk

    def copy(self, limit: int, pause: Callable[[], None]) -> IO[bytes]:
        """A copy that has no name and is gone when it is closed.

        SQLite's backup: what this connection writes in a `pause`, between two steps, is written into the copy
        too, so that it is what the database is at the end. It lies beside the database, whose disk must keep
        room for what the buffer may still grow by, up to `limit` bytes.
        """
        folder = self._path.parent
        size = self._connection.execute("PRAGMA page_count").fetchone()[0] * PAGE_BYTES
        disk = os.statvfs(folder)
        if disk.f_bavail * disk.f_frsize < size + max(0, limit - disk_bytes(self._path)):
            raise NoRoom(
                f"{folder}: the disk has no room for a copy of {size // 2**20:,} MiB beside the buffer",
                "make room, or stop the agent and copy the buffer's files",
            )
        number, name = tempfile.mkstemp(prefix=f"{self._path.name}.copy-", dir=folder)
        crash.point("backup.named")
        file = os.fdopen(number, "rb")
        try:
            self._copy_into(name, pause)
        except BaseException:
            file.close()
            raise
        crash.point("backup.copied")
        return file

    def _copy_into(self, name: str, pause: Callable[[], None]) -> None:
        try:
            target = sqlite3.connect(name, isolation_level=None)
        finally:
            os.unlink(name)  # it is open: whatever is killed now, nothing stays on the disk
        copy_into(self._connection, target, pages=STEP_PAGES, progress=lambda *_: pause())


def copy_into(
    connection: sqlite3.Connection,
    target: sqlite3.Connection,
    *,
    pages: int = -1,
    progress: Callable[[int, int, int], object] | None = None,
) -> None:
    """The whole database by SQLite's backup, so many pages at a time, all by default; `target` is closed."""
    with closing(target):
        # Nobody needs half a copy: no journal, which would have a name, and no sync.
        target.execute("PRAGMA journal_mode = OFF")
        target.execute("PRAGMA synchronous = OFF")
        connection.backup(target, pages=pages, progress=progress)
