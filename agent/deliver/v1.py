"""How a batch is written for PostHog's v1 protocol, and what its reply means: a verdict for each event.

The facts are those of `PostHog/posthog`, `rust/capture/src/v1` (`constants.rs`, `context.rs`, `error.rs`,
`analytics/process.rs`, `analytics/response.rs`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from agent.deliver.reply import read_reply, retry_after, words
from agent.deliver.verdict import Absent, Accepted, Batch, Damaged, Judged, Refused, Retry, Verdict
from agent.deliver.wire import Compression, joined
from agent.portal import is_html

PATH = "/i/v1/analytics/events"

# PostHog writes `$lib` and `$lib_version` over those of every event from "name/version". A value without a
# slash it leaves alone (`context.rs`, `sdk_lib_and_version`): an SDK's events stay the SDK's, and ours bear
# our name anyway.
SDK_INFO = "capture-agent"

# What says of a 400 that it is not about the batch but about its headers: our fault, or that of a proxy on
# the way.
NOT_THE_BATCH = frozenset({"missing_required_headers", "invalid_header_value"})

# A result is 36 bytes of uuid and at most some 60 of words (`analytics/constants.rs`), with their quotes.
RESULT_BYTES = 256


class _Result(msgspec.Struct):
    """`Any`: a future value is settled, not an error."""

    result: Any = None
    details: Any = None


class _Answer(msgspec.Struct):
    results: dict[str, _Result] | None = None


class _Error(msgspec.Struct):
    error: str
    error_description: str = ""


_read_answer = msgspec.json.Decoder(_Answer).decode
_read_error = msgspec.json.Decoder(_Error).decode


def headers(
    basic: Mapping[str, str], api_key: str, *, request_id: str, attempt: int, request_timestamp: str
) -> dict[str, str]:
    """The headers of one attempt, beside those of every request."""
    return {
        **basic,
        "Authorization": f"Bearer {api_key}",
        "PostHog-Sdk-Info": SDK_INFO,
        "PostHog-Request-Id": request_id,
        "PostHog-Attempt": str(attempt),
        "PostHog-Request-Timestamp": request_timestamp,
    }


def body(
    batch: Batch, created_at: str, *, historical_migration: bool, compression: Compression
) -> tuple[bytes, ...] | Damaged:
    """The batch as v1 takes it, in pieces."""
    historical = b',"historical_migration":true' if historical_migration else b""
    head = b'{"created_at":%b%b,"batch":[' % (msgspec.json.encode(created_at), historical)
    return joined(head, batch, compression)


def read(
    status: int, headers: Mapping[str, str], body: bytes, now: int, *, secrets: Sequence[str] = ()
) -> Verdict | Absent:
    """What a reply means; header names in lower case, `now` by the wall clock in microseconds.

    `secrets` are what was sent and is not to be repeated.
    """
    if status == 404:
        return Absent("HTTP 404")
    if is_html(headers, body):
        return read_reply(status, headers, body, now, secrets=secrets)
    if 200 <= status <= 299:
        return _judged(status, headers, body, now, secrets)
    try:
        error = _read_error(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return read_reply(status, headers, body, now, secrets=secrets)
    text = f"{error.error}: {error.error_description}" if error.error_description else error.error
    if status == 400 and error.error in NOT_THE_BATCH:
        return Refused("host", f"HTTP 400: {words(text.encode(), secrets)}")
    return read_reply(status, headers, text.encode(), now, secrets=secrets)


def _judged(
    status: int, headers: Mapping[str, str], body: bytes, now: int, secrets: Sequence[str]
) -> Verdict | Absent:
    """The verdict on each event. One that is not named was taken, and so was one with an unknown result."""
    try:
        results = _read_answer(body).results
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        # Nobody knows what was taken. To send it again is harmless: the uuids are the same.
        return Retry(retry_after(headers, now), f"HTTP {status} whose results cannot be read")
    if results is None:
        return Absent(f"HTTP {status} without results")
    dead: dict[str, str] = {}
    again: set[str] = set()
    warned = 0
    for uuid, judged in results.items():
        match judged.result:
            case "ok":
                continue
            case "drop":
                dead[uuid.lower()] = words(str(judged.details or "dropped").encode(), secrets)
            case "retry":
                again.add(uuid.lower())
            case "warning":
                warned += 1
    if not (dead or again or warned):
        return Accepted()
    return Judged(dead, again, retry_after(headers, now) if again else None, warned)
