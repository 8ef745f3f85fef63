"""Writes the events that the door would not understand anew, as PostHog understands them.

An id under one of its other names or of another type, an `offset` in place of a time, a client's clock that
is wrong, what v1 says beside the properties. All else about an event stays the bytes that came, and what is
no event at all is left for the door to refuse.
"""

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from agent.envelope import DECODE_ERRORS, OPTIONS, utc

# What v1 says at an event's root, and the property that it is to PostHog.
BESIDE = {"session_id": "$session_id", "window_id": "$window_id"}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NULL = b"null"
_BLANK = (b"null", b'""')
_IDENTIFY = Raw(b'"$identify"')
_FALSE = Raw(b"false")

_object = msgspec.json.Decoder(dict[str, Raw]).decode
_any = msgspec.json.Decoder().decode
_text = msgspec.json.Decoder(str).decode
_whole = msgspec.json.Decoder(int).decode
_moment = msgspec.json.Decoder(str | int | float).decode
_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class Manner(NamedTuple):
    """How the events of one request are to be read.

    `now` is when they were received (µs), `ahead` by how much the client's clock differs from ours (µs), 0
    where it does not. `near` is `Request.near`. With `engage` an event needs no name; with `options` its root
    may hold what v1 says there.
    """

    now: int
    ahead: int = 0
    near: bool = False
    engage: bool = False
    options: bool = False


class Mended(NamedTuple):
    """An event, and the key and uuid that it names."""

    line: bytes
    key: str | None = None
    uuid: str = ""


class _Noted(msgspec.Struct, gc=False):
    """The properties that matter here."""

    distinct_id: Raw | UnsetType = UNSET
    token: Raw | UnsetType = UNSET
    ip: Raw | UnsetType = msgspec.field(name="$ip", default=UNSET)
    geoip_disable: Raw | UnsetType = msgspec.field(name="$geoip_disable", default=UNSET)
    ignore_sent_at: Raw | UnsetType = msgspec.field(name="$ignore_sent_at", default=UNSET)


_noted = msgspec.json.Decoder(_Noted).decode


def mend(raw: Raw, manner: Manner) -> Mended:
    """One event of a body, as the door wants it."""
    try:
        fields = _object(raw)
        noted = _noted(fields.get("properties", Raw(b"{}")))
    except DECODE_ERRORS:
        return Mended(bytes(raw))
    changes = dict(_renamed(fields, noted, manner))
    nowhere = noted.ip is not UNSET and bytes(noted.ip) in _BLANK
    if nowhere:
        noted.ip = UNSET
    added = _added(fields, noted, manner)
    if added or nowhere:
        try:
            own = _object(fields.get("properties", Raw(b"{}")))
        except DECODE_ERRORS:
            own = {}
        if nowhere:  # else the door would leave it where the client's address belongs
            own.pop("$ip", None)
        changes["properties"] = Raw(_encode({**added, **own}))
    ignored = _is_true(noted.ignore_sent_at) or _is_true(added.get("$ignore_sent_at", UNSET))
    if (when := _timestamp(fields, manner, ignored=ignored)) is not None:
        changes["timestamp"] = Raw(_encode(when))
    line = _encode({**fields, **changes}) if changes else bytes(raw)
    key = _first_text(*(fields.get(name, UNSET) for name in ("token", "$token", "api_key")), noted.token)
    return Mended(line, key, _first_text(fields.get("uuid", UNSET)) or "")


def _renamed(fields: Mapping[str, Raw], noted: _Noted, manner: Manner) -> Mapping[str, Raw]:
    """The name and id, where they stand in another place or form: `v0_request.rs`, `types/src/event.rs`."""
    changes: dict[str, Raw] = {}
    if manner.engage and bytes(fields.get("event", _NULL)) == _NULL:
        changes["event"] = _IDENTIFY
    who = fields.get("distinct_id", UNSET)
    for other in (fields.get("$distinct_id", UNSET), noted.distinct_id):
        if who is UNSET or bytes(who) == _NULL:
            who = other
            if who is not UNSET:
                changes["distinct_id"] = who
    if who is not UNSET and bytes(who)[:1] in (b"{", b"[", b"t", b"f"):
        with suppress(*DECODE_ERRORS):  # the door refuses what is no text
            changes["distinct_id"] = Raw(_encode(_encode_sorted(_any(who)).decode()))
    return changes


def _added(fields: Mapping[str, Raw], noted: _Noted, manner: Manner) -> Mapping[str, Raw]:
    """Properties that the event says elsewhere."""
    added: dict[str, Raw] = {}
    if manner.near and noted.ip is not UNSET and noted.geoip_disable is UNSET:
        # Its place is known by its own address, whoever brought it here.
        added["$geoip_disable"] = _FALSE
    if not manner.options:
        return added
    for name, property_name in BESIDE.items():
        if (raw := fields.get(name)) is not None and bytes(raw) != _NULL:
            added[property_name] = raw
    try:
        options = _object(fields.get("options", Raw(b"{}")))
    except DECODE_ERRORS:
        return added
    for property_name, name in OPTIONS.items():
        if (raw := options.get(name)) is not None and bytes(raw) != _NULL:
            added[property_name] = _coerced(raw, text=name == "product_tour_id")
    return added


def _coerced(raw: Raw, *, text: bool) -> Raw:
    """An option as the type that it is to PostHog, where it can be one: `v1/analytics/types.rs`."""
    try:
        value = _any(raw)
    except DECODE_ERRORS:
        return raw
    if isinstance(value, bool):
        return raw
    if text:
        return Raw(_encode(str(value))) if isinstance(value, int) else raw
    if isinstance(value, str):
        known = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
        return raw if known is None else Raw(_encode(known))
    return Raw(_encode(bool(value))) if isinstance(value, int | float) else raw


def _timestamp(fields: Mapping[str, Raw], manner: Manner, *, ignored: bool) -> str | None:
    """When it happened by our clock, where the event does not say just that: `types/src/timestamp.rs`."""
    try:
        if (offset := _integer(fields.get("offset"))) is not None:
            return _written(_EPOCH + timedelta(microseconds=manner.now - 1000 * offset))
        if not manner.ahead or ignored or "timestamp" not in fields:
            return None
        when = utc(_moment(fields["timestamp"]))
        if when is None:
            return None
        return _written(datetime.fromisoformat(when) - timedelta(microseconds=manner.ahead))
    except (*DECODE_ERRORS, ValueError):
        return None


def _integer(raw: Raw | None) -> int | None:
    """The whole number in sealed bytes; None where they hold anything else."""
    try:
        return None if raw is None else _whole(raw)
    except DECODE_ERRORS:
        return None


def _written(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")[:-6] + "Z"


def _is_true(raw: Raw | UnsetType) -> bool:
    return raw is not UNSET and bytes(raw) == b"true"


def _first_text(*values: Raw | UnsetType) -> str | None:
    """The first of them that is a text."""
    for raw in values:
        if raw is not UNSET and bytes(raw)[:1] == b'"':
            try:
                return _text(raw)
            except DECODE_ERRORS:
                continue
    return None
