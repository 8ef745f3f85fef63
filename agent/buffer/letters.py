"""The dead letters' rows: buried beside the chunks, bounded, looked at, sent again or forgotten."""

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from agent.buffer import LETTERS_BYTES, PURGED_AT_ONCE, PURGED_BYTES, DeadEvent, DeadLetter, Entry
from agent.buffer.file import Damage
from agent.buffer.rows import Change, read_burials, told_burials
from agent.events import is_json, label_of
from agent.pack import crc32

INSERT = """INSERT INTO dead
    (id, project, key, event, reason, detail, at, received_at, boot, monotonic, marks, attempts, burials,
    size, seal)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# From an index; those of versions before 5 have no size in it.
COUNT = """SELECT count(*), ifnull(sum(size), 0)
    + (SELECT ifnull(sum(length(event)), 0) FROM dead WHERE size IS NULL),
    ifnull((SELECT max(id) FROM dead), 0) FROM dead"""
# Of an event only the length, which is told without reading it.
OLDEST_UPTO = "SELECT id, project, key, ifnull(length(event), 0) FROM dead WHERE id <= ? ORDER BY id LIMIT ?"
OLDEST = "SELECT id, ifnull(length(event), 0) FROM dead ORDER BY id LIMIT 1"
SELECT = """SELECT id, project, key, CAST(event AS BLOB), reason, detail, at, received_at, boot,
    monotonic, marks, attempts, burials, size, seal FROM dead"""

# Dead letters take at most this part of the bound; the oldest go first.
DEAD_SHARE = 10

# SQLite's integers have 64 bits: what is larger is no row's id, and makes Python's sqlite3 raise.
IDS = range(1, 2**63)


class Letters:
    """The table `dead`; what is done to it is counted in a `Change`, which `apply` shows once committed."""

    def __init__(self, connection: sqlite3.Connection, max_size: int) -> None:
        """Count them. Raises `Damage` where the index holds no sizes."""
        self._connection = connection
        self._most_bytes = max_size // DEAD_SHARE
        numbers = connection.execute(COUNT).fetchone()
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise Damage("the index of the dead letters is not what was written")
        self.count, self._bytes, self.newest = numbers

    def apply(self, change: Change) -> None:
        """Show what was committed."""
        self.count += change.dead_letters
        self._bytes += change.dead_bytes
        self.newest = max(self.newest, change.newest_letter)

    def bury(self, dead: DeadEvent, change: Change) -> None:
        """Keep a dead event, and let the oldest letters go where they take too much."""
        row = row_of_letter(dead, seal_of_letter(dead))
        change.newest_letter = self._connection.execute(INSERT, (None, *row)).lastrowid or 0
        change.dead_letters += 1
        change.dead_bytes += len(dead.event)
        while self._bytes + change.dead_bytes > self._most_bytes:
            if (oldest := self._connection.execute(OLDEST).fetchone()) is None:
                raise Damage("the dead letters are not as large as their index says")
            ident, size = oldest
            self._forget(ident, size, change)
            change.books[Entry("dead_evicted", "", "")] += 1

    def take_out(self, letter: DeadLetter, joint: str, change: Change) -> None:
        """A letter leaves, which is entered at `joint`."""
        self._forget(letter.id, len(letter.event), change)
        change.books[Entry(joint, label_of(letter.project, letter.key), "")] += 1

    def purge_upto(self, newest: int, change: Change) -> int:
        """See `DeadLetters.purge_upto`."""
        letters = last = size = 0
        rows = self._connection.execute(OLDEST_UPTO, (max(0, min(newest, IDS[-1])), PURGED_AT_ONCE))
        for ident, project, key, length in rows:
            if letters and size + length > PURGED_BYTES:
                break
            letters, last, size = letters + 1, ident, size + length
            named = project if isinstance(project, str) else ""  # of a damaged one
            change.books[Entry("purged", label_of(named, key), "")] += 1
        self._connection.execute("DELETE FROM dead WHERE id <= ?", (last,))
        change.dead_letters -= letters
        change.dead_bytes -= size
        return letters

    def _forget(self, ident: int, size: int, change: Change) -> None:
        self._connection.execute("DELETE FROM dead WHERE id = ?", (ident,))
        change.dead_letters -= 1
        change.dead_bytes -= size

    def beyond(self, after: int, most: int) -> list[DeadLetter]:
        """The first letters whose id is beyond `after`."""
        if after > IDS[-1]:
            return []
        rows = self._connection.execute(f"{SELECT} WHERE id > ? ORDER BY id LIMIT ?", (after, most))
        found: list[DeadLetter] = []
        size = 0
        for row in rows:
            found.append(_letter(row))
            size += len(found[-1].event)
            if size > LETTERS_BYTES:
                break
        return found

    def of_ids(self, ids: Sequence[int]) -> list[DeadLetter]:
        """Those of the letters that there are, each once."""
        found = []
        for ident in dict.fromkeys(filter(IDS.__contains__, ids)):
            row = self._connection.execute(f"{SELECT} WHERE id = ?", (ident,)).fetchone()
            found += [_letter(row)] if row else []
        return found

    def told_apart(self, ids: Sequence[int]) -> tuple[list[DeadLetter], tuple[int, ...]]:
        """Those of the letters that are what was buried, and the ids of those that are not."""
        found = self.of_ids(ids)
        damaged = tuple(letter.id for letter in found if letter.damaged)
        return [letter for letter in found if not letter.damaged], damaged


def row_of_letter(dead: DeadEvent, seal: object) -> tuple[object, ...]:
    """What `INSERT` is given after the id; a row that is carried over keeps the seal that it had."""
    return (
        dead.project, dead.key, dead.event, dead.reason, dead.detail, dead.at, dead.received_at, dead.boot,
        dead.monotonic, dead.marks, dead.attempts, told_burials(dead.burials), len(dead.event), seal,
    )  # fmt: skip


def seal_of_letter(dead: DeadEvent) -> int:
    """A CRC-32 of all that a dead event is, as `rows.seal_of` is a chunk's: its size is the event's."""
    fields = (
        dead.project, dead.key, dead.reason, dead.detail, dead.at, dead.received_at, dead.boot,
        dead.monotonic, dead.marks, dead.attempts, dead.burials,
    )  # fmt: skip
    return crc32(dead.event, crc32(msgspec.json.encode(fields)))


def _letter(row: Sequence[object]) -> DeadLetter:
    """A row as `SELECT` names it, whatever it holds: one that is not what was buried is a letter too."""
    ident, *values, burials, size, seal = row
    fields = dict(zip(_FIELDS, (*values, burials, ident), strict=True))
    try:
        fields["burials"] = read_burials(burials)
        letter = msgspec.convert(fields, DeadLetter)
    except ValueError:
        return _remains(fields)
    # One of an agent that wrote no seals is taken as it is, if anybody can read it.
    whole = is_json(letter.event) if seal is None else _is_sealed(letter, size, seal)
    return letter if whole else msgspec.structs.replace(letter, damaged=True)


# As the struct has them, which begins with those that are inherited.
_FIELDS = DeadLetter.__struct_fields__[: DeadLetter.__struct_fields__.index("id") + 1]


def _is_sealed(letter: DeadLetter, size: object, seal: object) -> bool:
    return seal == seal_of_letter(letter) and size == len(letter.event)


def _remains(fields: dict[str, object]) -> DeadLetter:
    """What can be read of a row that is no letter."""
    remains: dict[str, Any] = {"damaged": True}
    for field in msgspec.structs.fields(DeadLetter)[: len(_FIELDS)]:
        with suppress(ValueError):
            remains[field.name] = msgspec.convert(fields[field.name], field.type)
    return msgspec.structs.replace(_EMPTY, **remains)


_EMPTY = DeadLetter(
    id=0, project="", event=b"", reason="", detail="", at=0, received_at=0, attempts=0, damaged=True
)
