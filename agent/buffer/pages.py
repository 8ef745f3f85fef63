"""Reads a damaged database page by page: every row of every page that is whole, whatever leads to it.

SQLite gives up at the first page that does not fit; a row that only an index or a table's upper pages lost
is still there. So the pages are read as the file format describes them (https://www.sqlite.org/fileformat.html),
each for itself, in the state that the log gives them. Nothing is written.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from agent.buffer.file import MAGIC, PAGE_BYTES
from agent.buffer.log import Frame, Log, is_page_size

HEADER_BYTES = 100

# Kinds of pages that hold rows: of a table, and of a table or index that is sorted by its columns.
TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR = 0x0D, 0x0A, 0x02
PTRMAP_FREE = 2

Value = int | float | bytes | str | None


class Row(NamedTuple):
    """A row as it stands in a page: `id` is None where it is sorted by its columns."""

    id: int | None
    values: tuple[Value, ...]
    pages: tuple[int, ...]  # on which it lies


class Sheet(NamedTuple):
    """A page with rows: those that can be read, and whether these are all that it had."""

    page: int
    rows: list[Row]
    whole: bool


def page_bytes_of(header: bytes) -> int | None:
    """How large a database's pages are, where its header can be read."""
    said = int.from_bytes(header[16:18], "big")
    return said if is_page_size(said) and header.startswith(MAGIC) else None


class Pages:
    """The pages of a database, with what its log has of them."""

    def __init__(self, database: Path) -> None:
        with ExitStack() as stack:
            self._file = stack.enter_context(open(database, "rb", buffering=0))
            log = Path(f"{database}-wal")
            self._log = stack.enter_context(open(log, "rb", buffering=0)) if log.exists() else None
            self._open = stack.pop_all()
        self.log = Log(self._log.fileno()) if self._log is not None else None
        header = self._read(self._file.fileno(), 0, HEADER_BYTES)
        said = page_bytes_of(header)
        if self.log is not None and self.log.sound and said != self.log.page_bytes:
            said, self.log = (self.log.page_bytes, self.log) if said is None else (said, None)
        self.page_bytes = said or PAGE_BYTES
        self._frames: dict[int, Frame] = {}
        self.count = -(-os.fstat(self._file.fileno()).st_size // self.page_bytes)
        for frame in self.log.committed() if self.log is not None else ():
            self._frames[frame.page] = frame
            self.count = frame.pages or max(self.count, frame.page)
        self._free = self._freelist()

    def close(self) -> None:
        """Let the files go."""
        self._open.close()

    def sheets(self, upto: int | None = None) -> Iterator[Sheet]:
        """All pages with rows that are not free; or only the first so many."""
        for number in range(1, self.count + 1 if upto is None else min(self.count, upto) + 1):
            if not self._is_free(number) and (sheet := self._sheet(number)) is not None:
                yield sheet

    def logged(self) -> Iterator[Sheet]:
        """Those that the log has, and has whole."""
        for number, frame in self._frames.items():
            if frame.sound and not self._is_free(number) and (sheet := self._sheet(number)) is not None:
                yield sheet

    def page(self, number: int) -> bytes:
        """A page as it was committed last; empty where it cannot be read."""
        if number in self._frames and self._log is not None:
            return self._read(self._log.fileno(), self._frames[number].at, self.page_bytes)
        if not 0 < number <= self.count:
            return b""
        return self._read(self._file.fileno(), (number - 1) * self.page_bytes, self.page_bytes)

    @staticmethod
    def _read(descriptor: int, at: int, size: int) -> bytes:
        try:
            return os.pread(descriptor, size, at)
        except OSError:  # a bad sector costs only its page
            return b""

    def _freelist(self) -> set[int]:
        """The free pages, as the header lists them: what they hold was deleted."""
        free: set[int] = set()
        trunk = int.from_bytes(self.page(1)[32:36], "big")
        while 0 < trunk <= self.count and trunk not in free:
            page = self.page(trunk)
            if len(page) < self.page_bytes:
                break
            free.add(trunk)
            trunk, leaves = struct.unpack_from(">II", page)
            leaves = min(leaves, self.page_bytes // 4 - 2)
            free.update(struct.unpack_from(f">{leaves}I", page, 8))
        return free

    def _is_free(self, number: int) -> bool:
        """Whether a page is free: also the map of pages says so, which every `auto_vacuum` database has."""
        if number in self._free:
            return True
        each = self.page_bytes // 5 + 1
        first = (number - 2) // each * each + 2
        if number < 3 or number == first:
            return False
        at = 5 * (number - first - 1)
        return self.page(first)[at : at + 1] == bytes([PTRMAP_FREE])

    def _sheet(self, number: int) -> Sheet | None:
        page, start = self.page(number), HEADER_BYTES if number == 1 else 0
        if len(page) < self.page_bytes or page[start] not in (TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR):
            return None
        kind = page[start]
        cells = int.from_bytes(page[start + 3 : start + 5], "big")
        first = start + (12 if kind == INDEX_INTERIOR else 8)
        rows: list[Row] = []
        for pointer in range(first, min(first + 2 * cells, len(page) - 1), 2):
            at = int.from_bytes(page[pointer : pointer + 2], "big")
            try:
                rows += self._row(page, at + 4 if kind == INDEX_INTERIOR else at, number, kind)
            except (IndexError, struct.error, UnicodeDecodeError):
                continue
        return Sheet(number, rows, whole=len(rows) == cells)

    def _row(self, page: bytes, at: int, number: int, kind: int) -> list[Row]:
        size, at = _varint(page, at)
        ident = None
        if kind == TABLE_LEAF:
            ident, at = _varint(page, at)
            ident -= ident >> 63 << 64
        if size > self.count * self.page_bytes:
            return []
        local = self._local(size, kind)
        payload, used = [page[at : at + local]], [number]
        if local < size:
            following = int.from_bytes(page[at + local : at + local + 4], "big")
            left = size - local
            while left > 0:
                over = self.page(following)
                if len(over) < self.page_bytes or following in used:
                    return []
                used.append(following)
                payload.append(over[4 : 4 + left])
                left -= self.page_bytes - 4
                following = int.from_bytes(over[:4], "big")
        whole = b"".join(payload)
        return [Row(ident, _values(whole), tuple(used))] if len(whole) == size else []

    def _local(self, size: int, kind: int) -> int:
        """How much of a row lies in the page itself (section 1.6)."""
        usable = self.page_bytes
        most = usable - 35 if kind == TABLE_LEAF else (usable - 12) * 64 // 255 - 23
        if size <= most:
            return size
        least = (usable - 12) * 32 // 255 - 23
        some = least + (size - least) % (usable - 4)
        return some if some <= most else least


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, and where it ends."""
    value = 0
    for length in range(8):
        byte = data[at + length]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + length + 1
    return value << 8 | data[at + 8], at + 9


def _values(record: bytes) -> tuple[Value, ...]:
    """The columns of a row (section 2.1)."""
    end, at = _varint(record, 0)
    begin, found = end, list[Value]()
    while at < end:
        kind, at = _varint(record, at)
        size = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)[kind] if kind < 10 else (kind - 12) // 2
        data = record[begin : begin + size]
        if size < 0 or len(data) < size:
            raise IndexError("a row that goes beyond its end")
        begin += size
        found.append(_value(kind, data))
    return tuple(found)


def _value(kind: int, data: bytes) -> Value:
    if kind == 0:
        return None
    if kind == 7:
        number: float = struct.unpack(">d", data)[0]
        return number
    if kind in (8, 9):
        return kind - 8
    if kind < 7:
        return int.from_bytes(data, "big", signed=True)
    return data if kind % 2 == 0 else data.decode()
