"""The buffer's file: owned by one process, opened, checked, measured."""

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

from agent import AgentError
from agent.buffer import BufferBroken, BufferBusy

# "PHca" in ASCII: tells our databases from every other program's (SQLite's application_id).
APPLICATION_ID = 0x50486361
SCHEMA_VERSION = 3

# Packed chunks are tens of KB; measured, 16 KiB pages cost a quarter less than 4 KiB ones.
PAGE_BYTES = 16 * 1024
MIB = 1024 * 1024


class Room(NamedTuple):
    """How `max_size` is divided, in bytes. The parts add up to it, so that the files never exceed it."""

    data: int  # live pages, beyond which `put` finds no room
    group: int  # the most that one transaction adds
    wal: int  # where the log is checkpointed

    @classmethod
    def of(cls, max_size: int) -> "Room":
        """Shares of the whole: small enough for 16 MiB, and no larger than they need be for 1 GiB."""
        wal = min(max(max_size // 32, MIB), 16 * MIB)
        group = min(max(max_size // 16, MIB), 8 * MIB)
        return cls(max_size - 2 * wal - 2 * group - SETTLE_BYTES, group, wal)


# What `put` never uses, so that `settle` can always write.
SETTLE_BYTES = 4 * MIB


class Ownership:
    """The lock beside the database; who holds it owns the buffer. Closing it gives it up.

    `held` is the descriptor by which the process that this one replaces holds it already.
    """

    def __init__(self, database: Path, held: int | None = None) -> None:
        self.path = database.with_name(database.name + ".lock")
        if held is not None:
            if _is_open_as(held, self.path):
                self._fd = held
                return
            os.close(held)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise BufferBusy(
                f"{database}: another agent owns this buffer (process {owner})",
                "stop that agent, or give this one a buffer.path of its own",
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def share(self) -> int:
        """A descriptor by which the lock is held beyond `close`."""
        return os.dup(self._fd)

    def close(self) -> None:
        """Give the buffer up."""
        os.close(self._fd)


def _is_open_as(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is that of a file that still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def cannot_write(path: Path, error: OSError) -> AgentError:
    """What to say when a file of the buffer cannot be made or opened."""
    folder = path.parent
    if isinstance(error, FileNotFoundError):
        return BufferBroken(f"{path}: the folder {folder} does not exist", f"make it: mkdir -p {folder}")
    return BufferBroken(
        f"{path}: {error.strerror or error}",
        f"the agent's user needs write permission in {folder}, or set buffer.path to another place",
    )


def connect(path: Path, *, full: bool, room: Room) -> sqlite3.Connection:
    """Open the database, made if need be, as its only user. It refuses what is not the agent's own."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise cannot_write(path, error) from error
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        # One owner: no other program can write or checkpoint meanwhile, which SQLite before 3.51.3 does not
        # survive (the WAL-reset bug). And set before the first look: so no shared-memory file is made, for
        # which a full disk has no room.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        _refuse_strangers(connection, path)
        _configure(connection, full=full, room=room)
        if connection.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
            # Loading sqlite-utils takes 0.1 s and 10 MB: only where there is something to migrate.
            from agent.buffer.schema import migrate

            migrate(connection)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    except BaseException:
        connection.close()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return connection


def _refuse_strangers(connection: sqlite3.Connection, path: Path) -> None:
    """Leave alone a database of a newer agent, and one of another program."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if application not in (0, APPLICATION_ID) or (application == 0 and tables and not _half_made(connection)):
        raise BufferBroken(
            f"{path}: this is another program's SQLite database",
            "set buffer.path to a file that the agent may make",
        )
    if version > SCHEMA_VERSION:
        raise BufferBroken(
            f"{path}: written by a newer capture-agent (schema {version}, this one knows {SCHEMA_VERSION})",
            "install that version again, or set buffer.path to another file",
        )


def _half_made(connection: sqlite3.Connection) -> bool:
    """Whether a first start was cut off while it made the tables."""
    names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    return "_sqlite_migrations" in names


def _configure(connection: sqlite3.Connection, *, full: bool, room: Room) -> None:
    """Set what must be set at each opening, and on a new file what shapes it; an old one is not written."""
    new = connection.execute("PRAGMA page_count").fetchone()[0] == 0
    for pragma in (
        *((f"page_size = {PAGE_BYTES}", "auto_vacuum = INCREMENTAL") if new else ()),
        "journal_mode = WAL",
        f"synchronous = {'FULL' if full else 'NORMAL'}",
        # Debian builds SQLite to overwrite what is deleted: three quarters of the cost of a queue.
        "secure_delete = OFF",
        f"wal_autocheckpoint = {room.wal // PAGE_BYTES}",
        f"journal_size_limit = {room.wal}",
        "cache_size = -4096",  # KiB: rows are written once and read once, so a cache earns little
        "temp_store = MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}")


def disk_bytes(path: Path) -> int:
    """The bytes of all the buffer's files on disk."""
    total = 0
    for name in ("", "-wal", "-shm"):
        try:
            total += os.stat(f"{path}{name}").st_size
        except FileNotFoundError:
            continue
    return total
