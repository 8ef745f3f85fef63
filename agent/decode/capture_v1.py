"""Reads the requests of PostHog's v1 protocol, as lines for the door, and tells what became of each event.

The headers, errors and results are PostHog's (`rust/capture/src/v1/`). More lenient than PostHog: an event
that lacks a field or repeats a uuid is no reason to refuse the others. `br` and `zstd` are not read.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec
from msgspec import Raw

from agent.decode.body import Placed, ahead_of, crowded, has_address, joined, trimmed, wrong_key
from agent.decode.mend import Manner, mend
from agent.decode.request import JSON, WANTED, Answer, Posted, Request, Trouble
from agent.decode.shards import TOO_MANY, Shards, shatter
from agent.decode.unpack import inflate_v1
from agent.envelope import DECODE_ERRORS
from agent.events import Reason

PATHS = ("/i/v1/analytics/events",)
ENCODINGS = ("gzip", "deflate")
SDK_INFO_LIMIT = 200  # `constants.rs`
REQUIRED = (
    "PostHog-Sdk-Info",
    "PostHog-Attempt",
    "PostHog-Request-Id",
    "PostHog-Request-Timestamp",
    "content-type",
    "user-agent",
)
# PostHog's name for what the door found: `analytics/types.rs`.
_DETAILS = {
    "missing_event": "missing_event_name",
    "missing_distinct_id": "missing_distinct_id",
    "bad_uuid": "invalid_event_uuid",
    "bad_properties": "malformed_event_properties",
    "too_large": "event_too_big",
}
_ATTEMPT = re.compile(r"0*[1-9][0-9]{0,8}", re.ASCII)
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|[0-9a-fA-F]{32}")


class _Root(msgspec.Struct):
    batch: list[Raw]
    historical_migration: Raw = Raw(b"null")


class _Ordinary(msgspec.Struct, kw_only=True, gc=False):
    """An event that the door understands as it is; its uuid tells it apart."""

    distinct_id: str
    uuid: str
    dollar_distinct_id: None = msgspec.field(name="$distinct_id", default=None)
    offset: None = None
    options: None = None
    session_id: None = None
    window_id: None = None


class _OrdinaryBatch(msgspec.Struct):
    batch: list[_Ordinary]


class _Settled(_Ordinary, kw_only=True, gc=False):
    """An ordinary event to whose properties nothing needs to be added but the SDK's name."""

    properties: Placed


class _SettledBatch(msgspec.Struct):
    batch: list[_Settled]


_root = msgspec.json.Decoder(_Root).decode
_ordinary = msgspec.json.Decoder(_OrdinaryBatch).decode
_settled = msgspec.json.Decoder(_SettledBatch).decode
_encode = msgspec.json.Encoder().encode


def error(status: int, tag: str, text: str, reason: Reason = "malformed_json", events: int = 0) -> Answer:
    """An answer for the whole request: `v1/error.rs`."""
    body = {"error": tag, "error_description": text, "error_uri": "https://posthog.com/docs/api"}
    return Answer(status, _encode(body), JSON, reason=reason, events=events)


_UNREADABLE = error(400, "request_parsing_error", "Failed to parse request body.", events=1)


def _too_large(text: str) -> Answer:
    return error(413, "payload_too_large", f"payload too large: {text}", "too_large", 1)


_TROUBLES: Mapping[Trouble, Answer] = {
    "too_large": _too_large("Request body exceeds the limit"),
    "stalled": error(408, "body_read_timeout", "body read stalled"),
    "busy": error(503, "service_unavailable", "Service Unavailable")._replace(again=True),
    "unknown_key": error(
        401, "invalid_api_token", "The provided API token is not valid.", "unknown_key", events=1
    ),
    "rate_limited": error(429, "rate_limited", "Rate limit exceeded.")._replace(again=True),
}


def read_request(request: Request) -> Posted | Answer:
    """The events of a request, or why PostHog would refuse all of it."""
    text = _open(request)
    root = text if isinstance(text, Answer) else _part(text, request.brackets)
    events = root.events if isinstance(root, Answer) else len(root.batch)
    if (refused := _refused_headers(request.headers)) is not None:
        return refused._replace(
            reason="unknown_key" if refused.status == 401 else "malformed_json", events=events
        )
    if isinstance(text, Answer):
        return text
    if isinstance(root, Answer):
        return root
    ahead = ahead_of(request.headers["posthog-request-timestamp"], request.at.wall)
    if ahead is None:
        what = "PostHog-Request-Timestamp is not valid RFC 3339"
        return error(400, "invalid_header_value", what, events=events)
    manner = Manner(request.at.wall, ahead, request.near, options=True)
    lines, uuids, placed = _read(text, root.batch, manner)
    return Posted(
        trimmed(request.headers["authorization"][7:]),
        lines,
        events,
        defaults=_library(request.headers["posthog-sdk-info"]),
        uuids=uuids,
        historical=bytes(root.historical_migration) == b"true",
        placed=placed,
    )


def trouble(what: Trouble) -> Answer:
    """What a client is told that meets with this."""
    return _TROUBLES[what]


def answer(posted: Posted, refused: Mapping[int, str]) -> Answer:
    """A result for each event, where the door `refused` some, and why."""
    if "buffer_full" in refused.values():
        return trouble("busy")
    results = {
        uuid: _result(refused[place]) if place in refused else {"result": "ok"}
        for place, uuid in enumerate(posted.uuids)
        if uuid
    }
    return Answer(200, _encode({"results": results}), JSON, again="rate_limited" in refused.values())


def _result(reason: str) -> Mapping[str, str]:
    if reason == "rate_limited":
        return {"result": "retry", "details": "not_persisted"}
    details = "event_restriction_drop" if reason in WANTED else _DETAILS.get(reason, "rejected")
    return {"result": "drop", "details": details}


def _refused_headers(given: Mapping[str, str]) -> Answer | None:
    """Why a request is refused for its headers, looked at in the order of `context.rs`."""
    if "authorization" not in given:
        return error(401, "missing_authorization", "Authorization header is missing")
    if missing := [name for name in REQUIRED if name.lower() not in given]:
        names = ", ".join(f'"{name}"' for name in missing)
        return error(400, "missing_required_headers", f"request is missing required headers: [{names}]")
    for name in ("authorization", *map(str.lower, REQUIRED)):
        if not (given[name].isascii() and given[name].isprintable()):
            text = f"{name} contains non-visible ASCII characters"
            return error(400, "invalid_header_value", text)
    scheme, key = given["authorization"][:7], trimmed(given["authorization"][7:])
    if scheme.lower() != "bearer " or not given["authorization"][7:]:
        return error(400, "invalid_header_value", "Authorization must use Bearer scheme")
    if wrong_key(key):
        return error(401, "invalid_api_token", "The provided API token is not valid.")
    kind = given["content-type"].partition(";")[0].strip().lower()
    if kind != "application/json":
        return error(415, "unsupported_content_type", f"unsupported content type: {kind}")
    encoding = given.get("content-encoding", "gzip").lower()
    if encoding not in ENCODINGS:
        return error(415, "unsupported_encoding", f"unsupported content encoding: {encoding}")
    if _UUID.fullmatch(given["posthog-request-id"]) is None:
        return error(400, "invalid_header_value", "PostHog-Request-Id is not a valid UUID")
    if _ATTEMPT.fullmatch(given["posthog-attempt"]) is None:
        return error(400, "invalid_header_value", "PostHog-Attempt must be a positive integer")
    return None


def _open(request: Request) -> bytes | Answer:
    """The JSON text of the request: `util.rs`."""
    text: bytes | None = request.body
    if not text:
        return error(400, "empty_body", "request body is empty")
    if (encoding := request.headers.get("content-encoding")) is not None:
        text = inflate_v1(text, encoding.lower(), request.limit)
    if text is None:
        return error(400, "request_decoding_error", "Failed to decode request body.", events=1)
    if len(text) > request.limit:
        return _too_large(f"decompressed payload exceeds limit of {request.limit} bytes")
    return text


def _part(text: bytes, brackets: int) -> _Root | Answer:
    """The root and its events, of which there is one at least."""
    root: _Root | Answer | None = None
    try:
        if not crowded(text):
            root = _root(text)
    except msgspec.ValidationError:
        return _UNREADABLE
    except DECODE_ERRORS:
        pass
    if root is None:
        root = _part_slowly(text, brackets)
    if isinstance(root, _Root) and not root.batch:
        return error(400, "empty_batch", "request batch is empty")
    return root


def _part_slowly(text: bytes, brackets: int) -> _Root | Answer:
    """What is whole of a body with a broken event in it, or of one that may hold too many of them."""
    shards = shatter(text, brackets)
    if shards == "too_large":
        return _too_large(TOO_MANY)
    try:
        if isinstance(shards, Shards):
            root = _root(shards.root)
            root.batch = [Raw(event) for event in shards.events]
            return root
    except DECODE_ERRORS:
        pass
    return _UNREADABLE


def _read(text: bytes, events: list[Raw], manner: Manner) -> tuple[bytes, Sequence[str], bool]:
    """The events as lines, their uuids, and whether they are `placed`."""
    if not manner.ahead and not has_address(text, near=manner.near):
        if manner.near and b'"$geoip_disable"' in text:
            with suppress(*DECODE_ERRORS):
                return joined(text, events), [event.uuid for event in _settled(text).batch], True
        with suppress(*DECODE_ERRORS):
            return joined(text, events), [event.uuid for event in _ordinary(text).batch], False
    mended = [mend(raw, manner) for raw in events]
    return joined(text, [event.line for event in mended]), [event.uuid for event in mended], False


def _library(told: str) -> Mapping[str, str]:
    """What `PostHog-Sdk-Info` says, as properties."""
    name, slash, version = told.rpartition("/")
    if not slash or not name.strip() or not version.strip() or len(told) > SDK_INFO_LIMIT:
        return {}
    return {"$lib": name.strip(), "$lib_version": version.strip()}
