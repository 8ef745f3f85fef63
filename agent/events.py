"""The words that travel through the house: reads, chunks, rejects and tallies."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

Reason = Literal[
    "malformed_json",
    "malformed_logfmt",
    "not_an_object",
    "missing_event",
    "missing_distinct_id",
    "bad_uuid",
    "bad_properties",
    "too_large",
    "bad_utf8",
    "too_deep",
    "truncated",
    "forbidden",
    "rate_limited",
    "unknown_key",
    "filtered",
    "sampled",
]

# Refused as the source was told to, not for what is wrong with them.
UNREMARKABLE: frozenset[Reason] = frozenset(("filtered", "sampled"))

REASONS: tuple[Reason, ...] = Reason.__args__  # type: ignore[attr-defined]  # typing keeps the values there

# Chunks are what memory is counted in: a joint of 8 such chunks is 8 MiB.
CHUNK_EVENTS = 4096  # the counter of a UUIDv7 has 12 bits (RFC 9562, rand_a)
CHUNK_BYTES = 1024 * 1024

# Enough of a refused line to recognise the program that sent it.
SAMPLE_BYTES = 200


class Instant(NamedTuple):
    """One moment, told by the wall clock and by the boot's own clock, both in microseconds."""

    wall: int
    monotonic: int
    boot: str


class Cut(NamedTuple):
    """A line that was refused before it ended, and its beginning."""

    reason: Reason
    sample: str


# The properties that tell who sent an event, by the kernel's word alone: no payload can say them.
UID, GID, PID, UNIT, CONTAINER = "$agent_uid", "$agent_gid", "$agent_pid", "$agent_unit", "$agent_container"
SENDER = frozenset((UID, GID, PID, UNIT, CONTAINER))


class Origin(NamedTuple):
    """Who sent a read, and what follows from it for its events.

    `defaults` are properties for events that have none of that name, `forced` replace what they have.
    `project` and `key` are set where the events are not for the source's own. `uid` is the kernel's word.
    `historical` says that the events are old, and for PostHog's pipeline for such.
    """

    defaults: Mapping[str, msgspec.Raw] = {}
    forced: Mapping[str, msgspec.Raw] = {}
    project: str | None = None
    key: str | None = None
    uid: int | None = None
    historical: bool = False


class Denied(NamedTuple):
    """Lines that were refused unread, all for one reason: how many, and who sent them."""

    reason: Reason
    lines: int
    sample: str


class Read(NamedTuple):
    """Whole lines, each ended by a newline, that came from one client at one moment.

    After these come the lines that were `denied`, and at last one that will never be whole, the `cut`.
    """

    lines: bytes
    at: Instant
    cut: Cut | None = None
    origin: Origin | None = None
    denied: Denied | None = None


# What is known of a chunk's events, as bits of its `marks`.
GIVEN = 1  # some of their uuids came from clients, who may send one twice
HISTORICAL = 4  # their sender says that they are old ones
LONG = 2  # an event's name or id may be over 200 bytes, which PostHog's v1 protocol refuses


# What stands for the project in the books of events that carry another key than their project's.
OTHER = "other"

# Reasons to shed what was never accepted: these stand beside the rejected in the books, all others beside the
# delivered.
SHED_AT_THE_DOOR = ("full_newest", "shutdown")


def label_of(project: str, key: str | None) -> str:
    """Under which name events stand in books and metrics: a key is nobody's to read."""
    return project if key is None else OTHER


class Burial(NamedTuple):
    """Once an event was dead: when (µs), why, with which of PostHog's words, after how many requests."""

    at: int
    reason: str
    detail: str
    attempts: int


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Vouched events of one project, comma-joined, as raw deflate that ends on a full flush.

    `size` and `crc` (CRC-32) are of the bytes before compression. `key` is set only for events that
    carry another key than their project's, and never empty. `received_at` and `monotonic` are
    microseconds. `marks` are those below; `burials` is the past of a single event that was dead and
    is sent again.
    """

    project: str
    key: str | None = None
    events: int
    size: int
    crc: int
    received_at: int
    boot: str
    monotonic: int
    packed: bytes
    marks: int = 0
    burials: tuple[Burial, ...] = ()


class Reject(NamedTuple):
    """One line that is not an event: of which read, which non-empty line of it (from 0), and why.

    Of `lines` that were refused unread, one behind the other, it is the first.
    """

    read: int
    line: int
    reason: Reason
    sample: str
    lines: int = 1


def is_json(event: bytes) -> bool:
    """Whether it can be read, as UTF-8 and as JSON; a number may be larger than any program holds."""
    try:
        event.decode()
        msgspec.json.decode(event, type=msgspec.Raw)
    except (ValueError, RecursionError):
        return False
    return True


def sample(line: bytes) -> str:
    """The beginning of a refused line as printable text, whatever its bytes are."""
    begin = line[:SAMPLE_BYTES]
    try:
        return _printable(begin.decode())
    except UnicodeDecodeError as error:  # what begins there is told as bytes
        rest = begin[error.start :].decode("latin-1").encode("unicode_escape").decode()
        return _printable(begin[: error.start].decode()) + rest


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What reads of one source amounted to; enters the books in the commit of their chunks.

    `restamped` counts events whose own timestamp could not be read, `given_up` lines that a shutdown left no
    time for.
    """

    source: str
    received: int = 0
    rejected: Mapping[Reason, int] = msgspec.field(default_factory=dict)
    truncated: int = 0
    restamped: int = 0
    given_up: int = 0
