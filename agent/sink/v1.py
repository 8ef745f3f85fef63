"""What PostHog's v1 protocol would answer to a request: a result for each event, or an error for all of them.

It judges as the Rust service does (`rust/capture/src/v1/`, whose files are named below). Where it differs:
there are no quotas, restrictions or AI events, and `deflate`, `br` and `zstd` are answered 415.
"""

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Raw, Struct, field

from agent.sink.judge import KEY_LIMIT, MESSAGE_LIMIT, WHITESPACE, Event, read_uuid
from agent.sink.payload import Refusal, Reply, Request
from agent.sink.times import FUTURE

PATHS = ("/i/v1/analytics/events",)
WIRE_LIMIT = 10 * 1024 * 1024  # `capture_v1_max_compressed_body_bytes`, `config.rs`
PAYLOAD_LIMIT = 5 * WIRE_LIMIT
LONGEST = 200  # bytes of a name or an id: `analytics/constants.rs`
SDK_INFO_LIMIT = 200  # `constants.rs`
REQUIRED = (
    "PostHog-Sdk-Info",
    "PostHog-Attempt",
    "PostHog-Request-Id",
    "PostHog-Request-Timestamp",
    "content-type",
    "user-agent",
)
# `analytics/constants.rs`; compared without case.
ILLEGAL = frozenset(
    (
        "0", "00000000-0000-0000-0000-000000000000", "[object object]", "anonymous", "anonymous-user",
        "backend", "distinct_id", "distinctid", "email", "false", "guest", "id", "nan", "none",
        "not_authenticated", "null", "system", "true", "undefined", "user",
    )
)  # fmt: skip
# RFC 3339 as chrono reads it: a date, T or a space, a time with seconds, and a zone.
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)
_INJECTED = {
    "session_id": "$session_id",
    "window_id": "$window_id",
    "cookieless_mode": "$cookieless_mode",
    "disable_skew_correction": "$ignore_sent_at",
    "product_tour_id": "$product_tour_id",
    "process_person_profile": "$process_person_profile",
}


class Result(Struct, frozen=True, omit_defaults=True):
    """What became of one event."""

    result: str
    details: str | None = None


class _Raw(Struct, kw_only=True):
    """`types.rs`: properties stay sealed, so neither numbers nor nesting in them are looked at."""

    event: str
    uuid: str
    distinct_id: str
    timestamp: str
    session_id: str | None = None
    window_id: str | None = None
    options: Any = None  # any JSON: what is wrong in it drops its event only
    properties: Raw = field(default_factory=lambda: Raw(b"{}"))


class _Batch(Struct, kw_only=True):
    created_at: str
    batch: list[_Raw]
    historical_migration: bool = False
    capture_internal: bool | None = None


_read_batch = msgspec.json.Decoder(_Batch).decode
_encode = msgspec.json.Encoder().encode

# Says of an event that would be taken what becomes of it instead.
Single = Callable[[Event], Result | None]


def _error(status: int, tag: str, text: str, headers: Mapping[str, str] | None = None) -> Refusal:
    refusal = Refusal(status, "")
    body = {"error": tag, "error_description": text, "error_uri": "https://posthog.com/docs/api"}
    refusal.reply = Reply(status, _encode(body), {"content-type": "application/json", **(headers or {})})
    return refusal


def judge(request: Request, now: datetime, single: Single) -> tuple[Reply, Sequence[Event]]:
    """What PostHog would answer to a request that came at `now`, and which events it would take."""
    ident = request.headers.get("posthog-request-id", "")
    try:
        if request.method != "POST":
            raise Refusal(405, "")
        key = _key_and_headers(request)
        sent_at = _instant(request.headers["posthog-request-timestamp"])
        if sent_at is None:
            raise _error(400, "invalid_header_value", "PostHog-Request-Timestamp is not valid RFC 3339")
        batch = _parse(_payload(request))
        results, events = _validate(batch, request, key, sent_at, now, single)
    except Refusal as refusal:
        return _with(refusal.reply, ident), ()
    again = {"retry-after": "1"} if any(result.result == "retry" for result in results.values()) else {}
    reply = Reply(200, _encode({"results": results}), {"content-type": "application/json", **again})
    return _with(reply, ident), events


def _with(reply: Reply, ident: str) -> Reply:
    """The answer repeats the request's id where it is printable: `middleware.rs`."""
    if not (ident.isascii() and ident.isprintable()):
        return reply
    return Reply(reply.status, reply.body, {**reply.headers, "posthog-request-id": ident})


def _key_and_headers(request: Request) -> str:
    """The key; every header is looked at in the order of `context.rs`."""
    given = request.headers
    if "authorization" not in given:
        raise _error(401, "missing_authorization", "Authorization header is missing")
    missing = [name for name in REQUIRED if name.lower() not in given]
    if missing:
        names = ", ".join(f'"{name}"' for name in missing)
        raise _error(400, "missing_required_headers", f"request is missing required headers: [{names}]")
    for name in ("authorization", *map(str.lower, REQUIRED)):
        if not (given[name].isascii() and given[name].isprintable()):
            raise _error(400, "invalid_header_value", f"{name} contains non-visible ASCII characters")
    scheme, key = given["authorization"][:7], given["authorization"][7:].strip(WHITESPACE)
    if scheme.lower() != "bearer " or not given["authorization"][7:]:
        raise _error(400, "invalid_header_value", "Authorization must use Bearer scheme")
    if not key or len(key) > KEY_LIMIT or key.startswith("phx_"):
        raise _error(401, "invalid_api_token", "The provided API token is not valid.")
    kind = given["content-type"].split(";")[0].strip().lower()
    if kind != "application/json":
        raise _error(415, "unsupported_content_type", f"unsupported content type: {kind}")
    if given.get("content-encoding", "gzip").lower() != "gzip":
        raise _error(
            415, "unsupported_encoding", f"unsupported content encoding: {given['content-encoding']}"
        )
    if read_uuid(given["posthog-request-id"]) is None:
        raise _error(400, "invalid_header_value", "PostHog-Request-Id is not a valid UUID")
    attempt = given["posthog-attempt"]
    if not attempt.isdecimal() or not 1 <= int(attempt) < 2**32:
        raise _error(400, "invalid_header_value", f"PostHog-Attempt must be a positive integer: {attempt}")
    return key


def _payload(request: Request) -> bytes:
    """The JSON text of the request: `util.rs`."""
    body = request.body
    if len(body) > WIRE_LIMIT:
        raise _error(413, "payload_too_large", f"Request body exceeds limit of {WIRE_LIMIT} bytes")
    if not body:
        raise _error(400, "empty_body", "request body is empty")
    if "content-encoding" not in request.headers:
        return body
    opener = zlib.decompressobj(wbits=31)
    try:
        opened = opener.decompress(body, PAYLOAD_LIMIT)
    except zlib.error:
        raise _error(400, "request_decoding_error", "Failed to decode request body.") from None
    if len(opened) >= PAYLOAD_LIMIT:
        raise _error(413, "payload_too_large", f"decompressed payload exceeds limit of {PAYLOAD_LIMIT} bytes")
    if not opener.eof or opener.unused_data:  # the second is the sink's own: PostHog ignores what follows
        raise _error(400, "request_decoding_error", "Failed to decode request body.")
    return opened


def _parse(payload: bytes) -> _Batch:
    try:
        payload.decode()
        batch = _read_batch(payload)
    except (ValueError, RecursionError):
        raise _error(400, "request_parsing_error", "Failed to parse request body.") from None
    if not batch.batch:
        raise _error(400, "empty_batch", "request batch is empty")
    if _instant(batch.created_at) is None:
        raise _error(400, "invalid_batch", f"invalid batch: created_at is not RFC 3339: {batch.created_at}")
    return batch


def _validate(
    batch: _Batch, request: Request, key: str, sent_at: datetime, now: datetime, single: Single
) -> tuple[dict[str, Result], list[Event]]:
    """Each event by itself, but for its uuid: `analytics/process.rs`."""
    results: dict[str, Result] = {}
    events = []
    for raw in batch.batch:
        given = raw.uuid.strip(WHITESPACE)
        if not given:
            raise _error(400, "missing_event_uuid", "event submitted without a uuid")
        uuid = read_uuid(given)
        if uuid is None:
            raise _error(400, "invalid_event_uuid", f"invalid event uuid: {given}")
        if uuid in results:
            raise _error(400, "duplicate_event_uuid", f"duplicate event uuid: {given}")
        raw.distinct_id = raw.distinct_id.strip(WHITESPACE)
        options: dict[str, object] = {}
        why = _refused(raw) or _read_options(raw.options, options)
        if why:
            results[uuid] = Result("drop", why)
            continue
        event = _event(raw, uuid, options, request, batch, key, sent_at, now)
        said = single(event)
        if said is None and len(_encode(_encode(event.properties).decode())) > MESSAGE_LIMIT:
            said = Result("drop", "event_too_big")
        results[uuid] = said or Result("ok", _remark(raw.distinct_id))
        if said is None or said.result in ("ok", "warning"):
            events.append(event)
    return results, events


def _remark(distinct_id: str) -> str | None:
    return "person_processing_disabled" if distinct_id.lower() in ILLEGAL else None


def _refused(raw: _Raw) -> str:
    """Why an event is dropped; empty where it is not."""
    checks = (
        (raw.event == "$performance_event", "dropped_performance_event"),
        (not raw.event, "missing_event_name"),
        (len(raw.event.encode()) > LONGEST, "event_name_too_long"),
        (not raw.distinct_id, "missing_distinct_id"),
        (len(raw.distinct_id.encode()) > LONGEST, "distinct_id_too_large"),
        (_instant(raw.timestamp) is None, "invalid_event_timestamp"),
        (bytes(raw.properties)[:1] != b"{", "malformed_event_properties"),
    )
    return next((why for wrong, why in checks if wrong), "")


def _read_options(given: object, options: dict[str, object]) -> str:
    """Coerce what is known, as `types.rs` does; why the event is dropped, empty where it is not."""
    if given is None:
        return ""
    if not isinstance(given, dict):
        return "invalid_options"
    for name in ("cookieless_mode", "disable_skew_correction", "process_person_profile", "product_tour_id"):
        value = given.get(name)
        if value is None:
            continue
        read = _as_text(value) if name == "product_tour_id" else _as_bool(value)
        if read is None:
            return "invalid_options"
        options[name] = read
    return ""


def _as_bool(value: object) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) else None


def _as_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _event(
    raw: _Raw,
    uuid: str,
    options: Mapping[str, object],
    request: Request,
    batch: _Batch,
    key: str,
    sent_at: datetime,
    now: datetime,
) -> Event:
    """One event made final; what the request says of it is written over its own properties."""
    properties = _properties(raw.properties)
    told = {"session_id": raw.session_id, "window_id": raw.window_id, **options}
    properties |= {_INJECTED[name]: value for name, value in told.items() if value is not None}
    library, slash, version = request.headers["posthog-sdk-info"].rpartition("/")
    if slash and library.strip() and version.strip() and len(library + version) < SDK_INFO_LIMIT:
        properties |= {"$lib": library.strip(), "$lib_version": version.strip()}
    given = _instant(raw.timestamp)
    assert given is not None  # noqa: S101  # `_refused` has looked
    final = given if options.get("disable_skew_correction") is True else given - (sent_at - now)
    return Event(
        uuid=uuid,
        event=raw.event,
        distinct_id=raw.distinct_id,
        properties=properties,
        timestamp=now if final - now > FUTURE else final,
        given=raw.timestamp,
        sent_at=sent_at,
        api_key=key,
        set=None,
        set_once=None,
        historical_migration=batch.historical_migration,
        request=request.number,
        headers=request.headers,
    )


def _properties(sealed: Raw) -> dict[str, Any]:
    """What is in them, for people to see; PostHog does not look, so no number or nesting is refused."""
    try:
        found: dict[str, Any] = json.loads(bytes(sealed))
    except RecursionError:
        return {}
    return found


def _instant(text: str) -> datetime | None:
    if _RFC_3339.fullmatch(text) is None:
        return None
    try:
        return datetime.fromisoformat(text.upper())
    except ValueError:
        return None
