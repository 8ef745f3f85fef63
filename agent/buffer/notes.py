"""What the buffer remembers of its host: how each boot's clocks stood, and what the kernel dropped so far."""

import sqlite3

from agent.buffer import CLOCKS_KEPT, SOCKETS_KEPT, Entry
from agent.buffer.entries import newly_dropped
from agent.buffer.rows import Change

READ_CLOCKS = "SELECT boot, ifnull(CAST(ahead AS INTEGER), 0) FROM clock ORDER BY id"
NOTE_CLOCK = "INSERT OR REPLACE INTO clock (boot, ahead) VALUES (?, ?)"
FORGET_CLOCKS = "DELETE FROM clock WHERE id NOT IN (SELECT id FROM clock ORDER BY id DESC LIMIT ?)"

READ_DROPS = "SELECT ifnull(CAST(total AS INTEGER), 0) FROM drops WHERE socket = ?"
NOTE_DROPS = "INSERT OR REPLACE INTO drops (socket, total) VALUES (?, ?)"
FORGET_DROPS = "DELETE FROM drops WHERE id NOT IN (SELECT id FROM drops ORDER BY id DESC LIMIT ?)"


class Notes:
    """The notes of one database; who calls `note_...` holds a transaction open."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.read_clocks()

    def read_clocks(self) -> None:
        """Show in `clocks` what is committed."""
        self.clocks: dict[str, int] = dict(self._connection.execute(READ_CLOCKS))

    def note_clock(self, boot: str, ahead: int) -> None:
        """Remember a boot's clock, and forget the oldest."""
        self._connection.execute(NOTE_CLOCK, (boot, ahead))
        self._connection.execute(FORGET_CLOCKS, (CLOCKS_KEPT,))

    def note_drops(self, source: str, socket: str, total: int, change: Change) -> None:
        """Book what a socket's count says beyond the last note of it, and forget the oldest."""
        row = self._connection.execute(READ_DROPS, (socket,)).fetchone()
        change.books[Entry("dropped", source, "")] += newly_dropped(row[0] if row else 0, total)
        self._connection.execute(NOTE_DROPS, (socket, total))
        self._connection.execute(FORGET_DROPS, (SOCKETS_KEPT,))
