"""Sees whether the buffer's names still lead to the open files, and has them back where somebody took them.

A file without a name is written and synced like any other, and is gone with the process. While it is open all
of it can be read: so it is copied under its name again, with all that was acknowledged. What somebody has put
there meanwhile is not overwritten, but set aside like a damaged file.
"""

import errno
import os
import sqlite3
import stat
from contextlib import suppress
from pathlib import Path

import structlog

from agent import AgentError, crash
from agent.buffer.copies import copy_into
from agent.buffer.evidence import log_of, new_name
from agent.buffer.file import PAGE_BYTES, Ownership, sync_folder

log = structlog.get_logger("buffer")

HINT = "leave the buffer's files alone while the agent runs; to empty or replace it, stop the agent first"


class Astray(sqlite3.OperationalError):
    """The files have lost their names, and cannot have them again now."""


class Names:
    """Where the names of an open database and its log led when it was opened."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        # By the name that SQLite has for it: links are followed, and the log lies where they lead.
        self._log = log_of(Path(connection.execute("PRAGMA database_list").fetchone()[2]))
        self._place, self._was_link = os.path.realpath(path), path.is_symlink()
        self._file, self._log_file = _found(path), _found(self._log)

    def lead_here(self) -> bool:
        """Whether they still do: three calls of stat(2). Where nobody can tell, nobody has taken any."""
        try:
            return self._database_is_here() and _found(self._log) == self._log_file is not None
        except OSError:
            return True

    def restore(self, ownership: Ownership) -> bool:
        """Have the files under their names; whether the database is to be opened anew, as it is another file.

        Raises `Astray` where that cannot be done; nothing is lost by it, and it can be tried again.
        """
        try:
            ownership.renew(self._path)
            if self._database_is_here():
                self._begin_log()
                return False
            self._copy_back()
        except (OSError, sqlite3.Error, AgentError) as error:
            text = (
                f"somebody removed or replaced {self._path} or its log, and it cannot be made again: {error}"
            )
            raise Astray(text) from error
        return True

    def _database_is_here(self) -> bool:
        return _found(self._path) == self._file is not None and not self._is_linked_elsewhere()

    def _is_linked_elsewhere(self) -> bool:
        """By such a link the next start finds the file, but looks for its log where that leads."""
        linked = not self._was_link and self._path.is_symlink()
        return linked and os.path.realpath(self._path) != self._place

    def _begin_log(self) -> None:
        """All that is in the log that lost its name goes into the database, and another log is begun."""
        aside = _set_aside(self._log, new_name(self._path)) if os.path.lexists(self._log) else None
        for mode in ("delete", "wal"):
            if self._connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()[0] != mode:
                raise sqlite3.OperationalError("its log cannot be begun anew")
        self._connection.execute("PRAGMA freelist_count").fetchone()  # which opens the log
        sync_folder(self._log)
        self._log_file = _found(self._log)
        text = "somebody removed or replaced the buffer's log; all that was in it is in the database now"
        log.error(text, file=str(self._log), hint=HINT, **_told(aside))

    def _copy_back(self) -> None:
        linked = self._is_linked_elsewhere()
        place = _named(self._path) if linked else Path(os.path.realpath(self._path))
        new = copy_of(place)
        try:
            self._copy_into(new)
            aside = self._clear(place, link=linked)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        if linked:  # what it leads to is left alone; from here on a start takes up the copy
            place.unlink()
        crash.point("stray.copied")
        os.rename(new, place)
        sync_folder(place)
        crash.point("stray.named")
        # The open database's own has nothing that the copy has not: until here it did no harm.
        if _found(self._log) == self._log_file:
            self._log.unlink()
            sync_folder(self._log)
        text = "somebody removed or replaced the buffer's file; all that was in it was written to a new one"
        log.error(text, file=str(place), hint=HINT, **_told(aside))

    def _clear(self, place: Path, *, link: bool) -> Path | None:
        """Set aside what somebody has put there, but for a `link`; under which name.

        A log that is not of this database must not lie beside it: SQLite would write it back.
        """
        aside = new_name(self._path)
        foreign = os.path.lexists(log_of(place)) and _found(log_of(place)) != self._log_file
        there = os.path.lexists(place) and not link
        if foreign:  # one that has no database is called like one, so that it is counted and trimmed
            _set_aside(log_of(place), log_of(aside) if there else aside)
        if there:
            _set_aside(place, aside)
        return aside if there or foreign else None

    def _copy_into(self, new: Path) -> None:
        size = self._connection.execute("PRAGMA page_count").fetchone()[0] * PAGE_BYTES
        disk = os.statvfs(new.parent)
        if disk.f_bavail * disk.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new))
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "rb") as file:
            copy_into(self._connection, sqlite3.connect(new, isolation_level=None))
            os.fsync(file.fileno())


def copy_of(path: Path) -> Path:
    """The database while it is copied back under its name."""
    return path.with_name(path.name + ".again")


def go_on(path: Path) -> None:
    """Take up a copy that a kill cut off: where there is no other database, it is all that is left."""
    for place in {Path(os.path.realpath(path)), _named(path)}:
        with suppress(FileNotFoundError):
            os.rename(copy_of(place), new_name(place) if place.exists() else place)
            sync_folder(place)


def _named(path: Path) -> Path:
    """The file of this name, also where it is a link."""
    return Path(os.path.realpath(path.parent), path.name)


def _found(name: Path) -> tuple[int, int] | None:
    """Which file a name leads to; None where it leads nowhere."""
    try:
        found = os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _set_aside(file: Path, name: Path) -> Path:
    """Give what lies in the way another name."""
    if not stat.S_ISREG(os.lstat(file).st_mode):
        raise OSError(errno.EEXIST, "what is there now is no file; move it away", str(file))
    os.rename(file, name)
    sync_folder(name)
    return name


def _told(aside: Path | None) -> dict[str, str]:
    return {"set_aside": str(aside)} if aside is not None else {}
