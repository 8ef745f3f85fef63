"""Looks at what a log holds behind the frame where SQLite stopped reading: damage, or what a power cut left.

Where every commit is synced a power cut tears at most the last one, of which nobody was told: sound commits
behind a broken one are damage. Without those syncs the disk writes the log in any order, and a power cut
leaves just this: the commits before the broken one are the buffer, and what can be seen of those behind it
is counted as lost.
"""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import structlog

from agent.buffer.balance import NOBODYS
from agent.buffer.doubt import Doubt
from agent.buffer.evidence import log_of
from agent.buffer.file import Damage
from agent.buffer.log import Log
from agent.buffer.pages import Pages, Row
from agent.buffer.rows import ENTER
from agent.buffer.salvage import chunk_in

log = structlog.get_logger("buffer")

NEWEST_CHUNK = "SELECT ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'chunk'), 0)"


def look_behind(
    connection: sqlite3.Connection, doubt: Doubt, path: Path, logged: list[int], *, full: bool
) -> None:
    """Raises `Damage` where sound commits come after a broken one; where not each was synced, counts them.

    A torn end is taken off. `logged` is behind how many frames of the log commits are.
    """
    try:
        seen = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]
    except sqlite3.OperationalError:  # a full disk: then it takes longer to know
        seen = 0
    if not any(commit > seen for commit in logged):
        return
    with open(log_of(path), "rb", buffering=0) as file:
        found = Log(file.fileno())
        frames = found.frames()
    broken = next((number for number, frame in enumerate(frames) if not frame.sound), len(frames))
    torn = next((commit for commit in logged if commit > broken), len(frames)) if found.sound else 0
    several = any(frame.pages and frame.sound for frame in frames[torn:])
    if several and (full or not found.sound):
        raise Damage("the log is broken in its middle")
    lost = _lost(connection, path) if several else 0
    # SQLite would go on at the broken frame with the same salts: after another power cut the next start would
    # take what is behind it now for newer than what it wrote.
    doubt.open = True
    with suppress(sqlite3.OperationalError):  # a full disk, which takes no commit either
        doubt.settle()
    if several:
        _enter(connection, lost)


def _lost(connection: sqlite3.Connection, path: Path) -> int:
    """How many events only the commits behind the broken one have, as far as these can be read."""
    newest = connection.execute(NEWEST_CHUNK).fetchone()[0]
    with closing(Pages(path)) as pages:
        chunks = dict(filter(None, (_events_of(row) for sheet in pages.logged() for row in sheet.rows)))
    return sum(events for ident, events in chunks.items() if ident > newest)


def _enter(connection: sqlite3.Connection, lost: int) -> None:
    """Book and tell it."""
    if lost:
        connection.execute("BEGIN IMMEDIATE")
        for joint, reason in (("received", ""), ("accepted", ""), ("shed", "damaged")):
            connection.execute(ENTER, (joint, NOBODYS, reason, lost))
        connection.execute("COMMIT")
    log.warning(
        "a power cut tore the buffer's log: its newest events are lost, so many of them are known",
        lost=lost,
        hint='with buffer.durability = "full" no acknowledged event is lost by it',
    )


def _events_of(row: Row) -> tuple[int, int] | None:
    """A chunk's id and how many events it has, by its row or by that of the index of the lanes."""
    match row.values:
        case (str(), None | str(), int(ident), int(events), int(), again) if ident == again:
            return ident, events
    chunk = chunk_in(row)
    return (row.id, chunk.events) if row.id is not None and chunk is not None else None
