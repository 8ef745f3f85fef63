"""The door: turns lines into events that PostHog will take, whole chunks at a time.

For every event that it lets in it promises: one JSON object in UTF-8; `event` and `distinct_id` present, at
most 200 characters each; `properties` an object; nothing nested deeper than PostHog reads; a `uuid` and a UTC
`timestamp`. Properties stay sealed; they are looked into only where a scan of the whole chunk says that
something in them matters. They can still hide a number beyond a double (`1e999`): that scan would cost more
than the decoding, so delivery finds it.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate, groupby
from typing import NamedTuple

import msgspec

from agent.completion import Completion, Run
from agent.decode.lines import Format
from agent.decode.objects import Json
from agent.envelope import Flaws, before_a_repeat, over_long
from agent.events import (
    CHUNK_BYTES,
    CHUNK_EVENTS,
    GIVEN,
    HISTORICAL,
    LONG,
    Chunk,
    Instant,
    Origin,
    Read,
    Reason,
    Reject,
    Tally,
    sample,
)
from agent.pack import crc32, deflate
from agent.patterns import REDACTED
from agent.shape import Shape
from agent.texts import Texts, stamps_of, uuids_of

_encode = msgspec.json.Encoder().encode


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a source adds to its events, the largest line (bytes) it takes, and where its events go.

    `made` is added only to events that were made of other text, and gives way to `properties`.
    """

    source: str
    project: str
    properties: Mapping[str, object]
    made: Mapping[str, object] = {}
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


class Owner(NamedTuple):
    """Whose events are: of which project, with which key where it is not the project's; and whether old."""

    project: str
    key: str | None
    historical: bool


class Door:
    """One source's door: its rules in the form in which they are fast to apply."""

    def __init__(self, rules: Rules, form: Format | None = None, shape: Shape | None = None) -> None:
        self.rules = rules
        self._format = form or Json(rules.max_event)
        self._shape = shape
        self._completion = Completion(rules.properties, rules.made, rules.distinct_id)

    def vouch(self, reads: Sequence[Read], random: int) -> Decoded:
        """Chunks of all that is good in the reads, and a reject for each line that is not.

        `random` has `RANDOM_BITS` bits and is never given twice.
        """
        flaws = Flaws()
        decoded = self._format.decode(reads, flaws)
        if self._shape is not None:
            decoded = self._shape.taken(decoded)
        lines, places, envelopes, rejects, text, own = decoded
        stamps = stamps_of(reads, lines)
        if places is not None:
            first = list(accumulate(lines, initial=0))
            stamps = [stamps[first[read] + line] for read, line in places]
        uuids = uuids_of(reads[0].at.wall if reads else 0, random, len(envelopes))
        runs = self._runs(reads, lines, places)
        alike = runs if own is None else list(self._of_own(runs, own))
        prefixes: list[bytes] = []
        for run in alike:
            prefixes += [run.addition.prefix] * (run.end - run.first)
        texts = Texts(envelopes, prefixes, [], uuids, stamps)
        given: set[str] = set()
        odd = self._completion.complete(texts, alike, text, flaws, given)
        if odd:
            where = places or [(read, line) for read, count in enumerate(lines) for line in range(count)]
            for at, reason in odd.items():
                rejects.append(Reject(*where[at], reason, sample(_encode(envelopes[at]))))
            texts = texts.without(odd)
        _count_unread(reads, lines, rejects)
        if self._shape is not None and self._shape.secretive:
            rejects = [reject._replace(sample=REDACTED) for reject in rejects]
        chunks = [
            chunk
            for owner, first_of, end in self._shares(runs, list(odd))
            for chunk in self._chunks(texts, first_of, end, owner, reads[0].at, given)
        ]
        return Decoded(
            chunks=chunks, rejects=rejects, lines=lines, tally=self._tally(sum(lines), rejects, flaws)
        )

    def _runs(
        self, reads: Sequence[Read], lines: Sequence[int], places: Sequence[tuple[int, int]] | None
    ) -> list[Run]:
        """The events by their senders."""
        counts = lines if places is None else [0] * len(reads)
        if places is not None:
            counts = list(counts)
            for read, _ in places:
                counts[read] += 1
        runs: list[Run] = []
        first = 0
        for origin, group in groupby(zip(reads, counts, strict=True), key=_origin):
            end = first + sum(count for _, count in group)
            if end > first:
                runs.append(Run(first, end, origin, self._completion.addition(origin)))
            first = end
        return runs

    def _of_own(self, runs: Sequence[Run], own: Sequence[bool]) -> Iterator[Run]:
        """The runs cut where events that clients wrote meet others, which are given more."""
        for run in runs:
            less = self._completion.addition(run.origin, own=True)
            first = run.first
            for is_own, group in groupby(own[run.first : run.end]):
                end = first + sum(1 for _ in group)
                yield Run(first, end, run.origin, less if is_own else run.addition)
                first = end

    def _shares(self, runs: Sequence[Run], odd: Sequence[int]) -> Iterator[tuple[Owner, int, int]]:
        """Whose the events are that are left without the odd ones: owner, first, end."""
        first = 0
        for owner, group in groupby(runs, key=self._owner):
            end = first
            for run in group:
                end += run.end - run.first - (bisect_left(odd, run.end) - bisect_left(odd, run.first))
            if end > first:
                yield owner, first, end
            first = end

    def _owner(self, run: Run) -> Owner:
        if run.origin is None:
            return Owner(self.rules.project, None, historical=False)
        return Owner(run.origin.project or self.rules.project, run.origin.key, run.origin.historical)

    def _chunks(
        self, texts: Texts, start: int, stop: int, owner: Owner, at: Instant, given: AbstractSet[str]
    ) -> list[Chunk]:
        """One owner's events as chunks, each within the limits of project and chunk, no uuid twice in one."""
        count = stop - start
        most = min(self.rules.max_batch_events, CHUNK_EVENTS)
        size = -(-count // -(-count // most))
        largest = min(self.rules.max_batch_size, CHUNK_BYTES)
        todo = [(first, min(first + size, stop)) for first in range(start, stop, size)][::-1]
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
            if owner.historical:
                marks |= HISTORICAL
            chunks.append(
                Chunk(
                    project=owner.project,
                    key=owner.key,
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
            rejected[reject.reason] = rejected.get(reject.reason, 0) + reject.lines
        return Tally(
            source=self.rules.source,
            received=received,
            rejected=rejected,
            truncated=flaws.truncated,
            restamped=flaws.restamped,
        )


def _origin(pair: tuple[Read, int]) -> Origin | None:
    return pair[0].origin


def _count_unread(reads: Sequence[Read], lines: list[int], rejects: list[Reject]) -> None:
    """Count the lines behind a read's whole ones: those denied, and one cut."""
    for number, read in enumerate(reads):
        if read.denied is not None:
            reason, count, who = read.denied
            if count:  # one for all of them: of lines of a byte a read has a hundred thousand
                rejects.append(Reject(number, lines[number], reason, who, count))
            lines[number] += count
        if read.cut is not None:
            rejects.append(Reject(number, lines[number], *read.cut))
            lines[number] += 1
    rejects.sort(key=_by_place)


def _by_place(reject: Reject) -> tuple[int, int]:
    return reject.read, reject.line
