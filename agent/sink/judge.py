"""What PostHog would answer to a request, and which events it would take.

It judges requests of the v0 family as the Rust service does (`rust/capture/src/`, whose files are named
below), and as strictly: one bad event fails its request. Where it differs: a root field given twice under one
name is taken (under two aliases it is refused, as there).
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from agent.sink.payload import Refusal, Reply, Request, at_path, read_payload, read_query
from agent.sink.times import EPOCH, final_timestamp, milliseconds, zoned

OK = Reply(200, b'{"status":"Ok"}', {"content-type": "application/json"})

MESSAGE_LIMIT = 1_000_000  # bytes of one produced message: Kafka's `message.max.bytes`, `config.rs`
ENVELOPE = 1024  # more than ids, key, times and address of an envelope take, unless the event has a long name
DEPTH = 127  # containers in each other, the root included: serde_json's recursion limit of 128
KEY_LIMIT = 64  # bytes: `token.rs`
ID_LIMIT = 200  # characters, cut beyond: `rust/common/types/src/event.rs`
NO_SHAPE = "data did not match any variant of untagged enum RawRequest"  # serde's words
NO_NAME = "non-engage request missing event name attribute"  # `v0_request.rs`
# What Rust's `trim` takes off a key or id (Unicode White_Space); Python's `strip` takes more.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_HEX = "[0-9a-fA-F]"
_HYPHENATED = f"{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}"
_UUID = re.compile(rf"{_HEX}{{32}}|{_HYPHENATED}|urn:uuid:{_HYPHENATED}|\{{{_HYPHENATED}\}}")
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_CONTAINERS = (dict, list)
_TOO_MANY_DIGITS = b"0" * sys.float_info.max_10_exp  # an integer can leave a double's range from here on
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode
_NO_CONTENT = Reply(204)


class Event(Struct, frozen=True, kw_only=True):
    """One event as PostHog would hand it on; `timestamp` is the final one, `given` what was sent."""

    uuid: str
    event: str
    distinct_id: str
    properties: Mapping[str, Any]  # any JSON
    timestamp: datetime
    given: str | None
    sent_at: datetime | None
    api_key: str
    set: Mapping[str, Any] | None
    set_once: Mapping[str, Any] | None
    historical_migration: bool
    request: int
    headers: Mapping[str, str]


class _Engage(Struct, kw_only=True):
    """The root fields of an event without its name. `Any`: an id may be any JSON, and so may a property."""

    token: str | UnsetType | None = UNSET
    dollar_token: str | UnsetType | None = field(default=UNSET, name="$token")
    api_key: str | UnsetType | None = UNSET
    distinct_id: Any = UNSET
    dollar_distinct_id: Any = field(default=UNSET, name="$distinct_id")
    uuid: str | None = None
    properties: dict[str, Any] = field(default_factory=dict)
    timestamp: str | None = None
    offset: int | None = None
    set: dict[str, Any] | None = field(default=None, name="$set")
    set_once: dict[str, Any] | None = field(default=None, name="$set_once")

    def well_formed(self) -> bool:
        """Whether serde would read it: no two names for one field, a uuid that parses, a 64-bit offset."""
        return (
            (self.token is UNSET) + (self.dollar_token is UNSET) + (self.api_key is UNSET) > 1
            and (self.distinct_id is UNSET or self.dollar_distinct_id is UNSET)
            and (not self.uuid or _UUID.fullmatch(self.uuid) is not None)
            and (self.offset is None or -(2**63) <= self.offset < 2**63)
        )

    def key(self) -> str | None:
        """The key that came with the event itself."""
        for key in (self.token, self.dollar_token, self.api_key, self.properties.get("token")):
            if isinstance(key, str):
                return key
        return None


class _Raw(_Engage, kw_only=True):
    event: str


class _Batch(Struct, kw_only=True):
    batch: list[_Raw]
    token: str | UnsetType = UNSET
    api_key: str | UnsetType = UNSET
    historical_migration: bool | None = None
    sent_at: str | None = None

    def well_formed(self) -> bool:
        one_key = (self.token is UNSET) != (self.api_key is UNSET)
        return one_key and all(raw.well_formed() for raw in self.batch)


class _Parsed(Struct):
    """The events of a body, and what its root said of all of them."""

    events: list[_Raw]
    key: str | None = None
    sent_at: datetime | None = None
    historical_migration: bool = False


def judge(request: Request, now: datetime, randbits: Callable[[int], int]) -> tuple[Reply, Sequence[Event]]:
    """What PostHog would answer to a request that came at `now`, and which events it would take."""
    try:
        query = read_query(request.query)
        payload = read_payload(request, query)
        parsed = _parse(payload, engage=at_path(request.path, ("/engage",)))
        if not parsed.events:
            raise Refusal(400, "request holds no event")
        parsed.events = [raw for raw in parsed.events if raw.event != "$performance_event"]
        if not parsed.events:
            return OK, ()
        key = check_key(parsed.key if parsed.key is not None else _common_key(parsed.events))
        if parsed.sent_at is None:
            parsed.sent_at = milliseconds(query.get("_", query.get("sent_at")))
        events = [_process(raw, request, parsed, key, now, randbits) for raw in parsed.events]
    except Refusal as refusal:
        return refusal.reply, ()
    # Escaping doubles at most, and the name is there twice: mostly this spares a look at each event.
    if 2 * (len(payload) + max(len(event.event) for event in events)) + ENVELOPE > MESSAGE_LIMIT:
        for place, (raw, event) in enumerate(zip(parsed.events, events, strict=True)):
            if (size := _message_size(raw, event, now)) > MESSAGE_LIMIT:
                return Reply(413, b"maximum event size exceeded: %d bytes" % size), events[:place]
    return (_NO_CONTENT if query.get("beacon") == "1" else OK), events


def _parse(payload: bytes, *, engage: bool) -> _Parsed:
    """The body in one of its four shapes, tried in serde's order: `v0_request.rs`.

    Every value is decoded, those of unknown fields too: only then does msgspec refuse what serde_json does.
    It still lets pass integers beyond a double and deep nesting, which `_check_values` finds.
    """
    try:
        document = _decode(payload)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Refusal(400, f"failed to parse request: {error}") from None
    _check_values(document, numbers=_TOO_MANY_DIGITS in payload.translate(_DIGITS))
    if (events := _shaped(document, list[_Raw])) is not None and all(raw.well_formed() for raw in events):
        return _Parsed(events)
    if (batch := _shaped(document, _Batch)) is not None and batch.well_formed():
        key = batch.token if isinstance(batch.token, str) else batch.api_key
        return _Parsed(batch.batch, str(key), zoned(batch.sent_at), batch.historical_migration is True)
    if (one := _shaped(document, _Raw)) is not None and one.well_formed():
        return _Parsed([one])
    if (person := _shaped(document, _Engage)) is None or not person.well_formed():
        raise Refusal(400, f"failed to parse request: {NO_SHAPE}")
    if not engage:
        raise Refusal(400, f"failed to hydrate events from request: {NO_NAME}")
    fields = {name: getattr(person, name) for name in _Engage.__struct_fields__}
    return _Parsed([_Raw(event="$identify", **fields)])


_Shape = TypeVar("_Shape")


def _shaped(document: object, shape: type[_Shape]) -> _Shape | None:
    try:
        return msgspec.convert(document, shape)
    except msgspec.ValidationError:
        return None


def _check_values(document: object, *, numbers: bool) -> None:
    """Refuse nesting that serde_json refuses and, if told to look, numbers beyond a double."""
    level: list[Any] = [document]
    depth = 0
    while level := [value for value in level if type(value) in _CONTAINERS]:
        depth += 1
        if depth > DEPTH:
            raise Refusal(400, "failed to parse request: recursion limit exceeded")
        level = [inner for value in level for inner in (value.values() if type(value) is dict else value)]
        if numbers and any(type(value) is int and abs(value) > sys.float_info.max for value in level):
            raise Refusal(400, "failed to parse request: number out of range")


def _common_key(events: Sequence[_Raw]) -> str:
    """The one key that events without a batch around them agree on."""
    keys = {key for raw in events if (key := raw.key()) is not None}
    if not keys:
        raise Refusal(401, "event submitted without an api_key")
    if len(keys) > 1:
        raise Refusal(401, "batch submitted with inconsistent api_key values")
    return keys.pop()


def check_key(key: str) -> str:
    """The key without surrounding space, if its shape is a key's: `token.rs`."""
    key = key.strip(WHITESPACE)
    checks = (
        (not key, "empty"),
        (len(key.encode()) > KEY_LIMIT, "too_long"),
        (not key.isascii(), "not_ascii"),
        (key.startswith("phx_"), "personal_api_key"),
        ("\0" in key, "null_byte"),
    )
    for wrong, reason in checks:
        if wrong:
            raise Refusal(401, f"API key is not valid: {reason}")
    return key


def _distinct_id(raw: _Raw) -> str:
    """Any JSON value as text, cut to its limit: `rust/common/types/src/event.rs`."""
    value = raw.distinct_id if raw.distinct_id is not UNSET else raw.dollar_distinct_id
    if value is UNSET or value is None:
        value = raw.properties.get("distinct_id")
    text = as_text(value).replace("\0", "\ufffd") if value is not None else ""
    if not text.strip(WHITESPACE):
        raise Refusal(400, "event submitted without a distinct_id")
    return text[:ID_LIMIT]


def as_text(value: object) -> str:
    """A text as it is, any other JSON value in JSON."""
    return value if isinstance(value, str) else _encode_sorted(value).decode()


def _process(
    raw: _Raw, request: Request, parsed: _Parsed, key: str, now: datetime, randbits: Callable[[int], int]
) -> Event:
    """One event made final; the first that is wrong ends its request: `events/analytics.rs`."""
    if not raw.event:
        raise Refusal(400, "event submitted with an empty event name")
    distinct_id = _distinct_id(raw)
    if not isinstance(raw.properties.get("$cookieless_mode", False), bool):
        raise Refusal(400, "event submitted with invalid cookieless mode")
    ignore = raw.properties.get("$ignore_sent_at") is True
    timestamp = final_timestamp(raw.timestamp, raw.offset, parsed.sent_at, now, ignore_sent_at=ignore)
    return Event(
        uuid=_hyphenated(raw.uuid) if raw.uuid else _uuid7(timestamp, randbits),
        event=raw.event,
        distinct_id=distinct_id,
        properties=raw.properties,
        timestamp=timestamp,
        given=raw.timestamp,
        sent_at=parsed.sent_at,
        api_key=key,
        set=raw.set,
        set_once=raw.set_once,
        historical_migration=parsed.historical_migration,
        request=request.number,
        headers=request.headers,
    )


def read_uuid(text: str) -> str | None:
    """A uuid in any form that `Uuid::parse_str` reads, in the usual one; None for anything else."""
    return _hyphenated(text) if _UUID.fullmatch(text) else None


def _hyphenated(uuid: str) -> str:
    return uuid.lower() if len(uuid) == 36 else str(UUID(uuid))  # the usual form needs no look


def _uuid7(at: datetime, randbits: Callable[[int], int]) -> str:
    """What the server gives an event that has none (RFC 9562, 5.7)."""
    milliseconds = max(0, (at - EPOCH) // timedelta(milliseconds=1))
    return str(UUID(int=milliseconds << 80 | 7 << 76 | randbits(12) << 64 | 2 << 62 | randbits(62)))


def _message_size(raw: _Raw, event: Event, now: datetime) -> int:
    """Bytes of the message that would be produced, the event as escaped text in it: `sinks/kafka.rs`."""
    fields: dict[str, object] = {
        "distinct_id": event.distinct_id,
        "uuid": event.uuid,
        "event": raw.event,
        "properties": raw.properties,
    }
    fields |= {"token": event.api_key, "timestamp": raw.timestamp, "$set": raw.set, "$set_once": raw.set_once}
    data = _encode({name: value for name, value in fields.items() if value is not None})
    envelope = {
        "uuid": event.uuid,
        "distinct_id": event.distinct_id,
        "ip": "127.0.0.1",
        "data": data.decode(),
    }
    envelope |= {"now": now.isoformat(), "token": event.api_key, "event": raw.event}
    return len(_encode(envelope | {"timestamp": event.timestamp, "sent_at": event.sent_at}))
