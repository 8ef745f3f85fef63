"""Shaping at the door: which of a source's events are taken, and what in them is renamed or hidden.

In this order: `drop` and `keep` by the name that came, `sample`, `rename`, `redact`, `hash`. Names and ids
are looked at for a whole chunk; properties are opened only where a scan of their bytes says that some of them
may matter. Once opened they hold each key once, and no escape that JSON does not need.
"""

import hashlib
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import compress
from typing import TypeVar

import msgspec
from msgspec import Raw

from agent.config import Common
from agent.decode.lines import Lines
from agent.envelope import DECODE_ERRORS, Envelope, complete_id, fold, has_roots, utc
from agent.events import UNREMARKABLE, Reason, Reject, sample
from agent.globs import CACHED_NAMES, Names, finds
from agent.hide import Hiding, Keyed, is_nobody
from agent.patterns import REDACTED, Pattern
from agent.scan import Laid
from agent.shape_checks import DISTINCT_ID, PROPERTY

# A float stays the text that it is: one beyond a double, or with more digits, is not ours to change.
_decode = msgspec.json.Decoder(dict[str, object], float_hook=lambda text: Raw(text.encode())).decode
_sealed = msgspec.json.Decoder(dict[str, Raw]).decode
_encode = msgspec.json.Encoder().encode

T = TypeVar("T")

# Of a property of so many bytes it is worth to know beforehand whether something is found in it.
LARGE = 4096


def shape_of(settings: Common) -> "Shape | None":
    """A source's shape; None where it takes its events as they come."""
    told = settings.drop or settings.keep or settings.rename or settings.redact or settings.hash
    return Shape(settings) if told or settings.sample < 1 else None


def share_of(distinct_id: str) -> float:
    """A person's place from 0 to 1, the same on every host for ever: SHA-256 of the id, its first 32 bits."""
    return int(hashlib.sha256(distinct_id.encode()).hexdigest()[:8], 16) / 2**32


class Shape:
    """What one source does to its events."""

    def __init__(self, settings: Common) -> None:
        self._default = settings.distinct_id
        self._max_event = settings.max_event
        self._drop = Names(settings.drop)
        self._keep = Names(settings.keep)
        self._sample = settings.sample
        self._named = bool(settings.drop or settings.keep)
        self._events: dict[str, str] = {}
        self._properties: dict[str, str] = {}
        for old, new in settings.rename.items():
            if old.startswith(PROPERTY):
                self._properties[old.removeprefix(PROPERTY)] = new
            else:
                self._events[old] = new
        self._becomes = lru_cache(CACHED_NAMES)(self._become)
        self._keyed = Keyed(settings.hash_key.reveal().encode())
        self._hashes_ids = DISTINCT_ID in settings.hash
        self._hiding = Hiding(settings.redact, settings.hash, self._keyed)
        self._finds = [*finds(list(self._properties)), *self._hiding.finds]
        self.secretive = bool(settings.redact or settings.hash)

    def taken(self, decoded: Lines) -> Lines:
        """The decoded events that are taken, shaped; the others are added to the rejects."""
        lines, places, envelopes, rejects, text, own = decoded
        if self._properties:
            text = None  # it does not hold the names that properties get here
        refused = self.apply(envelopes)
        if not refused:
            return decoded._replace(text=text)
        if places is None:
            places = [(read, line) for read, count in enumerate(lines) for line in range(count)]
        for at, reason in refused.items():
            shown = "" if reason in UNREMARKABLE else sample(_encode(envelopes[at]))
            rejects.append(Reject(*places[at], reason, shown))
        kept = [at not in refused for at in range(len(envelopes))]
        return Lines(
            lines,
            list(compress(places, kept)),
            list(compress(envelopes, kept)),
            rejects,
            text,
            list(compress(own, kept)) if own is not None else None,
        )

    def apply(self, envelopes: Sequence[Envelope]) -> dict[int, Reason]:
        """Shape decoded events in place; those that are not taken, by their place, and why."""
        refused: dict[int, Reason] = {}
        if self._named or self._events:
            self._judge_names(envelopes, refused)
        if self._sample < 1 or self._hashes_ids:
            self._judge_ids(envelopes, refused)
        if self._properties or self.secretive:
            self._look_into(envelopes, refused)
        return refused

    def _judge_names(self, envelopes: Sequence[Envelope], refused: dict[int, Reason]) -> None:
        """Drop, keep and rename by the name of the event; most chunks have few names."""
        becomes = {name: self._becomes(name) for name in {envelope.event for envelope in envelopes}}
        if all(name == new for name, new in becomes.items()):
            return
        for at, envelope in enumerate(envelopes):
            new = becomes[envelope.event]
            if new is None:
                refused[at] = "filtered"
            else:
                envelope.event = new

    def _become(self, name: str) -> str | None:
        """The name under which an event of this name is taken; None where it is not."""
        if name in self._drop or (self._keep and name not in self._keep):
            return None
        return self._events.get(name, name)

    def _judge_ids(self, envelopes: Sequence[Envelope], refused: dict[int, Reason]) -> None:
        """Sample persons, then hash their ids; most chunks have fewer persons than events."""
        known: dict[str, str | None] = {}
        for at, envelope in enumerate(envelopes):
            if at in refused:
                continue
            who = envelope.distinct_id
            if type(who) is not str:
                if complete_id(envelope, self._default) is not None:
                    continue  # it has none: the door refuses it
                who = str(envelope.distinct_id)
            if who not in known:
                known[who] = self._person(who)
            if (shown := known[who]) is None:
                refused[at] = "sampled"
            else:
                envelope.distinct_id = shown

    def _person(self, who: str) -> str | None:
        """The id under which a person is known; None for one outside the sample."""
        if who.isspace():
            return who  # the door refuses it
        if self._sample < 1 and share_of(who) >= self._sample:
            return None
        return self._keyed(who) if self._hashes_ids and not is_nobody(who) else who

    def _look_into(self, envelopes: Sequence[Envelope], refused: dict[int, Reason]) -> None:
        """Rename and hide in properties, and in what of an event will be among them."""
        for at, envelope in enumerate(envelopes):
            if envelope.timestamp is not None and self.secretive and utc(envelope.timestamp) is None:
                envelope.timestamp = REDACTED  # it is kept as a property where it cannot be read
            if has_roots(envelope) and at not in refused:
                if (folded := fold(envelope)) is None:
                    refused[at] = "bad_properties"
                else:
                    envelope.properties = Raw(_encode(folded))
        laid = Laid([b"" if at in refused else bytes(e.properties) for at, e in enumerate(envelopes)])
        named = laid.which(self._finds)
        looks = [(pattern, laid.which(pattern.finds)) for pattern in self._hiding.patterns]
        for at in named.union(*(found for _, found in looks)) - refused.keys():
            patterns = [pattern for pattern, found in looks if at in found]
            if (reason := self._open(envelopes[at], patterns)) is not None:
                refused[at] = reason

    def _open(self, envelope: Envelope, patterns: Sequence[Pattern]) -> Reason | None:
        """Rename and hide in an event's properties; why it is refused."""
        try:
            properties = self._renamed(_decode(envelope.properties))
            without = self._without(envelope.properties, patterns) if patterns else ()
            if not self._hiding.hide(properties, patterns, without):
                return "too_large"
            text = _encode(properties)
        except DECODE_ERRORS:
            return "bad_properties"
        # A hash is longer than most of what it stands for, and there may be many.
        if len(text) > self._max_event:
            return "too_large"
        envelope.properties = Raw(text)
        return None

    def _without(self, properties: Raw, patterns: Sequence[Pattern]) -> Collection[str]:
        """The large properties in whose values nothing is to be hidden: they are not looked through."""
        if len(bytes(properties)) < LARGE:
            return ()
        large = {
            name: bytes(raw)
            for name, raw in self._renamed(_sealed(properties)).items()
            if len(bytes(raw)) >= LARGE
        }
        laid = Laid(list(large.values()))
        found = laid.which(self._finds).union(*(laid.which(pattern.finds) for pattern in patterns))
        return {name for at, name in enumerate(large) if at not in found}

    def _renamed(self, properties: dict[str, T]) -> dict[str, T]:
        """All at once, so that two may change names; a property that has the new name already wins."""
        if not self._properties:
            return properties
        kept = {name: value for name, value in properties.items() if name not in self._properties}
        for old, new in self._properties.items():
            if old in properties:
                kept.setdefault(new, properties[old])
        return kept

    def shown(self, name: str, text: str) -> str:
        """What events show of a property that they are given beside their own."""
        properties: dict[str, object] = {name: text}
        return str(properties[name]) if self._hiding.hide(properties, self._hiding.patterns) else REDACTED

    def why(self, event: str, distinct_id: str) -> str:
        """Which setting leaves out a person's event of this name, for people; empty where none does."""
        if glob := self._drop.which(event):
            return f'drop = "{glob}"'
        if self._keep and event not in self._keep:
            return "keep does not name it"
        if self._sample < 1 and (share := share_of(distinct_id)) >= self._sample:
            return f"sample = {self._sample:g} ends before this person, who is at {share:.6f}"
        return ""
