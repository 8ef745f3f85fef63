"""The door: turns lines into events that PostHog will take, whole chunks at a time.

For every event that it lets in it promises: one JSON object in UTF-8; `event` and `distinct_id` present, at
most 200 characters each; `properties` an object; nothing nested deeper than PostHog reads; a `uuid` and a UTC
`timestamp`. Properties stay sealed; they are looked into only where a scan of the whole chunk says that
something in them matters. They can still hide a number beyond a double (`1e999`): that scan would cost more
than the decoding, so delivery finds it.
"""

import re
import secrets
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate
from typing import Annotated

import msgspec
from msgspec import UNSET, Raw

from agent.decode.ndjson import count_byte
from agent.envelope import (
    DECODE_ERRORS,
    FOLDED,
    OPTIONS,
    Envelope,
    Flaws,
    before_a_repeat,
    complete,
    examine,
    over_long,
    too_deep,
)
from agent.events import (
    CHUNK_BYTES,
    CHUNK_EVENTS,
    GIVEN,
    LONG,
    Chunk,
    Instant,
    Read,
    Reason,
    Reject,
    Tally,
    sample,
)
from agent.pack import crc32, deflate
from agent.texts import MARK, Texts, stamp_of, stamps_of, uuids_of

# Brackets that a chunk may have beside two an event before its lines are looked at for nesting one by one.
SPARE_BRACKETS = 120

# How the names of PostHog's own properties begin, as keys in JSON.
RESERVED = b'"$'

# A number of 19 digits that no client knows, told to nobody: what stands between two lines, see `_open`.
_NONCE = 2**62 + secrets.randbits(62)
_SEAL = b",%d],\n[" % _NONCE
_Sealed = tuple[Envelope, Annotated[int, msgspec.Meta(ge=_NONCE, le=_NONCE)]]

_rows = msgspec.json.Decoder(list[_Sealed]).decode
_encode = msgspec.json.Encoder().encode


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a source adds to its events, the largest line (bytes) it takes, and where its events go."""

    source: str
    project: str
    properties: Mapping[str, object]
    distinct_id: str
    max_event: int
    max_batch_events: int
    max_batch_size: int


class Decoded(msgspec.Struct, frozen=True, kw_only=True):
    """What reads amounted to: chunks, refusals, how many lines each read had, and the tally."""

    chunks: Sequence[Chunk]
    rejects: Sequence[Reject]
    lines: Sequence[int]
    tally: Tally


class Door:
    """One source's door: its rules in the form in which they are fast to apply."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._defaults = {name: Raw(_encode(value)) for name, value in rules.properties.items()}
        packed = _encode(self._defaults)
        self._prefix = packed[:-1] + b"," if self._defaults else b"{"
        keys = [_encode(name) for name in (*rules.properties, *FOLDED, *OPTIONS)]
        # Two patterns that begin with a literal byte, which the regex engine looks for quickly: all the keys
        # in one pattern cost 3 µs an event, these 0.1.
        reserved = [key.removeprefix(RESERVED) for key in keys if key.startswith(RESERVED)]
        self._reserved = re.compile(rb"\$(?:" + b"|".join(map(re.escape, reserved)) + b")")
        self._plain = [key for key in keys if not key.startswith(RESERVED)]
        self._plain += [key.replace(b"/", rb"\/") for key in self._plain if b"/" in key]
        # An ASCII key can hide behind escapes of ASCII characters only.
        self._escaped = re.compile(rb"\\u00[0-7]" if all(map(bytes.isascii, keys)) else rb"\\u")

    def vouch(self, reads: Sequence[Read], random: int) -> Decoded:
        """Chunks of all that is good in the reads, and a reject for each line that is not.

        `random` has `RANDOM_BITS` bits and is never given twice.
        """
        flaws = Flaws()
        opened, lines = _open(reads)
        envelopes = self._decode(opened, sum(lines)) if self._fit(reads) else None
        places: Sequence[tuple[int, int]] | None = None
        rejects: list[Reject] = []
        if envelopes is None:
            lines, places, envelopes, rejects = self._decode_singly(reads, flaws)
        stamps = stamps_of(reads, lines)
        if places is not None:
            first = list(accumulate(lines, initial=0))
            stamps = [stamps[first[read] + line] for read, line in places]
        uuids = uuids_of(reads[0].at.wall if reads else 0, random, len(envelopes))
        texts = Texts(envelopes, [self._prefix] * len(envelopes), [], uuids, stamps)
        given: set[str] = set()
        odd = self._complete(texts, self._concerned(opened), flaws, given)
        if odd:
            where = places or _places(lines, odd)
            for at, reason in odd.items():
                rejects.append(Reject(*where[at], reason, sample(_encode(envelopes[at]))))
            texts = texts.without(odd)
        for number, read in enumerate(reads):
            if read.cut is not None:
                rejects.append(Reject(number, lines[number], *read.cut))
                lines[number] += 1
        rejects.sort(key=_by_place)
        return Decoded(
            chunks=self._chunks(texts, reads[0].at, given) if texts.envelopes else (),
            rejects=rejects,
            lines=lines,
            tally=self._tally(sum(lines), rejects, flaws),
        )

    def _fit(self, reads: Sequence[Read]) -> bool:
        """Whether no line is too long; most reads are shorter than one line may be."""
        longest = self.rules.max_event
        return all(
            len(read.lines) <= longest or max(map(len, read.lines.split(b"\n"))) <= longest for read in reads
        )

    def _decode(self, opened: bytes, count: int) -> list[Envelope] | None:
        """All events of `count` opened lines at once; None where one of them needs a closer look."""
        if not _is_utf8(opened):
            return None
        # Of every line's brackets, `_open` wrote one, and an event with its properties has two.
        spare = count_byte(opened, b"{") + count_byte(opened, b"[") - 3 * count
        if spare > SPARE_BRACKETS and any(map(too_deep, opened.split(b"\n"))):
            return None
        try:
            rows = _rows(opened)
        except DECODE_ERRORS:
            return None
        # Every row ends with a seal, so where there are as many, no line shares one with its neighbour.
        return [envelope for envelope, _ in rows] if len(rows) == count else None

    def _decode_singly(
        self, reads: Sequence[Read], flaws: Flaws
    ) -> tuple[list[int], list[tuple[int, int]], list[Envelope], list[Reject]]:
        """Line by line, so that only the culprits are refused: lines a read, places, envelopes, rejects."""
        lines: list[int] = []
        places: list[tuple[int, int]] = []
        envelopes: list[Envelope] = []
        rejects: list[Reject] = []
        for number, read in enumerate(reads):
            count = 0
            for line in read.lines.split(b"\n"):
                if not (line := line.strip()):
                    continue
                examined = examine(line, self.rules.max_event, flaws)
                if isinstance(examined, str):
                    rejects.append(Reject(number, count, examined, sample(line)))
                else:
                    places.append((number, count))
                    envelopes.append(examined)
                count += 1
            lines.append(count)
        return lines, places, envelopes, rejects

    def _concerned(self, blob: bytes) -> bool:
        """Whether a line may hold a key at which the door must look, however it is escaped."""
        if b"$" in blob and self._reserved.search(blob) is not None:
            return True
        if b"\\" in blob and self._escaped.search(blob) is not None:
            return True
        return any(key in blob for key in self._plain)

    def _complete(self, texts: Texts, concerned: bool, flaws: Flaws, given: set[str]) -> dict[int, Reason]:
        """Complete every event in place; those that break a rule, by their place. The hot loop.

        Uuids that came from clients are added to `given`.

        A plain event's properties stay the bytes that they are: the source's own are laid before them, its
        uuid and timestamp behind. Any other is completed field by field.
        """
        default, mark = self.rules.distinct_id or None, MARK
        watched = self._concerned if concerned else None
        odd: dict[int, Reason] = {}
        keep = texts.properties.append
        for at, envelope in enumerate(texts.envelopes):
            properties = bytes(envelope.properties)
            who = envelope.distinct_id
            if who is None:
                envelope.distinct_id = who = default
            if (
                type(who) is str
                and not who.isspace()
                and properties[:2] == b'{"'
                and envelope.uuid is None
                and envelope.timestamp is None
                and (watched is None or not (watched(properties) or _has_roots(envelope)))
            ):
                keep(properties[1:])
            else:
                stamp = stamp_of(texts.uuids[at], texts.stamps[at])
                behind = complete(envelope, self._defaults, self.rules.distinct_id, stamp, flaws)
                if isinstance(behind, str):
                    odd[at] = behind
                    keep(b"")
                    continue
                if envelope.uuid != stamp.uuid:
                    given.add(str(envelope.uuid))
                keep(bytes(envelope.properties))
                texts.prefixes[at] = texts.uuids[at] = b""
                texts.stamps[at] = behind
            envelope.properties = mark
        return odd

    def _chunks(self, texts: Texts, at: Instant, given: AbstractSet[str]) -> list[Chunk]:
        """The events as chunks, none beyond the limits of the project or a chunk, no uuid twice in one."""
        count = len(texts.envelopes)
        most = min(self.rules.max_batch_events, CHUNK_EVENTS)
        size = -(-count // -(-count // most))
        largest = min(self.rules.max_batch_size, CHUNK_BYTES)
        todo = [(start, min(start + size, count)) for start in range(0, count, size)][::-1]
        chunks: list[Chunk] = []
        while todo:
            first, end = todo.pop()
            envelopes = texts.envelopes[first:end]
            if given and (unlike := before_a_repeat(envelopes)) < len(envelopes):
                todo += ((first + unlike, end), (first, first + unlike))
                continue
            data = texts.joined(first, end)
            if len(data) > largest and end - first > 1:
                middle = (first + end) // 2
                todo += ((middle, end), (first, middle))
                continue
            marks = LONG if not data.isascii() and any(map(over_long, envelopes)) else 0
            if given and any(envelope.uuid in given for envelope in envelopes):
                marks |= GIVEN
            chunks.append(
                Chunk(
                    project=self.rules.project,
                    events=end - first,
                    size=len(data),
                    crc=crc32(data),
                    received_at=at.wall,
                    boot=at.boot,
                    monotonic=at.monotonic,
                    packed=deflate(data),
                    marks=marks,
                )
            )
        return chunks

    def _tally(self, received: int, rejects: Sequence[Reject], flaws: Flaws) -> Tally:
        rejected: dict[Reason, int] = {}
        for reject in rejects:
            rejected[reject.reason] = rejected.get(reject.reason, 0) + 1
        return Tally(
            source=self.rules.source,
            received=received,
            rejected=rejected,
            truncated=flaws.truncated,
            restamped=flaws.restamped,
        )


def _open(reads: Sequence[Read]) -> tuple[bytes, list[int]]:
    """All lines as one JSON array of rows, a line and the nonce each, and how many lines each read has.

    A row's end can be swallowed by a line that opens an array, and forged by one that closes the row's own
    bracket; but a line that does not know the nonce cannot do both, so the count of rows tells.
    """
    parts = [read.lines.replace(b"\n", _SEAL) for read in reads]
    lines = [
        (len(part) - len(read.lines)) // (len(_SEAL) - 1) for part, read in zip(parts, reads, strict=True)
    ]
    blob = b"".join(parts)
    return (b"".join((b"[[", blob[:-3], b"]")) if blob else b"[]"), lines


def _by_place(reject: Reject) -> tuple[int, int]:
    return reject.read, reject.line


def _is_utf8(blob: bytes) -> bool:
    """Whether all of it is UTF-8, also where the decoder does not look."""
    if blob.isascii():
        return True
    try:
        blob.decode()
    except UnicodeDecodeError:
        return False
    return True


def _has_roots(envelope: Envelope) -> bool:
    """Whether an event has root fields that belong into its properties."""
    return not (envelope.set is envelope.set_once is envelope.groups is UNSET)


def _places(lines: Sequence[int], at: Mapping[int, Reason]) -> dict[int, tuple[int, int]]:
    """For places in the whole, which read and which line of it, where every line is an event."""
    ends = list(accumulate(lines))
    found = {}
    for place in at:
        read = bisect_right(ends, place)
        found[place] = (read, place - (ends[read] - lines[read]))
    return found
