"""Whether the disk has room and inodes for the buffer's files and for the socket files."""

import os
from collections.abc import Iterator
from pathlib import Path

from agent.buffer.file import SETTLE_BYTES, disk_bytes
from agent.config import Config
from agent.doctor.finding import Finding, amount, error, ok, warning

CHECK = "disk"

# The database, its log, its lock and evidence of an old one; sockets, and some to spare.
FEW_INODES = 16


def look(config: Config) -> Iterator[Finding]:
    """The buffer's file system, and that of the admin socket."""
    if config.buffer.kind == "sqlite":
        yield from _of_buffer(config)
    if config.admin.socket:
        folder = existing(os.path.dirname(config.admin.socket))
        yield from (finding for finding in _inodes(folder, os.statvfs(folder)) if finding.level != "ok")


def existing(folder: str) -> str:
    """The folder, or the nearest one above it that is there."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "/"
    return folder


def _of_buffer(config: Config) -> Iterator[Finding]:
    folder = existing(os.path.dirname(config.buffer.path))
    room = os.statvfs(folder)
    if room.f_flag & os.ST_RDONLY:
        hint = "mount it for writing, or set buffer.path to another place; dmesg may say why it is so"
        yield error(CHECK, folder, "this file system is read-only", hint)
        return
    free = room.f_bavail * room.f_frsize
    used = disk_bytes(Path(config.buffer.path))
    wanted = max(0, config.buffer.max_size - used)
    told = f"{amount(free)} are free, and the buffer may grow by {amount(wanted)}"
    if free < SETTLE_BYTES and wanted:
        yield error(
            CHECK, folder, told, "make room: nothing can be taken, and what was taken cannot be settled"
        )
    elif free < wanted:
        yield warning(CHECK, folder, told, "make room, or set buffer.max_size to what the disk can give")
    else:
        yield ok(CHECK, folder, told)
    yield from _inodes(folder, room)


def _inodes(folder: str, room: os.statvfs_result) -> Iterator[Finding]:
    if not room.f_files:  # such a file system makes them as it needs them
        return
    told = f"{room.f_favail:,} of {room.f_files:,} inodes are free"
    if room.f_favail < FEW_INODES:
        yield error(
            "inodes", folder, told, "remove files that nobody needs (df -i, du --inodes): no file can be made"
        )
    else:
        yield ok("inodes", folder, told)
