"""How the file gives room back to the disk; what to do on one that is full, or is said to be."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from agent.buffer.doubt import Doubt
from agent.buffer.file import BEGIN_ANEW, PAGE_BYTES, Room, is_damage, is_full
from agent.buffer.reserve import Reserve

# So much is given back at once, as the change itself needs room.
STEP_BYTES = 1024 * 1024

WRITE_BACK = "PRAGMA wal_checkpoint(PASSIVE)"


def give_back(connection: sqlite3.Connection, pages: int) -> None:
    """Return up to so many free pages to the filesystem; the last of them with all that is cut off."""
    # `execute` would stop after the first: each page is a row of the statement, one without columns.
    connection.executescript(f"PRAGMA incremental_vacuum({pages})")
    if not connection.execute("PRAGMA freelist_count").fetchone()[0]:
        connection.execute(WRITE_BACK)


def give_back_room(
    connection: sqlite3.Connection, doubt: Doubt, path: Path, reserve: Reserve, room: Room
) -> None:
    """Let a full disk have what is free in the database, until it has the reserve and takes a commit again.

    The log is written back; where nothing else is left to give, it is emptied.
    """
    for _ in range((room.reserve + room.group) // STEP_BYTES + 2):
        _write_back(connection, reserve)
        if reserve.hold() and free_bytes(path) >= room.group:
            return
        if not connection.execute("PRAGMA freelist_count").fetchone()[0]:
            with suppress(sqlite3.Error):
                connection.execute(BEGIN_ANEW)
            reserve.hold()
            return
        with suppress(sqlite3.Error), doubt.watched():
            give_back(connection, STEP_BYTES // PAGE_BYTES)


def _write_back(connection: sqlite3.Connection, reserve: Reserve) -> None:
    """Have what is in the log in the database, which may have to grow for it: then by the reserve."""
    try:
        connection.execute(WRITE_BACK)
    except sqlite3.Error:
        reserve.give_up()
        with suppress(sqlite3.Error):
            connection.execute(WRITE_BACK)


def free_bytes(path: Path) -> int:
    """What the disk has for the agent's user."""
    disk = os.statvfs(path.parent)
    return disk.f_bavail * disk.f_frsize


def is_torn(connection: sqlite3.Connection, path: Path, room: Room, error: sqlite3.Error) -> bool:
    """Whether a disk that has room is said to be full: so SQLite does where a page points beyond the file."""
    if not is_full(error) or free_bytes(path) < room.wal + room.group:
        return False
    try:
        return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok")
    except sqlite3.Error as found:
        return is_damage(found)
