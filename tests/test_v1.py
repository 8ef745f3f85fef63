"""`agent.deliver.v1`: what PostHog's newer protocol reads, and a verdict for each event."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_wire import batch, chunk

from agent.deliver import v1
from agent.deliver.verdict import Absent, Accepted, Judged, Refused, Rejected, Retry, Split, Verdict

NOW = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z
A, B, C = (f"00000000-0000-4000-8000-00000000000{digit}" for digit in "abc")
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


def results(**by_uuid: object) -> bytes:
    return msgspec.json.encode({"results": by_uuid})


def error(tag: str, text: str = "no") -> bytes:
    return msgspec.json.encode({"error": tag, "error_description": text, "error_uri": "https://posthog.com"})


# The rows of the protocol's tables (`rust/capture/src/v1/error.rs`, `analytics/response.rs`).
ROWS: dict[str, tuple[int, dict[str, str], bytes, Verdict | Absent]] = {
    "ok": (200, {}, results(**{A: {"result": "ok"}}), Accepted()),
    "ok with details": (
        200,
        {},
        results(**{A: {"result": "ok", "details": "person_processing_disabled"}}),
        Accepted(),
    ),
    "warning": (
        200,
        {},
        results(**{A: {"result": "warning", "details": "person_processing_disabled"}}),
        Judged({}, set(), None, 1),
    ),
    "drop": (
        200,
        {},
        results(**{A.upper(): {"result": "drop", "details": "event_too_big"}, B: {"result": "ok"}}),
        Judged({A: "event_too_big"}, set(), None, 0),
    ),
    "drop without details": (
        200,
        {},
        results(**{A: {"result": "drop"}}),
        Judged({A: "dropped"}, set(), None, 0),
    ),
    "retry": (
        200,
        {"retry-after": "1"},
        results(**{A: {"result": "retry", "details": "not_persisted"}}),
        Judged({}, {A}, 1.0, 0),
    ),
    "a future value": (200, {}, results(**{A: {"result": "queued"}, B: {"result": 5}, C: {}}), Accepted()),
    "a uuid that is not in the map": (200, {}, results(), Accepted()),
    "200 cut short": (200, {}, results(**{A: {"result": "ok"}})[:-3], Retry(None, "")),
    "200 of something else": (200, {}, b'{"status":"Ok"}', Absent("")),
    "200 of a captive portal": (200, {"content-type": "text/html"}, PAGE, Refused("host", "")),
    "302": (302, {"location": "/login"}, b"", Refused("host", "")),
    "400 empty_body": (400, {}, error("empty_body"), Rejected("empty_body: no")),
    "400 empty_batch": (400, {}, error("empty_batch"), Rejected("empty_batch: no")),
    "400 invalid_batch": (400, {}, error("invalid_batch"), Rejected("invalid_batch: no")),
    "400 missing_event_uuid": (400, {}, error("missing_event_uuid"), Rejected("missing_event_uuid: no")),
    "400 invalid_event_uuid": (400, {}, error("invalid_event_uuid"), Rejected("invalid_event_uuid: no")),
    "400 duplicate_event_uuid": (
        400,
        {},
        error("duplicate_event_uuid"),
        Rejected("duplicate_event_uuid: no"),
    ),
    "400 request_parsing_error": (
        400,
        {},
        error("request_parsing_error", ""),
        Rejected("request_parsing_error"),
    ),
    "400 missing_required_headers": (400, {}, error("missing_required_headers"), Refused("host", "")),
    "400 invalid_header_value": (400, {}, error("invalid_header_value"), Refused("host", "")),
    "400 without JSON": (400, {}, b"no", Rejected("no")),
    "401 missing_authorization": (401, {}, error("missing_authorization"), Refused("key", "")),
    "401 invalid_api_token": (401, {}, error("invalid_api_token"), Refused("key", "")),
    "402 billing_limit_exceeded": (402, {}, error("billing_limit_exceeded"), Refused("billing", "")),
    "403 of a firewall": (403, {}, PAGE, Refused("key", "")),
    "404 route absent": (404, {}, b"", Absent("")),
    "404 of nginx": (404, {"content-type": "text/html"}, PAGE, Absent("")),
    "408 body_read_timeout": (408, {}, error("body_read_timeout"), Retry(None, "")),
    "408 request_timeout": (408, {}, error("request_timeout"), Retry(None, "")),
    "413 payload_too_large": (413, {}, error("payload_too_large"), Split("payload_too_large: no")),
    "415 unsupported_content_type": (415, {}, error("unsupported_content_type"), Refused("host", "")),
    "415 unsupported_encoding": (415, {}, error("unsupported_encoding"), Refused("host", "")),
    "429 rate_limited": (429, {"retry-after": "1"}, error("rate_limited"), Retry(1.0, "")),
    "500 internal_error": (500, {"retry-after": "1"}, error("internal_error"), Retry(1.0, "")),
    "503 service_unavailable": (503, {"retry-after": "1"}, error("service_unavailable"), Retry(1.0, "")),
    "504 gateway_timeout": (504, {}, error("gateway_timeout"), Retry(None, "")),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_reply_has_its_verdict(row: tuple[int, dict[str, str], bytes, Verdict | Absent]) -> None:
    """Each row of the protocol's tables, and each thing that answers in its place."""
    status, headers, body, expected = row
    verdict = v1.read(status, headers, body, NOW)
    match verdict, expected:
        case Refused(hold=hold, why=why), Refused(hold=wanted):
            assert hold == wanted
            assert str(status) in why
        case Retry(after=after, reason=reason), Retry(after=wanted_after):
            assert after == wanted_after
            assert str(status) in reason
        case Absent(why=why), Absent():
            assert str(status) in why
        case _:
            assert verdict == expected


def test_a_drops_words_hold_no_key() -> None:
    """They go to logs, status and dead letters."""
    verdict = v1.read(
        200, {}, results(**{A: {"result": "drop", "details": "phc_secret\n\x1b[2J" + "x" * 2000}}), NOW
    )
    assert isinstance(verdict, Judged)
    assert verdict.dead[A].startswith("*** ")
    assert verdict.dead[A].isprintable()
    assert len(verdict.dead[A]) <= 500


@given(
    st.integers(100, 700),
    st.binary() | st.recursive(st.none() | st.text(), st.lists).map(msgspec.json.encode),
)
def test_any_reply_has_a_verdict(status: int, body: bytes) -> None:
    """No reply, however odd, is an exception."""
    verdict = v1.read(status, {}, body, NOW)
    if isinstance(verdict, Accepted | Judged):
        assert 200 <= status <= 299


def test_a_body_is_what_the_protocol_wants() -> None:
    """`created_at` and the batch; neither key nor `sent_at`."""
    body = v1.body(
        batch(chunk(b'{"n":1}')), "2026-01-01T00:00:00.000Z", historical_migration=False, compression="none"
    )
    assert isinstance(body, tuple)
    assert json.loads(b"".join(body)) == {"created_at": "2026-01-01T00:00:00.000Z", "batch": [{"n": 1}]}
    body = v1.body(batch(chunk(b"{}")), "x", historical_migration=True, compression="none")
    assert isinstance(body, tuple)
    assert json.loads(b"".join(body))["historical_migration"] is True


def test_the_headers_leave_an_sdks_name_alone() -> None:
    """PostHog writes `$lib` over an SDK's own where this header has a slash; ours has none."""
    headers = v1.headers({"User-Agent": "x"}, "phc_k", request_id=A, attempt=2, request_timestamp="now")
    assert headers == {
        "User-Agent": "x",
        "Authorization": "Bearer phc_k",
        "PostHog-Sdk-Info": "capture-agent",
        "PostHog-Request-Id": A,
        "PostHog-Attempt": "2",
        "PostHog-Request-Timestamp": "now",
    }
    assert "/" not in v1.SDK_INFO
