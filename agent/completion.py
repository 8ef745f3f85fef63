"""Completes decoded events: whose, when, which uuid, and what the source and the sender add to them.

An ordinary event's properties stay the bytes that came, with what is added laid before and behind them. Only
where a scan says that a name in them matters are they looked into, and only where they must change are they
written anew.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import msgspec
from msgspec import Raw

from agent.envelope import (
    DECODE_ERRORS,
    FOLDED,
    OPTIONS,
    Flaws,
    complete,
    has_roots,
    is_canonical,
    options_of,
    utc,
)
from agent.events import SENDER, Origin, Reason
from agent.texts import MARK, Texts, stamp_of

# How the names of PostHog's own properties begin, as keys in JSON.
RESERVED = b'"$'

_encode = msgspec.json.Encoder().encode
_object = msgspec.json.Decoder(dict[str, Raw]).decode


class Watch:
    """Tells whether JSON text may hold one of some keys, however they are escaped."""

    def __init__(self, names: Sequence[str]) -> None:
        keys = [_encode(name) for name in names]
        # Two patterns that begin with a literal byte, which the regex engine looks for quickly: all the keys
        # in one pattern cost 3 µs an event, these 0.1. By their first letters, as it tries each alternative.
        reserved = sorted(key.removeprefix(RESERVED) for key in keys if key.startswith(RESERVED))
        grouped = (
            re.escape(first) + b"(?:" + b"|".join(re.escape(key[1:]) for key in group) + b")"
            for first, group in groupby(reserved, key=_first)
        )
        self._reserved = re.compile(rb"\$(?:" + b"|".join(grouped) + b")")
        self._plain = [key for key in keys if not key.startswith(RESERVED)]
        self._plain += [key.replace(b"/", rb"\/") for key in self._plain if b"/" in key]
        # An ASCII key can hide behind escapes of ASCII characters only.
        self._escaped = re.compile(rb"\\u00[0-7]" if all(map(bytes.isascii, keys)) else rb"\\u")

    def sees(self, text: bytes) -> bool:
        """Whether one of the keys may be in it."""
        if b"$" in text and self._reserved.search(text) is not None:
            return True
        if b"\\" in text and self._escaped.search(text) is not None:
            return True
        return any(key in text for key in self._plain)


def _first(key: bytes) -> bytes:
    return key[:1]


class Addition(NamedTuple):
    """What is added to events: `defaults` where they have no such property, `forced` whatever they have."""

    defaults: Mapping[str, Raw]
    forced: Mapping[str, Raw]
    prefix: bytes  # both, as the beginning of an object
    behind: bytes  # the `options` that the defaults make
    chunk: Watch  # for all that matters in whole events
    inside: Watch  # for what matters in properties
    prefixes: dict[tuple[str, ...], bytes]  # for events that lack only these of the defaults

    def beginning(self, found: Mapping[str, Raw]) -> bytes:
        """The prefix for properties that have some of the names already."""
        lacking = tuple([name for name in self.defaults if name not in found])
        if lacking not in self.prefixes:
            added = {name: self.defaults[name] for name in lacking}
            self.prefixes[lacking] = _prefix({**added, **self.forced})
        return self.prefixes[lacking]


def _prefix(properties: Mapping[str, Raw]) -> bytes:
    return _encode(properties)[:-1] + b"," if properties else b"{"


class Run(NamedTuple):
    """Events from `first` to before `end` that came from one sender."""

    first: int
    end: int
    origin: Origin | None
    addition: Addition


class Completion:
    """One source's: what it adds to its events, and the id of those that have none.

    `made` is what it adds to those only that are made of other text.
    """

    def __init__(
        self, properties: Mapping[str, object], made: Mapping[str, object], distinct_id: str
    ) -> None:
        self._defaults = {name: Raw(_encode(value)) for name, value in {**made, **properties}.items()}
        self._less = {name: self._defaults[name] for name in properties}
        self._distinct_id = distinct_id
        self._watches: dict[tuple[str, ...], tuple[Watch, Watch]] = {}
        self._whole, self._part = (self._add({}, {}, own) for own in (self._defaults, self._less))

    def addition(self, origin: Origin | None, *, own: bool = False) -> Addition:
        """What events of this origin are given; less where they are a client's own."""
        if origin is None:
            return self._part if own else self._whole
        return self._add(origin.defaults, origin.forced, self._less if own else self._defaults)

    def _add(
        self, defaults: Mapping[str, Raw], forced: Mapping[str, Raw], ours: Mapping[str, Raw]
    ) -> Addition:
        defaults = {**defaults, **ours}
        names = (*defaults, *forced)
        if names not in self._watches:  # which names there are is decided by the code and the configuration
            inside = (*{*names, *OPTIONS, *SENDER},)
            self._watches[names] = Watch((*inside, *FOLDED)), Watch(inside)
        return Addition(
            {name: raw for name, raw in defaults.items() if name not in forced},
            forced,
            _prefix({**defaults, **forced}),
            _behind(options_of({**defaults, **forced}) or {}),
            *self._watches[names],
            {},
        )

    def complete(
        self, texts: Texts, runs: Sequence[Run], text: bytes | None, flaws: Flaws, given: set[str]
    ) -> dict[int, Reason]:
        """Complete every event in place; those that break a rule, by their place.

        `text` is what `Lines.text` is. Uuids that came from clients are added to `given`.
        """
        rooted = False
        if text is None:
            text = b"\n".join(bytes(envelope.properties) for envelope in texts.envelopes)
            rooted = any(map(has_roots, texts.envelopes))
        odd: dict[int, Reason] = {}
        seen: dict[Watch, bool] = {}
        for run in runs:
            watch = run.addition.chunk
            if watch not in seen:
                seen[watch] = rooted or watch.sees(text)
            self._complete(texts, run, flaws, given, odd, concerned=seen[watch])
        return odd

    def _complete(
        self,
        texts: Texts,
        run: Run,
        flaws: Flaws,
        given: set[str],
        odd: dict[int, Reason],
        *,
        concerned: bool,
    ) -> None:
        """The hot loop."""
        addition, default, keep = run.addition, self._distinct_id or None, texts.properties.append
        sees, behind = addition.inside.sees, addition.behind
        for at, envelope in enumerate(texts.envelopes[run.first : run.end], run.first):
            properties = bytes(envelope.properties)
            who = envelope.distinct_id
            if who is None:
                envelope.distinct_id = who = default
            if (
                type(who) is str
                and not who.isspace()
                and properties[:2] == b'{"'
                and not (concerned and (has_roots(envelope) or sees(properties)))
                and (envelope.uuid is envelope.timestamp is None or _tell_own(texts, at, given))
            ):
                keep(properties[1:])
                if behind:
                    texts.stamps[at] += behind
            elif (reason := self._look_into(texts, at, addition, flaws, given)) is not None:
                odd[at] = reason
                keep(b"")
            envelope.properties = MARK

    def _look_into(
        self, texts: Texts, at: int, addition: Addition, flaws: Flaws, given: set[str]
    ) -> Reason | None:
        """Complete one event whose properties matter; why it is refused."""
        envelope = texts.envelopes[at]
        who, properties = envelope.distinct_id, bytes(envelope.properties)
        if (
            type(who) is str
            and not who.isspace()
            and properties[:2] == b'{"'
            and not has_roots(envelope)
            and (found := _opened(properties)) is not None
            and addition.forced.keys().isdisjoint(found)
            and SENDER.isdisjoint(found)
            and (envelope.uuid is envelope.timestamp is None or _tell_own(texts, at, given))
        ):
            behind = addition.behind
            if not OPTIONS.keys().isdisjoint(found):
                if (options := options_of({**addition.defaults, **found, **addition.forced})) is None:
                    return "bad_properties"
                behind = _behind(options)
            texts.prefixes[at] = addition.beginning(found)
            texts.properties.append(properties[1:])
            texts.stamps[at] += behind
            return None
        stamp = stamp_of(texts.uuids[at], texts.stamps[at])
        added = complete(envelope, addition.defaults, addition.forced, self._distinct_id, stamp, flaws)
        if isinstance(added, str):
            return added
        if envelope.uuid != stamp.uuid:
            given.add(str(envelope.uuid))
        texts.properties.append(bytes(envelope.properties))
        texts.prefixes[at] = texts.uuids[at] = b""
        texts.stamps[at] = _behind(added)
        return None


def _behind(options: Mapping[str, Raw]) -> bytes:
    """What stands behind an event's properties for v1: no field of the envelope: no client may write it."""
    return b',"options":' + _encode(options) if options else b""


def _opened(properties: bytes) -> dict[str, Raw] | None:
    try:
        return _object(properties)
    except DECODE_ERRORS:
        return None


def _tell_own(texts: Texts, at: int, given: set[str]) -> bool:
    """Have the event told by its own uuid and time in place of ours; False where one wants a closer look."""
    envelope = texts.envelopes[at]
    ident, when = envelope.uuid, envelope.timestamp
    if ident is not None and not is_canonical(ident):
        return False
    if when is not None:
        if (moment := utc(when)) is None:
            return False
        envelope.timestamp = moment
        # What is left of our stamp is the quote that ends our uuid.
        texts.stamps[at] = b"" if ident is not None else b'"'
    else:
        texts.stamps[at] = texts.stamps[at][1:]
    if ident is not None:
        texts.uuids[at] = b""
        given.add(ident)
    return True
