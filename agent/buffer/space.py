"""What to do on a disk that is full, or is said to be."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from agent.buffer.file import PAGE_BYTES, Room, is_damage, is_full
from agent.buffer.reserve import Reserve

# So much is given back at once, as the change itself needs room.
STEP_BYTES = 1024 * 1024


def give_back_room(connection: sqlite3.Connection, reserve: Reserve, room: Room) -> None:
    """Let the disk have the log and what is free in the database, until the reserve can be made again."""
    for _ in range(room.reserve // STEP_BYTES + 2):
        with suppress(sqlite3.Error):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if reserve.hold() or not connection.execute("PRAGMA freelist_count").fetchone()[0]:
            return
        with suppress(sqlite3.Error):
            connection.execute(f"PRAGMA incremental_vacuum({STEP_BYTES // PAGE_BYTES})").fetchall()


def is_torn(connection: sqlite3.Connection, path: Path, room: Room, error: sqlite3.Error) -> bool:
    """Whether a disk that has room is said to be full: so SQLite does where a page points beyond the file."""
    disk = os.statvfs(path.parent)
    if not is_full(error) or disk.f_bavail * disk.f_frsize < room.wal + room.group:
        return False
    try:
        return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok")
    except sqlite3.Error as found:
        return is_damage(found)
