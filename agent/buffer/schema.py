"""The buffer's tables and how older ones become them; sqlite-utils keeps the record of what was applied.

`chunk`: what waits, a row a chunk, the oldest first by `id`, which is never used twice. `dead`: what PostHog
refused. `books`: the totals, a row for each joint, label (a source's or project's name) and reason. `clock`:
how far each boot's wall clock was ahead of its monotonic one (µs) when it was last looked at. `drops`: how
many datagrams the kernel had dropped of each socket when that was last booked.
"""

import sqlite3

from sqlite_utils import Database, Migrations

from agent import crash

migrations = Migrations("capture-agent")


@migrations()
def first_tables(db: Database) -> None:
    """Version 1."""
    # A key that may repeat after the table was empty would strand rows behind a cursor, hence AUTOINCREMENT.
    db.execute(
        """CREATE TABLE chunk (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            project TEXT NOT NULL,
            key TEXT,
            events INTEGER NOT NULL,
            size INTEGER NOT NULL,
            crc INTEGER NOT NULL,
            received_at INTEGER NOT NULL,
            boot TEXT NOT NULL,
            monotonic INTEGER NOT NULL,
            bytes INTEGER NOT NULL,
            packed BLOB NOT NULL
        )"""
    )
    # Covers what opening must sum up, so that a large backlog is not read to be counted.
    db.table("chunk").create_index(["project", "key", "id", "events", "bytes"], index_name="chunk_lane")
    db.execute(
        """CREATE TABLE dead (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            project TEXT NOT NULL,
            key TEXT,
            reason TEXT NOT NULL,
            detail TEXT NOT NULL,
            at INTEGER NOT NULL,
            received_at INTEGER NOT NULL,
            attempts INTEGER NOT NULL,
            event BLOB NOT NULL
        )"""
    )
    db.execute(
        """CREATE TABLE books (
            joint TEXT NOT NULL,
            label TEXT NOT NULL,
            reason TEXT NOT NULL,
            total INTEGER NOT NULL,
            PRIMARY KEY (joint, label, reason)
        ) WITHOUT ROWID"""
    )


@migrations()
def what_an_event_went_through(db: Database) -> None:
    """Version 2: marks of chunks, earlier burials of dead events, and how each boot's clock went."""
    # Of an older chunk nothing is known, so it has every mark.
    for table in ("chunk", "dead"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN marks INTEGER NOT NULL DEFAULT 3")
        db.execute(f"ALTER TABLE {table} ADD COLUMN burials TEXT")
        crash.point("migrate.added")
    db.execute("ALTER TABLE dead ADD COLUMN boot TEXT NOT NULL DEFAULT ''")
    db.execute("ALTER TABLE dead ADD COLUMN monotonic INTEGER NOT NULL DEFAULT 0")
    db.execute(
        "CREATE TABLE clock (id INTEGER PRIMARY KEY, boot TEXT NOT NULL UNIQUE, ahead INTEGER NOT NULL)"
    )


@migrations()
def what_sockets_dropped(db: Database) -> None:
    """Version 3: a socket that systemd holds outlives the agent, and its count goes on."""
    db.execute(
        "CREATE TABLE drops (id INTEGER PRIMARY KEY, socket TEXT NOT NULL UNIQUE, total INTEGER NOT NULL)"
    )


@migrations()
def how_a_chunk_was(db: Database) -> None:
    """Version 4: a checksum of the whole row, so that no chunk is sent that is not as it was written."""
    db.execute("ALTER TABLE chunk ADD COLUMN seal INTEGER")


@migrations()
def how_large_a_dead_event_is(db: Database) -> None:
    """Version 5: an index holds what opening must sum up, so that a million letters are not read for it."""
    db.execute("ALTER TABLE dead ADD COLUMN size INTEGER")
    crash.point("migrate.sized")
    db.table("dead").create_index(["size"], index_name="dead_size")


@migrations()
def how_a_dead_event_was(db: Database) -> None:
    """Version 6: a checksum of a dead letter's row, so that none is sent that is not as it was buried."""
    db.execute("ALTER TABLE dead ADD COLUMN seal INTEGER")


# Kept in SQLite's `user_version`, so that a start with nothing to migrate need not load this module.
VERSION = 6


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the database to `VERSION`; each step is a transaction of its own."""
    migrations.apply(Database(connection))
    crash.point("migrate.applied")
    connection.execute(f"PRAGMA user_version = {VERSION}")
