"""One event, examined singly: which fields it has, what each must be, and what it becomes.

The rules are PostHog's own (`rust/capture/src/v0_request.rs`, `rust/common/types/src/timestamp.rs`): what is
let through here, PostHog accepts. Nothing here raises for anything that a client may send.
"""

import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec
from msgspec import UNSET, Raw, UnsetType

from agent.events import SENDER, Reason

# In this order from: msgspec; text hidden in sealed bytes; absurd numbers; nesting.
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError)

# PostHog's ingestion cuts names, its capture cuts ids, here.
LONGEST = 200

# serde_json gives up on the 128th nested container; the request's root and its batch array are two.
DEEPEST = 125

# Root fields that PostHog's v1 protocol reads only inside properties.
FOLDED = ("$set", "$set_once", "$groups")

# Properties that v1 takes as `options` beside the event (`rust/capture/src/v1/`); v0 ignores that object.
OPTIONS = {
    "$cookieless_mode": "cookieless_mode",
    "$ignore_sent_at": "disable_skew_correction",
    "$process_person_profile": "process_person_profile",
    "$product_tour_id": "product_tour_id",
}

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST)]


class Envelope(msgspec.Struct, omit_defaults=True, gc=False):
    """The few fields of an event that are read; what it becomes is written into the same struct."""

    event: Text
    distinct_id: Text | int | float | None = None
    uuid: str | None = None
    timestamp: str | int | float | None = None
    properties: Raw = Raw(b"{}")
    set: Raw | UnsetType = msgspec.field(name="$set", default=UNSET)
    set_once: Raw | UnsetType = msgspec.field(name="$set_once", default=UNSET)
    groups: Raw | UnsetType = msgspec.field(name="$groups", default=UNSET)


class Loose(msgspec.Struct, gc=False):
    """An event none of whose fields need be right: what is wrong is then found field by field."""

    event: Raw = Raw(b"null")
    distinct_id: Raw = Raw(b"null")
    uuid: Raw = Raw(b"null")
    timestamp: Raw = Raw(b"null")
    properties: Raw = Raw(b"{}")
    set: Raw | UnsetType = msgspec.field(name="$set", default=UNSET)
    set_once: Raw | UnsetType = msgspec.field(name="$set_once", default=UNSET)
    groups: Raw | UnsetType = msgspec.field(name="$groups", default=UNSET)


class Stamp(msgspec.Struct, frozen=True, gc=False):
    """What the door gives an event that has none of its own."""

    uuid: str
    timestamp: str


class Flaws(msgspec.Struct):
    """What was mended and is counted: ids or names cut, times that could not be read."""

    truncated: int = 0
    restamped: int = 0


_strict = msgspec.json.Decoder(Envelope).decode
_loose = msgspec.json.Decoder(Loose).decode
_value = msgspec.json.Decoder(str | int | float | None).decode
_object = msgspec.json.Decoder(dict[str, Raw]).decode
_encode = msgspec.json.Encoder().encode

_BRACKETS = b"{}[]"
_NOT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_ONE_KIND = bytes.maketrans(_BRACKETS, b"[][]")
# Possessive, and ended by the line where nothing else ends it: no quote is looked at twice.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


def examine(line: bytes, max_event: int, flaws: Flaws) -> Envelope | Reason:
    """The envelope of one line, or the first rule that it breaks."""
    if len(line) > max_event:
        return "too_large"
    try:
        line.decode()
    except UnicodeDecodeError:
        return "bad_utf8"
    try:
        if too_deep(line):
            return "too_deep"
        return _strict(line)
    except RecursionError:
        return "too_deep"
    except DECODE_ERRORS:
        return _examine_fields(line, flaws)


def _examine_fields(line: bytes, flaws: Flaws) -> Envelope | Reason:
    """The envelope of a line that the strict decoder refused, where only something forgivable was wrong."""
    try:
        loose = _loose(line)
    except msgspec.ValidationError:
        return "not_an_object"
    except DECODE_ERRORS:
        return "malformed_json"
    event = _scalar(loose.event)
    if not isinstance(event, str) or not event:
        return "missing_event"
    who = _scalar(loose.distinct_id)
    if who is UNSET:
        return "missing_distinct_id"
    if isinstance(who, str) and not who:
        who = None
    ident = _scalar(loose.uuid)
    if ident is not None and not isinstance(ident, str):
        return "bad_uuid"
    cut = [text for text in (event, who) if isinstance(text, str) and len(text) > LONGEST]
    flaws.truncated += bool(cut)
    when = _scalar(loose.timestamp)
    return Envelope(
        event=event[:LONGEST],
        distinct_id=who[:LONGEST] if isinstance(who, str) else who,
        uuid=ident,
        timestamp=bytes(loose.timestamp).decode() if isinstance(when, UnsetType) else when,
        properties=loose.properties,
        set=loose.set,
        set_once=loose.set_once,
        groups=loose.groups,
    )


def _scalar(raw: Raw) -> str | int | float | UnsetType | None:
    """The text or number in sealed bytes; UNSET where they hold anything else."""
    try:
        value: str | int | float | None = _value(raw)
    except DECODE_ERRORS:
        return UNSET
    return value


def too_deep(line: bytes) -> bool:
    """Whether a line nests deeper than PostHog reads; cheap where it has few brackets."""
    if line.count(b"{") + line.count(b"[") <= DEEPEST:
        return False
    brackets = _STRING.sub(b"", line).translate(_ONE_KIND, _NOT_BRACKETS)
    # Without its innermost pairs a text is one less deep; to look at each bracket in Python takes long.
    left = DEEPEST
    while left and len(brackets) > left:
        less = brackets.replace(b"[]", b"")
        if len(less) == len(brackets):  # nothing but those that have no partner
            break
        brackets, left = less, left - 1
    return brackets.count(b"[") > left


def complete(
    envelope: Envelope,
    defaults: Mapping[str, Raw],
    forced: Mapping[str, Raw],
    distinct_id: str,
    stamp: Stamp,
    flaws: Flaws,
) -> Reason | dict[str, Raw]:
    """Make a decoded event whole, in place, or tell which rule it breaks.

    Gives the options that v1 reads beside its properties.
    """
    reason = complete_id(envelope, distinct_id) or _complete_uuid(envelope, stamp)
    if reason is not None:
        return reason
    if (properties := fold(envelope)) is None:
        return "bad_properties"
    when = utc(envelope.timestamp)
    if when is None:
        if envelope.timestamp is not None:
            properties.setdefault("$agent_timestamp", Raw(_encode(str(envelope.timestamp))))
            flaws.restamped += 1
        when = stamp.timestamp
    envelope.timestamp = when
    for name in SENDER.intersection(properties):
        del properties[name]
    for name, value in defaults.items():
        properties.setdefault(name, value)
    properties.update(forced)
    if (options := options_of(properties)) is None:
        return "bad_properties"
    envelope.properties = Raw(_encode(properties))
    return options


def complete_id(envelope: Envelope, default: str) -> Reason | None:
    """The distinct id as text: a number is its text, none at all the source's default."""
    who = envelope.distinct_id
    if who is None or who == "":
        who = default
    elif not isinstance(who, str):
        who = str(who)[:LONGEST]
    if not who or who.isspace():
        return "missing_distinct_id"
    envelope.distinct_id = who
    return None


# The form in which nearly every uuid comes; passed on byte for byte.
_CANONICAL = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# The other forms that Rust's `Uuid::parse_str` reads: simple, braced, URN.
_ODD = re.compile(r"[0-9a-fA-F]{32}|\{[0-9a-fA-F-]{36}\}|urn:uuid:[0-9a-fA-F-]{36}")


def is_canonical(ident: str) -> bool:
    """Whether a uuid is written in the usual form, and passed on as it is."""
    return _CANONICAL.fullmatch(ident) is not None


def _complete_uuid(envelope: Envelope, stamp: Stamp) -> Reason | None:
    """The event's own uuid where it has one that parses; an empty one is none, as PostHog has it."""
    given = envelope.uuid
    if not given:
        envelope.uuid = stamp.uuid
        return None
    if is_canonical(given):
        return None
    if _ODD.fullmatch(given):
        try:
            envelope.uuid = str(uuid.UUID(given))
        except ValueError:
            return "bad_uuid"
        return None
    return "bad_uuid"


# v1 drops an event whose name or id is longer (`rust/capture/src/v1/analytics/constants.rs`), in bytes.
LONGEST_BYTES = 200


def over_long(envelope: Envelope) -> bool:
    """Whether PostHog's v1 protocol would drop a complete event for the bytes of its name or id."""
    return any(
        not text.isascii() and len(text.encode()) > LONGEST_BYTES
        for text in (envelope.event, str(envelope.distinct_id))
    )


def before_a_repeat(envelopes: Sequence[Envelope]) -> int:
    """How many of these complete events come before one whose uuid is there already."""
    seen = set()
    for number, envelope in enumerate(envelopes):
        if envelope.uuid is not None:
            ident = envelope.uuid.lower()
            if ident in seen:
                return number
            seen.add(ident)
    return len(envelopes)


def has_roots(envelope: Envelope) -> bool:
    """Whether an event has root fields that belong into its properties."""
    return not (envelope.set is envelope.set_once is envelope.groups is UNSET)


def fold(envelope: Envelope) -> dict[str, Raw] | None:
    """The properties with what the event's root has of them, which loses it; None where one is no object."""
    try:
        properties: dict[str, Raw] = _object(envelope.properties)
        for name in FOLDED:
            _fold(properties, name, getattr(envelope, name[1:]))
    except DECODE_ERRORS:
        return None
    envelope.set = envelope.set_once = envelope.groups = UNSET
    return properties


def _fold(properties: dict[str, Raw], name: str, raw: Raw | UnsetType) -> None:
    """Put an object from the event's root into its properties, where an existing key wins."""
    if raw is UNSET or bytes(raw) == b"null":
        return
    root = _object(raw)
    mine = properties.get(name)
    if mine is None or bytes(mine) == b"null":
        properties[name] = raw
    elif bytes(mine)[:1] == b"{":
        properties[name] = Raw(_encode({**root, **_object(mine)}))


def options_of(properties: Mapping[str, Raw]) -> dict[str, Raw] | None:
    """The options that v1 reads beside an event; None where PostHog would refuse the request for one.

    Only `$cookieless_mode` can do that (v0: 400). Another option of a wrong type is left where it is.
    """
    options = {}
    for name, option in OPTIONS.items():
        raw = properties.get(name)
        if raw is None:
            continue
        value = bytes(raw)
        right = value[:1] == b'"' if name == "$product_tour_id" else value in {b"true", b"false"}
        if right:
            options[option] = raw
        elif name == "$cookieless_mode":
            return None
    return options


# A number at or over this many seconds (the year 5138) is one of milliseconds (1973 and later).
_MILLISECONDS_FROM = 1e11
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


# The forms in which SDKs write UTC: how long they are, and how the microseconds begin and the text ends.
_MICROSECONDS = {27: "Z", 32: "+00:00"}
_MILLISECONDS = {24: "Z", 29: "+00:00"}


def utc(value: str | float | None) -> str | None:
    """A timestamp as UTC text ending in Z; None where it cannot be read or is outside 1970 to 9999."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value.strip())
            if moment.tzinfo is UTC and value[19:20] == "." and value[10] == "T" and moment >= _EPOCH:
                if value.endswith(_MICROSECONDS.get(len(value), "?")):
                    return value[:26] + "Z"
                if value.endswith(_MILLISECONDS.get(len(value), "?")):
                    return value[:23] + "000Z"
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        elif value is None:
            return None
        elif abs(value) >= _MILLISECONDS_FROM:
            moment = _EPOCH + timedelta(milliseconds=value)
        else:
            moment = _EPOCH + timedelta(seconds=value)
    except (ValueError, OverflowError):
        return None
    if moment < _EPOCH:
        return None
    return moment.isoformat(timespec="microseconds")[:-6] + "Z"
