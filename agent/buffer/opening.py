"""Opens a buffer's database and looks at what it holds; a damaged one is rescued first."""

import errno
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from agent.buffer import Books, BufferBroken, Entry, Lease
from agent.buffer.balance import balance
from agent.buffer.doubt import Doubt, write_anew
from agent.buffer.evidence import log_of
from agent.buffer.file import (
    Damage,
    Room,
    close_beside_log,
    connect,
    is_damage,
    look_first,
    make,
    put_log_back,
)
from agent.buffer.lanes import MOST_LANES
from agent.buffer.letters import Letters
from agent.buffer.log import Log
from agent.buffer.notes import Notes
from agent.buffer.pages import HEADER_BYTES, page_bytes_of
from agent.buffer.rescue import refuse_strangers, rescue, unfinished
from agent.buffer.reserve import Reserve
from agent.buffer.rows import COUNT_LANES
from agent.buffer.stray import go_on
from agent.buffer.torn import look_behind
from agent.buffer.unreadable import unreadable_is_damage

BOOKS = "SELECT joint, label, reason, total FROM books"
# The way to the oldest and to the newest chunk is whole.
ENDS = (
    "SELECT (SELECT size FROM chunk ORDER BY id LIMIT 1), (SELECT size FROM chunk ORDER BY id DESC LIMIT 1)"
)
# Beyond it an INSERT would find no id: no buffer ever comes so far.
NEWEST_ID = """SELECT max(ifnull((SELECT max(seq) FROM sqlite_sequence), 0),
    ifnull((SELECT max(id) FROM chunk), 0), ifnull((SELECT max(id) FROM dead), 0))"""
MOST_IDS = 2**62
# Whose the newest chunk of a lane is by the table itself: a damaged entry of the index is a lane of its own.
# `MOST_LANES` are looked at, each of which takes a page: more are of keys that clients make up.
WHOSE = "SELECT project, key FROM chunk NOT INDEXED WHERE id = ?"


class Found(NamedTuple):
    """An open database and what it holds."""

    connection: sqlite3.Connection
    doubt: Doubt
    books: Books
    lanes: list[tuple[str, str | None, int, int, int, int]]  # as `COUNT_LANES` names them
    letters: Letters
    notes: Notes


def opened(
    path: Path,
    load: Callable[[Found], None],
    *,
    max_size: int,
    full: bool,
    books: Books | None = None,
    leases: Iterable[Lease] = (),
) -> None:
    """Open the database, made if need be, and `load` it; after a rescue where either finds it damaged.

    Raises `BufferBroken` or sqlite3.Error where it cannot be used.
    """
    go_on(path)
    why = "a start that carried over was cut off"
    if not unfinished(path).exists():
        try:
            with unreadable_is_damage():
                _load(path, load, _opened(path, max_size=max_size, full=full))
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            why = str(error)
        else:
            return
    load(reopened(path, why, max_size=max_size, full=full, books=books, leases=leases))


def _load(path: Path, load: Callable[[Found], None], found: Found) -> None:
    try:
        load(found)
    except BaseException:
        close_beside_log(found.connection, path)
        raise


def reopened(
    path: Path,
    why: str,
    *,
    max_size: int,
    full: bool,
    books: Books | None = None,
    leases: Iterable[Lease] = (),
) -> Found:
    """The database after a rescue; see there."""
    rescue(path, why, max_size=max_size, books=books, leases=leases)
    return _opened(path, max_size=max_size, full=full)


def _opened(path: Path, *, max_size: int, full: bool) -> Found:
    make(path)
    put_log_back(path)
    if log_of(path).exists() and not log_of(path).is_file():
        raise BufferBroken(f"{log_of(path)}: this is no file", "move it away: the buffer's log has its name")
    ours = look_first(path)
    logged = _commits(path)
    if logged and not ours:
        refuse_strangers(path)
    if logged and not path.stat().st_size:
        raise Damage("the database is empty, and its log is not")
    room = Room.of(max_size)
    if logged:
        _secure(path, room)
    connection = connect(path, full=full, room=room)
    try:
        doubt = Doubt(connection)
        if logged:
            look_behind(connection, doubt, path, logged, full=full)
        return _look(connection, doubt, max_size)
    except BaseException:
        close_beside_log(connection, path)
        raise


def _secure(path: Path, room: Room) -> None:
    """Have the log surely on the disk; where that takes room (btrfs) and there is none, in the reserve's."""
    try:
        write_anew(log_of(path))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        Reserve(path, room.reserve).give_up()
        write_anew(log_of(path))


def _commits(path: Path) -> list[int]:
    """Behind how many frames of the log commits are.

    Raises `Damage` where it is another database's log, or has a header that SQLite would take for that of an
    empty one, and write over it. The header is on the disk before the first frame is written, whatever the
    durability: so a power cut leaves none that is torn before frames.
    """
    with suppress(OSError), open(log_of(path), "rb", buffering=0) as file:
        log = Log(file.fileno())
        with open(path, "rb", buffering=0) as database:
            said = page_bytes_of(database.read(HEADER_BYTES))
        if log.sound and said not in (None, log.page_bytes):
            raise Damage("the log is another database's")
        if not log.sound and log.count:
            raise Damage("the log's header is not what was written")
        return log.commits()
    return []


def _look(connection: sqlite3.Connection, doubt: Doubt, max_size: int) -> Found:
    """Read all but the chunks themselves, which are looked at when they are taken."""
    books: Books = Counter()
    for joint, label, reason, total in connection.execute(BOOKS):
        if not isinstance(total, int) or not all(isinstance(text, str) for text in (joint, label, reason)):
            raise Damage("the books hold no numbers")
        books[Entry(joint, label, reason)] = total
    lanes = connection.execute(COUNT_LANES).fetchall()
    for at, (project, key, *numbers) in enumerate(lanes):
        whole = isinstance(project, str) and isinstance(key, str | None)
        if not whole or not all(isinstance(number, int) for number in numbers):
            raise Damage("the index of the chunks is not what was written")
        if at < MOST_LANES and connection.execute(WHOSE, numbers[1:2]).fetchone() != (project, key):
            raise Damage("the index of the chunks is not that of their table")
    letters = Letters(connection, max_size)
    if not balance(books, sum(events for *_, events, _ in lanes), letters.count):
        raise Damage("the books do not balance")
    connection.execute(ENDS).fetchone()
    if connection.execute(NEWEST_ID).fetchone()[0] > MOST_IDS:
        raise Damage("no id is left")
    return Found(connection, doubt, books, lanes, letters, Notes(connection))
