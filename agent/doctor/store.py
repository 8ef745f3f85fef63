"""What is wrong with the buffer's file, and who owns it: looked at without changing it.

It promises to leave alone what an agent owns: a database is opened for reading only, under the lock that an
agent would take, and for two seconds at most.
"""

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from agent.buffer.file import APPLICATION_ID, MAGIC, SCHEMA_VERSION
from agent.config import Buffer
from agent.doctor import access
from agent.doctor.finding import Finding, error, ok, warning

CHECK = "buffer"

# Upserts (`ON CONFLICT DO UPDATE`), by which the books are kept, came with it.
OLDEST_SQLITE = (3, 24, 0)
# Before it two connections that write or checkpoint at once could damage a WAL file.
SAFE_SQLITE = (3, 51, 3)

# How long a look inside may take: an agent that starts meanwhile is refused the file.
LOOK_SECONDS = 2.0
# Between two looks at the watch: so many of SQLite's steps are well under a millisecond's work.
STEPS = 1000

# How long the header of a database is (https://www.sqlite.org/fileformat.html, 1.3).
HEADER_BYTES = 100
# Where sqlite-utils writes down what was applied: the first table that the agent makes.
MIGRATIONS = "_sqlite_migrations"


def sqlite_version(version: tuple[int, ...]) -> Finding:
    """Whether this Python's SQLite will do."""
    told = ".".join(map(str, version))
    if version < OLDEST_SQLITE:
        hint = "use a Python that is built with a newer one"
        return error("sqlite", "this Python", f"SQLite {told} is too old: the buffer needs 3.24", hint)
    if version < SAFE_SQLITE:
        what = f"SQLite {told}: good while the agent is the buffer's only user; let no other program open it"
        return ok("sqlite", "this Python", what)
    return ok("sqlite", "this Python", f"SQLite {told}")


def owner_of(path: str) -> int | None:
    """The process that holds the buffer's lock, 0 where it does not say; None where nobody does."""
    try:
        fd = os.open(f"{path}.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        told = os.pread(fd, 20, 0).strip()
        return int(told) if told.isdigit() else 0
    finally:
        os.close(fd)
    return None


def look(settings: Buffer, *, made: bool) -> Iterator[Finding]:
    """The file of an agent that does not run; `made` where the agent makes its folder itself."""
    path = settings.path
    try:
        if not os.path.isdir(folder := os.path.dirname(path)):
            if not made:
                yield error(CHECK, path, f"the folder {folder} does not exist", f"make it: mkdir -p {folder}")
            return
        if not os.path.exists(path):
            yield ok(CHECK, path, "not there yet: the agent makes it")
            return
        if not os.path.isfile(path):
            yield error(CHECK, path, "this is no file", "move it away, or set buffer.path to a file")
            return
        yield from _owners(path)
        yield _inside(path)
    except OSError as failed:
        yield warning(
            CHECK, path, f"cannot be looked at by this user: {failed.strerror}", "run the doctor as root"
        )


def _owners(path: str) -> Iterator[Finding]:
    """Files that the owner of the buffer may not write, as after a command was run as another user."""
    uid = os.stat(path).st_uid
    owner = access.person(str(uid))
    folder = os.path.dirname(path)
    if way := access.obstacle(folder, owner, access.WRITE | access.ENTER):
        hint = f"chown {access.user_name(uid)} {folder}, or set buffer.path to another place"
        yield error(CHECK, path, f"it belongs to {owner.name}, but {way}", hint)
    for end in ("-wal", "-shm", ".lock"):
        if os.path.exists(path + end) and (way := access.obstacle(path + end, owner)):
            hint = f"chown {access.user_name(uid)} {path}*, and run commands on this buffer as that user"
            yield error(CHECK, path + end, f"the buffer belongs to {owner.name}, but {way}", hint)
    myself = access.person(str(os.geteuid()))
    if way := access.obstacle(path, myself):
        hint = f"run the agent as {owner.name}, or chown {myself.name} {path}*"
        yield warning(CHECK, path, f"an agent that this user starts cannot use it: {way}", hint)


def _inside(path: str) -> Finding:
    with contextlib.ExitStack() as stack:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        head = os.pread(fd, HEADER_BYTES, 0)
        lock = f"{path}.lock"
        if os.path.exists(lock):
            owning = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, owning)
            try:
                fcntl.flock(owning, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return ok(CHECK, path, "an agent has taken it meanwhile")
        if not head:
            return ok(CHECK, path, "empty: the agent fills it")
        if not head.startswith(MAGIC) or len(head) < HEADER_BYTES:
            return _not_ours(path, "this is no SQLite database, or its beginning is destroyed")
        return _of_pages(path)


def _not_ours(path: str, what: str) -> Finding:
    hint = "move it away with its -wal: the agent makes a new one; or set buffer.path to another file"
    return error(CHECK, path, what, hint)


def _of_pages(path: str) -> Finding:
    """Whose the database is, and whether it is whole as far as can be seen in a short time."""
    # Without a log nothing but the file matters, and then nothing is made beside it.
    log = Path(f"{path}-wal")
    still = not log.exists() or not log.stat().st_size
    until = time.monotonic() + LOOK_SECONDS
    try:
        uri = f"{Path(path).as_uri()}?mode=ro{'&immutable=1' if still else ''}"
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            connection.set_progress_handler(lambda: int(time.monotonic() > until), STEPS)
            return _of_strangers(connection, path) or _of_damage(connection, path)
    except UnicodeDecodeError:  # Python cannot read SQLite's words, which have a damaged name in them
        return _damaged(path, "the names in its schema cannot be read")
    except sqlite3.Error as failed:
        code = failed.sqlite_errorcode & 0xFF  # without SQLite's extension of it
        if code == sqlite3.SQLITE_INTERRUPT:
            return ok(
                CHECK, path, f"no damage seen in {LOOK_SECONDS:g} s; it is too large to be looked through"
            )
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return _damaged(path, str(failed))
        return warning(
            CHECK, path, f"cannot be read: {failed}", "run the doctor as the agent's user or as root"
        )


def _of_strangers(connection: sqlite3.Connection, path: str) -> Finding | None:
    """Whose it is, where it is not this agent's; a first start that was cut off is nobody else's."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if application not in (0, APPLICATION_ID) or (application == 0 and names and MIGRATIONS not in names):
        return _not_ours(path, "this is another program's SQLite database")
    if version > SCHEMA_VERSION:
        what = f"written by a newer capture-agent (schema {version}, this one knows {SCHEMA_VERSION})"
        return error(CHECK, path, what, "install that version again, or set buffer.path to another file")
    if version == 0:
        return ok(CHECK, path, "begun, and not finished: the agent goes on with it")
    return None


def _of_damage(connection: sqlite3.Connection, path: str) -> Finding:
    said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if said != "ok":
        return _damaged(path, said)
    events = connection.execute("SELECT coalesce(sum(events), 0) FROM chunk").fetchone()[0]
    return ok(CHECK, path, f"whole; {events:,} events wait in it")


def _damaged(path: str, said: str) -> Finding:
    hint = "look for the disk's errors (dmesg); the agent carries over what can be read, and keeps the file"
    return error(CHECK, path, f"the database is damaged: {' '.join(said.split())}", hint)
