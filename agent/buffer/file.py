"""The buffer's file: owned by one process, opened, checked, measured."""

import errno
import fcntl
import os
import sqlite3
import stat
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from agent import AgentError, crash
from agent.buffer import BufferBroken, BufferBusy, evidence

# "PHca" in ASCII: tells our databases from every other program's (SQLite's application_id).
APPLICATION_ID = 0x50486361
SCHEMA_VERSION = 6
# What `schema` applies, by the record that sqlite-utils keeps: what else is there, a newer agent did.
MIGRATIONS = {
    "first_tables", "what_an_event_went_through", "what_sockets_dropped", "how_a_chunk_was",
    "how_large_a_dead_event_is", "how_a_dead_event_was",
}  # fmt: skip
# How a database begins (https://www.sqlite.org/fileformat.html, 1.3).
MAGIC = b"SQLite format 3\0"
# Has all that is in the log in the database, and the log empty.
BEGIN_ANEW = "PRAGMA wal_checkpoint(TRUNCATE)"
TABLES = {"chunk", "dead", "books", "_sqlite_migrations"}

# Packed chunks are tens of KB; measured, 16 KiB pages cost a quarter less than 4 KiB ones.
PAGE_BYTES = 16 * 1024
MIB = 1024 * 1024


class Room(NamedTuple):
    """How `max_size` is divided, in bytes. The parts add up to it, so that the files never exceed it."""

    data: int  # live pages, beyond which `put` finds no room
    group: int  # the most that one transaction adds
    wal: int  # where the log is checkpointed
    reserve: int  # what is kept for `settle` on a disk that others may fill

    @classmethod
    def of(cls, max_size: int) -> "Room":
        """Shares of the whole: small enough for 16 MiB, and no larger than they need be for 1 GiB."""
        wal = min(max(max_size // 32, MIB), 16 * MIB)
        group = min(max(max_size // 16, MIB), 8 * MIB)
        # The log is at most so long, and the database grows at most by it.
        reserve = wal + group
        return cls(max_size - reserve - wal - 2 * group - SETTLE_BYTES, group, wal, reserve)


# What `put` never uses, so that `settle` can always write.
SETTLE_BYTES = 4 * MIB


class Damage(sqlite3.DatabaseError):
    """What SQLite does not see: the file holds something else than was written."""


# What is wrong with the disk, its room or its rights, not with what the file holds.
_OUTSIDE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_MISUSE,
    sqlite3.SQLITE_NOLFS,
}


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is to blame: all that it can make SQLite say, from "malformed" to "no such table"."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return isinstance(error, Damage)
    return code & 0xFF not in _OUTSIDE or code == sqlite3.SQLITE_IOERR_CORRUPTFS


def is_full(error: sqlite3.Error) -> bool:
    """Whether the disk has no room, by SQLite's word."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


# Errors about files that are there, and not for the agent's user.
_RIGHTS = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)


def advice(error: sqlite3.Error | OSError) -> str:
    """What to do about a file that does not open, or cannot be mended; nothing of it is lost."""
    if isinstance(error, PermissionError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _RIGHTS:
        return (
            "the agent's user must be able to write the file, its -wal and their folder: chown or chmod them"
        )
    return "make room on the disk, or mend it, and start again; nothing in the file is lost"


class Ownership:
    """The lock beside the database; who holds it owns the buffer. Closing it gives it up.

    `held` is the descriptor by which the process that this one replaces holds it already.
    """

    def __init__(self, database: Path, held: int | None = None) -> None:
        self.path = database.with_name(database.name + ".lock")
        if held is not None:
            if _is_open_as(held, self.path):
                self._fd = held
                crash.point("reload.locked")
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
        crash.point("start.locked")
        with suppress(OSError):  # who has it is only told; a full disk must not keep it from anybody
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def renew(self, database: Path) -> None:
        """Hold the lock by its name again, where somebody took that away. Raises `BufferBusy`."""
        if not _is_open_as(self._fd, self.path):
            again = Ownership(database)
            os.dup2(again._fd, self._fd, inheritable=False)
            again.close()

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
    if isinstance(error, IsADirectoryError):
        return BufferBroken(
            f"{path}: this is a directory",
            "move it away, or set buffer.path to a file that the agent may make",
        )
    if error.errno == errno.EROFS:
        return BufferBroken(
            f"{path}: {folder} is on a read-only file system",
            "mount it for writing, or set buffer.path to another place; dmesg may say why it is so",
        )
    if path.exists():
        return BufferBroken(
            f"{path}: {error.strerror or error}",
            f"it is user {path.stat().st_uid}'s, and the agent runs as user {os.geteuid()}: "
            f"chown {os.geteuid()} {path}* and chmod u+rw {path}*, or set buffer.path to another place",
        )
    return BufferBroken(
        f"{path}: {error.strerror or error}",
        f"the agent's user needs write permission in {folder}, or set buffer.path to another place",
    )


def connect(path: Path, *, full: bool, room: Room) -> sqlite3.Connection:
    """Open the database, made if need be, as its only user. It refuses what is not the agent's own."""
    make(path)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        # What is damaged is told by its seal, not by an error of the reader's.
        connection.text_factory = partial(str, encoding="utf-8", errors="replace")
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
            crash.point("migrate.numbered")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            _write_back(connection)
    except BaseException:
        close_beside_log(connection, path)
        raise
    sync_folder(path)
    return connection


def _write_back(connection: sqlite3.Connection) -> None:
    """Have the tables in the database itself before an event is: else its log alone says what it is."""
    try:
        connection.execute(BEGIN_ANEW)
    except sqlite3.OperationalError as error:
        if not is_full(error):  # a full disk takes no event, and the next checkpoint does it
            raise


def close_beside_log(connection: sqlite3.Connection, path: Path) -> None:
    """Close a database that may be damaged, and keep its log, which SQLite would remove by its name."""
    log, hidden = Path(f"{path}-wal"), Path(f"{path}-wal.kept")
    with suppress(FileNotFoundError):
        os.rename(log, hidden)
    crash.point("log.hidden")
    connection.close()
    crash.point("log.closed")
    with suppress(FileNotFoundError):
        os.rename(hidden, log)


def put_log_back(path: Path) -> None:
    """Undo what a kill in the middle of `close_beside_log` left."""
    with suppress(FileNotFoundError):
        os.rename(f"{path}-wal.kept", f"{path}-wal")


def look_first(path: Path) -> bool:
    """Refuse what is not the agent's own before SQLite writes anything; whether it is surely the agent's.

    Raises `Damage` where SQLite would say nothing, or something else.
    """
    with open(path, "rb", buffering=0) as file:
        header = file.read(100)
    ours = False
    # The file alone, as it lies there: its log may be another's.
    uri = f"{path.absolute().as_uri()}?immutable=1"
    # Python raises the second where a damaged name is in the words of the first.
    with suppress(sqlite3.Error, UnicodeDecodeError), closing(sqlite3.connect(uri, uri=True)) as still:
        if header:
            _refuse_strangers(still, path)
            ours = _tables(still) >= TABLES
    # A version of the format that nobody knows makes the file read-only for SQLite.
    if header[18:19] > b"\x02":
        raise Damage("the header is of a later version of SQLite's format")
    return ours


def make(path: Path) -> None:
    """Have the file there, empty where it is new, and sure that it is one and may be written."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise cannot_write(path, error) from error
    regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    if not regular:
        raise BufferBroken(f"{path}: this is no file", "move it away, or set buffer.path to another place")


def sync_folder(path: Path) -> None:
    """Have the names of the files beside `path` on disk, as they are now."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _refuse_strangers(connection: sqlite3.Connection, path: Path) -> None:
    """Leave alone a newer agent's database, and another program's. Raises `Damage` where it is neither."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = _tables(connection)
    ours = tables >= TABLES
    if not ours and (application not in (0, APPLICATION_ID) or (not application and tables - _BEGUN)):
        raise another_programs(path, "this is another program's SQLite database")
    if version > SCHEMA_VERSION and not (ours and _applied(connection) <= MIGRATIONS):
        raise BufferBroken(
            f"{path}: written by a newer capture-agent (schema {version}, this one knows {SCHEMA_VERSION})",
            "install that version again, or set buffer.path to another file",
        )
    if version > SCHEMA_VERSION or application not in (0, APPLICATION_ID):
        raise Damage("the header does not fit the tables")
    if application == APPLICATION_ID and version and not ours:
        raise Damage("tables are missing")


def another_programs(path: Path, what: str) -> BufferBroken:
    """What to say of a file that is not the agent's."""
    return BufferBroken(f"{path}: {what}", "set buffer.path to a file that the agent may make")


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}


def _applied(connection: sqlite3.Connection) -> set[str]:
    return {row[0] for row in connection.execute("SELECT name FROM _sqlite_migrations")}


# What there is where a first start was cut off while it made the tables.
_BEGUN = {"_sqlite_migrations", "chunk", "dead", "books", "clock", "drops", "sqlite_sequence"}


_SHAPE = (f"page_size = {PAGE_BYTES}", "auto_vacuum = INCREMENTAL", f"application_id = {APPLICATION_ID}")


def _configure(connection: sqlite3.Connection, *, full: bool, room: Room) -> None:
    """Set what must be set at each opening, and on a new file what shapes it; an old one is not written."""
    new = connection.execute("PRAGMA page_count").fetchone()[0] == 0
    for pragma in (
        # Whose it is stands in the file before there is a log, which a power cut may tear.
        *(_SHAPE if new else ()),
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
    """The bytes of all the buffer's files on disk: the database, its log, the reserve, evidence of damage."""
    total = sum(map(evidence.disk_bytes, evidence.kept(path)))
    for name in ("", "-wal", "-shm", ".reserve", ".new", ".new-wal", ".again"):
        try:
            total += os.stat(f"{path}{name}").st_size
        except FileNotFoundError:
            continue
    return total
