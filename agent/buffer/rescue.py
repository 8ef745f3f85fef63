"""Carries over what can be read of a damaged database into a new one, counts the rest, keeps the evidence.

The file is set aside under a name of its own; the new database is made beside it, and takes its place only
when it is whole. So whatever is killed meanwhile, the next start goes on with it.
"""

import ctypes
import os
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import structlog

from agent import crash
from agent.buffer import Books, Lease
from agent.buffer import evidence as kept
from agent.buffer.doubt import write_anew
from agent.buffer.file import (
    APPLICATION_ID,
    BEGIN_ANEW,
    MAGIC,
    Room,
    another_programs,
    connect,
    is_damage,
    make,
    sync_folder,
)
from agent.buffer.pages import HEADER_BYTES, Pages
from agent.buffer.reserve import Reserve
from agent.buffer.salvage import Salvage, is_ours
from agent.buffer.unreadable import unreadable_is_damage

log = structlog.get_logger("buffer")

# Where the tables are that tell whose a database is, unless it was never one: among its first pages.
LOOKED_AT = 1000

# fallocate(2): give the blocks of a range back, and keep the file's length.
KEEP_SIZE, PUNCH_HOLE = 1, 2


def unfinished(path: Path) -> Path:
    """The new database while it is made."""
    return path.with_name(path.name + ".new")


def rescue(
    path: Path,
    why: str,
    *,
    max_size: int,
    books: Books | None = None,
    leases: Iterable[Lease] = (),
) -> None:
    """Have a sound database at `path`, with what could be read of the damaged one; nobody has that open.

    Every commit of it is synced, whatever the buffer's durability: the disk may take back what was carried
    over only when it is surely in the new one. Raises `BufferBroken`, and changes nothing, where it is no
    database of the agent's.
    """
    started = time.perf_counter()
    new, room = unfinished(path), Room.of(max_size)
    if not new.exists():
        refuse_strangers(path)
        make(new)
        sync_folder(path)
    crash.point("rescue.begun")
    old = _set_aside(path)
    crash.point("rescue.aside")
    Reserve(path, room.reserve).give_up()  # it is made again where there is room
    with closing(_begun(new, room)) as connection:
        # What does not fit into its share beside the new database is given back as it is carried over.
        salvage, larger = Salvage(connection), old.stat().st_size > max_size // kept.SHARE
        connection.execute("BEGIN IMMEDIATE")
        with closing(Pages(old)) as pages:
            spent: list[int] = []
            for sheet in pages.sheets():
                spent += salvage.take(sheet)
                if salvage.pending > room.group // 2:
                    connection.execute("COMMIT")
                    crash.point("rescue.carried")
                    if larger:
                        _give_back(old, spent, pages.page_bytes)
                    spent, salvage.pending = [], 0
                    connection.execute("BEGIN IMMEDIATE")
        events, lost = salvage.close_books(books, leases)
        crash.point("rescue.booked")
        connection.execute("COMMIT")
        if larger:
            _give_back(old, spent, pages.page_bytes)
        connection.execute(BEGIN_ANEW)
    crash.point("rescue.whole")
    os.rename(new, path)
    sync_folder(path)
    crash.point("rescue.named")
    log.error(
        "the buffer was damaged; what could be read was carried over, the rest is counted as damaged",
        why=why,
        events=events,
        lost=lost,
        seconds=round(time.perf_counter() - started, 3),
        evidence=str(old),
        hint="look for the disk's errors (dmesg); remove the evidence when nobody needs it",
    )
    kept.trim(path, min(max_size // kept.SHARE, room.data - path.stat().st_size))


def refuse_strangers(path: Path) -> None:
    """Raises `BufferBroken` where neither the file nor its log has anything that only the agent writes."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        left = file.read(LOOKED_AT)
    if head[68:72] == APPLICATION_ID.to_bytes(4, "big") or not (head + left).strip(b"\0"):
        return
    if len(head) < HEADER_BYTES and head.startswith(MAGIC[: len(head)]):
        return
    with closing(Pages(path)) as pages:
        if not any(is_ours(row) for sheet in pages.sheets(LOOKED_AT) for row in sheet.rows):
            raise another_programs(path, "this is not a database of capture-agent's")


def _set_aside(path: Path) -> Path:
    """Give the damaged file and its log another name, or go on where that was cut off."""
    log_file = kept.log_of(path)
    if not path.exists():
        return kept.kept(path)[-1]
    begun = [
        file for file in path.parent.glob(f"{path.name}.damaged-*-wal") if not _database_of(file).exists()
    ]
    old = _database_of(begun[0]) if begun else kept.new_name(path)
    with suppress(FileNotFoundError):
        os.rename(log_file, kept.log_of(old))
        # Else a power cut might undo this and not the other, and the new database had the old one's log.
        sync_folder(path)
    crash.point("rescue.log_aside")
    os.rename(path, old)
    sync_folder(path)
    return old


def _database_of(log_file: Path) -> Path:
    return log_file.with_name(log_file.name.removesuffix("-wal"))


def _begun(new: Path, room: Room) -> sqlite3.Connection:
    """The new database, made or found; one that is itself damaged is made anew."""
    with suppress(FileNotFoundError):
        write_anew(kept.log_of(new))
    try:
        with unreadable_is_damage():
            return connect(new, full=True, room=room)
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        new.unlink()
        kept.log_of(new).unlink(missing_ok=True)
        return connect(new, full=True, room=room)


def _give_back(file: Path, pages: list[int], page_bytes: int) -> None:
    """Let the disk have the blocks of these pages; where it cannot, the evidence is cut at the end."""
    numbers = sorted(set(pages) - {1})
    ends = [
        0,
        *(at for at, (one, other) in enumerate(pairwise(numbers), 1) if other != one + 1),
        len(numbers),
    ]
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    with open(file, "r+b", buffering=0) as opened:
        for begin, end in pairwise(ends) if numbers else ():
            at, size = (numbers[begin] - 1) * page_bytes, (end - begin) * page_bytes
            fallocate(opened.fileno(), KEEP_SIZE | PUNCH_HOLE, ctypes.c_long(at), ctypes.c_long(size))
