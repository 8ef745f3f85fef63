"""The dead letters' rows: buried beside the chunks, bounded, looked at, sent again or forgotten."""

import sqlite3
from collections.abc import Sequence

import msgspec

from agent.buffer import LETTERS_BYTES, PURGED_AT_ONCE, PURGED_BYTES, DeadEvent, DeadLetter, Entry
from agent.buffer.file import Damage
from agent.buffer.rows import Change, read_burials, told_burials
from agent.events import label_of

INSERT = """INSERT INTO dead
    (id, project, key, event, reason, detail, at, received_at, boot, monotonic, marks, attempts, burials,
    size)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# From an index; those of versions before 5 have no size in it.
COUNT = """SELECT count(*), ifnull(sum(size), 0)
    + (SELECT ifnull(sum(length(event)), 0) FROM dead WHERE size IS NULL),
    ifnull((SELECT max(id) FROM dead), 0) FROM dead"""
# Of an event only the length, which is told without reading it.
OLDEST_UPTO = "SELECT id, project, key, ifnull(length(event), 0) FROM dead WHERE id <= ? ORDER BY id LIMIT ?"
OLDEST = "SELECT id, ifnull(length(event), 0) FROM dead ORDER BY id LIMIT 1"
SELECT = """SELECT id, project, key, CAST(event AS BLOB), reason, detail, at, received_at, boot,
    monotonic, marks, attempts, burials FROM dead"""

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
        change.newest_letter = self._connection.execute(INSERT, (None, *row_of_letter(dead))).lastrowid or 0
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
            if not isinstance(project, str):
                raise Damage("a dead letter is not what was written")
            letters, last, size = letters + 1, ident, size + length
            change.books[Entry("purged", label_of(project, key), "")] += 1
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


def row_of_letter(dead: DeadEvent) -> tuple[object, ...]:
    """What `INSERT` is given after the id."""
    return (
        dead.project, dead.key, dead.event, dead.reason, dead.detail, dead.at, dead.received_at, dead.boot,
        dead.monotonic, dead.marks, dead.attempts, told_burials(dead.burials), len(dead.event),
    )  # fmt: skip


def _letter(row: Sequence[object]) -> DeadLetter:
    """A row as `SELECT` names it. Raises `Damage` where it is none that was written."""
    try:
        fields = dict(zip(DeadLetter.__struct_fields__, _in_order(row), strict=True))
        return msgspec.convert(fields, DeadLetter)
    except ValueError as error:
        raise Damage(f"a dead letter is not what was written: {error}") from error


def _in_order(row: Sequence[object]) -> Sequence[object]:
    """The columns in the order of the fields, which begin with those that are inherited."""
    ident, *fields, burials = row
    return (*fields, read_burials(burials), ident)
