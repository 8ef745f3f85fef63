"""Writes what is left of a lease's chunks in their places, so that they keep their turn."""

import sqlite3
from collections.abc import Sequence

from agent.buffer import Lease
from agent.buffer.rows import UPDATE_CHUNK, same_origin, seal_of
from agent.events import Chunk


def keep(
    connection: sqlite3.Connection, lease: Lease, rest: Sequence[Chunk]
) -> tuple[dict[int, Chunk], list[Chunk]]:
    """Have `rest` in the rows of the chunks that it is of: what is where now, and what found no place.

    A chunk that was halved has one place, and more parts.
    """
    places = dict(zip(lease.ids, lease.chunks, strict=True))
    left = {id(chunk) for chunk in rest}
    kept = {ident: chunk for ident, chunk in places.items() if id(chunk) in left}
    untouched = {id(places.pop(ident)) for ident in kept}
    homeless: list[Chunk] = []
    for chunk in rest:
        if id(chunk) in untouched:
            continue
        ident = next((place for place, old in places.items() if same_origin(old, chunk)), None)
        if ident is None:
            homeless.append(chunk)
            continue
        del places[ident]
        connection.execute(
            UPDATE_CHUNK,
            (chunk.events, chunk.size, chunk.crc, len(chunk.packed), chunk.packed, seal_of(chunk), ident),
        )
        kept[ident] = chunk
    return kept, homeless
