"""Knows the rows of a damaged database for what they are, and writes those that are whole into a new one."""

import sqlite3
from collections import Counter
from collections.abc import Iterable

import msgspec

from agent.buffer import SHED, Books, DeadEvent, Entry, Lease
from agent.buffer.balance import balanced
from agent.buffer.file import MIGRATIONS
from agent.buffer.letters import INSERT as INSERT_LETTER
from agent.buffer.letters import row_of_letter
from agent.buffer.pages import Row, Sheet
from agent.buffer.rows import ENTER, INSERT_CHUNK, chunk_of, read_burials, row_of, seal_of
from agent.events import Chunk, is_json

JOINTS = {
    "received", "accepted", "rejected", "shed", "truncated", "restamped", "dropped",
    "delivered", "warned", "dead", "dead_evicted", "replayed", "purged",
}  # fmt: skip
# No total and no id is ever larger: at a billion a second it would take a hundred days to count so far.
MOST = 2**53

# What the columns hold that were added later, in a row from before (`schema`).
CHUNK_LATER, CHUNK_FIRST = (3, None, None), 11
LETTER_LATER, LETTER_FIRST = (3, None, "", 0, None, None), 9

SEAL_BY_ID = "SELECT seal FROM chunk WHERE id = ?"
KEEP_LETTER = INSERT_LETTER.replace("INSERT", "INSERT OR IGNORE", 1)
KEEP_CLOCK = "INSERT OR IGNORE INTO clock (id, boot, ahead) VALUES (?, ?, ?)"
KEEP_DROPS = "INSERT OR IGNORE INTO drops (id, socket, total) VALUES (?, ?, ?)"
RAISE_SEQUENCE = "UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?"
BEGIN_SEQUENCE = """INSERT INTO sqlite_sequence (name, seq)
    SELECT ?2, ?1 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = ?2)"""


def chunk_in(row: Row) -> Chunk | None:
    """The chunk that a row is, if it is one and whole."""
    values = (*row.values, *CHUNK_LATER[max(0, len(row.values) - CHUNK_FIRST) :])
    if row.id is None or len(values) != CHUNK_FIRST + len(CHUNK_LATER):
        return None
    _, project, key, events, size, crc, received_at, boot, monotonic, _, packed, marks, burials, seal = values
    return chunk_of(
        (project, key), (events, size, crc, received_at, boot, monotonic, packed, marks, burials, seal)
    )


def letter_in(row: Row) -> tuple[DeadEvent, object] | None:
    """The dead letter that a row is, and the seal that it has: one that does not fit it still tells of that.

    A row of an older agent has no seal: it is JSON at least.
    """
    values = (*row.values, *LETTER_LATER[max(0, len(row.values) - LETTER_FIRST) :])
    if row.id is None or len(values) != LETTER_FIRST + len(LETTER_LATER):
        return None
    *others, seal = values[1:]
    fields: dict[str, object] = dict(zip(_LETTER, others, strict=True))
    try:
        event = fields["event"]
        fields["event"] = event.encode() if isinstance(event, str) else event
        fields["burials"] = read_burials(fields["burials"])
        letter = msgspec.convert(fields, DeadEvent)
    except ValueError:
        return None
    return (letter, seal) if seal is not None or is_json(letter.event) else None


_LETTER = (
    "project", "key", "reason", "detail", "at", "received_at", "attempts", "event", "marks", "burials",
    "boot", "monotonic", "size",
)  # fmt: skip


def is_ours(row: Row) -> bool:
    """Whether only a database of this program has such a row."""
    if len(row.values) == 3 and row.values[0] == "capture-agent" and row.values[1] in MIGRATIONS:
        return True
    return row.values[:2] in _OURS or chunk_in(row) is not None


# In the schema.
_OURS = (("index", "chunk_lane"), ("table", "_sqlite_migrations"))


class Salvage:
    """What was carried over into the new database, inside a transaction of its caller's."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._run = connection.execute
        self.pending = 0  # bytes since the caller set it to 0
        self._books: Books = Counter()
        self._sequence = {"chunk": 0, "dead": 0}

    def take(self, sheet: Sheet) -> list[int]:
        """Carry over a page's rows; the pages of which all is carried over."""
        spent: list[int] = []
        chunks = 0
        for row in sheet.rows:
            chunk = chunk_in(row)
            if chunk is None:
                self._note(row)
                continue
            chunks += 1
            self.keep(row.id, chunk)
            spent += row.pages[1:]
        return [*spent, sheet.page] if chunks and sheet.whole and chunks == len(sheet.rows) else spent

    def keep(self, ident: int | None, chunk: Chunk) -> None:
        """Write a chunk under its id, or under a new one where another has it."""
        if ident is None or not 0 < ident < MOST:
            ident = None
        elif (there := self._run(SEAL_BY_ID, (ident,)).fetchone()) is not None:
            if there[0] == seal_of(chunk):
                return
            ident = None
        self._run(INSERT_CHUNK, row_of(chunk, ident))
        self.pending += len(chunk.packed)

    def _note(self, row: Row) -> None:
        """Anything else than a chunk."""
        match (row.id, *row.values):
            case (None, str(joint), str(label), str(reason), int(total)):
                if joint in JOINTS and 0 < total < MOST and (joint != "shed" or reason in SHED):
                    self._books[Entry(joint, label, reason)] = total
            case (int(ident), None, str(name), int(number)) if 0 < ident < MOST and abs(number) < MOST * 1024:
                # A socket's name is its boot's and, behind a slash, its own.
                self._run(KEEP_DROPS if "/" in name else KEEP_CLOCK, (ident, name, number))
            case (int(), "chunk" | "dead" as table, int(newest)) if newest < MOST:
                self._sequence[table] = max(self._sequence[table], newest)
            case (int(ident), *_) if 0 < ident < MOST and (found := letter_in(row)) is not None:
                letter, seal = found
                self._run(KEEP_LETTER, (ident, *row_of_letter(letter, seal)))
                self.pending += len(letter.event)

    def close_books(self, books: Books | None, leases: Iterable[Lease]) -> tuple[int, int]:
        """Keep what is out on lease, and enter what is missing: the events there are, and those lost.

        `books` are better known to a process that ran on the database than the database itself.
        """
        for lease in leases:
            for ident, chunk in zip(lease.ids, lease.chunks, strict=True):
                self.keep(ident, chunk)
        for table, newest in self._sequence.items():
            self._run(RAISE_SEQUENCE, (newest, table))
            self._run(BEGIN_SEQUENCE, (newest, table))
        events = self._run("SELECT ifnull(sum(events), 0) FROM chunk").fetchone()[0]
        letters = self._run("SELECT count(*) FROM dead").fetchone()[0]
        before = self._books if books is None else books
        after = balanced(before, events, letters)
        self._run("DELETE FROM books")
        for entry, total in after.items():
            self._run(ENTER, (*entry, total))
        lost = after[Entry("shed", "", "damaged")] - before[Entry("shed", "", "damaged")]
        return events, lost
