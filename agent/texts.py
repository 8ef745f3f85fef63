"""Events on their way to text: the columns that a chunk is laid together from, and what is added to them."""

from collections.abc import Container, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar

import msgspec
from msgspec import Raw

from agent.envelope import Envelope, Stamp
from agent.events import CHUNK_EVENTS, Read

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode

# Stands for an event's properties while its other fields are written: no JSON on one line holds a newline.
MARK = Raw(b"\n")

# UUIDv7 (RFC 9562): rand_a's 12 bits count the events of a chunk, so that they sort as they came.
_COUNTERS = tuple(b"7%03x-" % count for count in range(CHUNK_EVENTS))
_VARIANT = 0x8000_0000_0000_0000
RANDOM_BITS = 62  # rand_b, one for each chunk
_MICROSECONDS = tuple(b'%03dZ"' % count for count in range(1000))
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Texts(NamedTuple):
    """Events on their way to text: columns, so that no bytes are laid together but once, for the chunk.

    An event is its envelope with `MARK` for its properties; in place of that go a prefix, the properties, and
    what is laid behind them.
    """

    envelopes: list[Envelope]
    prefixes: list[bytes]
    properties: list[bytes]
    uuids: list[bytes]
    stamps: list[bytes]

    def without(self, odd: Container[int]) -> "Texts":
        """All but some."""

        def kept(column: list[T]) -> list[T]:
            return [value for at, value in enumerate(column) if at not in odd]

        return Texts(kept(self.envelopes), *map(kept, self[1:]))

    def joined(self, first: int, end: int) -> bytes:
        """The events from `first` to before `end`, with commas between them."""
        heads = _encode(self.envelopes[first:end])[1:-1].split(b"\n")
        parts = [b""] * (5 * (end - first))
        last = heads.pop()
        for place, column in enumerate((heads, *(column[first:end] for column in self[1:]))):
            parts[place::5] = column
        parts.append(last)
        return b"".join(parts)


def stamps_of(reads: Sequence[Read], lines: Sequence[int]) -> list[bytes]:
    """For each line the text of its timestamp, a microsecond apart: they sort as they came."""
    stamps: list[bytes] = []
    for read, count in zip(reads, lines, strict=True):
        wall, end = read.at.wall, read.at.wall + count
        while wall < end:
            milliseconds, first = divmod(wall, 1000)
            moment = _EPOCH + timedelta(milliseconds=milliseconds)
            head = b'","timestamp":"%b' % moment.isoformat(timespec="milliseconds")[:-6].encode()
            some = _MICROSECONDS[first : first + end - wall]
            stamps += [head + microsecond for microsecond in some]
            wall += len(some)
    return stamps


def uuids_of(wall: int, random: int, count: int) -> list[bytes]:
    """For each event the text of a UUIDv7: the time, a counter, and bits that no other chunk has."""
    milliseconds = b"%012x" % (wall // 1000 & 0xFFFF_FFFF_FFFF)
    head = b',"uuid":"%b-%b-' % (milliseconds[:8], milliseconds[8:])
    uuids: list[bytes] = []
    while len(uuids) < count:
        last = b"%016x" % (_VARIANT | random & (1 << RANDOM_BITS) - 1)
        tail = b"%b-%b" % (last[:4], last[4:])
        uuids += [head + counter + tail for counter in _COUNTERS[: count - len(uuids)]]
        random += 1
    return uuids


def stamp_of(uuid: bytes, stamp: bytes) -> Stamp:
    """Both as text, for an event that is completed field by field."""
    return Stamp(uuid.split(b'"')[3].decode(), stamp.split(b'"')[4].decode())
