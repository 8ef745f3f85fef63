"""Damaged databases that were set aside: how they are named, how much of the disk they may keep."""

import os
import time
from pathlib import Path

import structlog

log = structlog.get_logger("buffer")

# They take at most this part of the bound.
SHARE = 4


def kept(path: Path) -> list[Path]:
    """The evidence beside a buffer, the oldest first."""
    found = path.parent.glob(f"{path.name}.damaged-*")
    return sorted(file for file in found if not file.name.endswith("-wal"))


def log_of(file: Path) -> Path:
    """Where SQLite looks for a database's log."""
    return file.with_name(file.name + "-wal")


def new_name(path: Path) -> Path:
    """A name for one more, by the time (UTC), which none has yet."""
    told = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = path.with_name(f"{path.name}.damaged-{told}")
    number = 1
    while name.exists() or log_of(name).exists():
        number += 1
        name = path.with_name(f"{path.name}.damaged-{told}.{number}")
    return name


def disk_bytes(file: Path) -> int:
    """What one takes of the disk, with its log: less than its length where parts were given back."""
    total = 0
    for each in (file, log_of(file)):
        try:
            found = os.stat(each)
        except FileNotFoundError:
            continue
        total += min(found.st_size, found.st_blocks * 512)  # stat(2) counts blocks of 512 bytes
    return total


def trim(path: Path, most: int) -> None:
    """Let the oldest go until all take at most `most` bytes; of a last one the beginning stays."""
    files = kept(path)
    while len(files) > 1 and sum(map(disk_bytes, files)) > most:
        forget(files.pop(0))
    if not files or disk_bytes(files[0]) <= most:
        return
    if most <= 0:
        forget(files[0])
        return
    log_of(files[0]).unlink(missing_ok=True)
    os.truncate(files[0], min(most, files[0].stat().st_size))
    hint = "raise buffer.max_size to keep more the next time: evidence may take a quarter of it"
    text = "of a damaged buffer only the beginning is kept as evidence"
    log.warning(text, file=str(files[0]), bytes=most, hint=hint)


def make_room(path: Path, most: int) -> None:
    """Let the oldest go, all if need be, until the others take at most `most` bytes."""
    files = kept(path)
    while files and sum(map(disk_bytes, files)) > most:
        forget(files.pop(0))


def forget(file: Path) -> None:
    """Remove one, and say so."""
    hint = "copy the next one away in time, or raise buffer.max_size"
    text = "evidence of a damaged buffer was removed, as it took the room of events"
    log.warning(text, file=str(file), hint=hint)
    log_of(file).unlink(missing_ok=True)
    file.unlink(missing_ok=True)
