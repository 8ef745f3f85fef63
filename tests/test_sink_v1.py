"""The stand-in's v1 protocol: every answer that PostHog's gives, asked for over a real socket."""

import gzip
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from test_sink import NO_TLS

from agent.sink import Event, Result, Sink, serving

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
PATH = "/i/v1/analytics/events"
A, B = "0197a5c0-7e1c-7abc-8def-0123456789ab", "0197a5c0-7e1c-7abc-8def-0123456789ac"
REQUEST = "0197a5c0-7e1c-7abc-8def-00000000000f"
HEADERS = {
    "Authorization": "Bearer phc_key",
    "Content-Type": "application/json",
    "User-Agent": "test/1",
    "PostHog-Sdk-Info": "capture-agent",
    "PostHog-Attempt": "1",
    "PostHog-Request-Id": REQUEST,
    "PostHog-Request-Timestamp": "2026-11-23T12:00:00Z",
}


def event(uuid: str = A, **changes: Any) -> dict[str, Any]:
    whole = {
        "event": "signup",
        "uuid": uuid,
        "distinct_id": "user-1",
        "timestamp": "2026-11-23T11:00:00.123456Z",
        "properties": {"plan": "pro"},
        **changes,
    }
    return {name: value for name, value in whole.items() if value is not ...}


def batch(*events: object, **root: object) -> bytes:
    return json.dumps({"created_at": "2026-11-23T12:00:00Z", "batch": events, **root}).encode()


async def ask(
    body: bytes,
    headers: Mapping[str, str | None] | None = None,
    sink: Sink | None = None,
    method: str = "POST",
) -> tuple[httpx.Response, Sink]:
    sink = sink or Sink(now=lambda: NOW)
    sent = {name: value for name, value in {**HEADERS, **(headers or {})}.items() if value is not None}
    async with serving(sink) as url, httpx.AsyncClient(timeout=30, verify=NO_TLS) as client:
        request = client.build_request(method, url + PATH, content=body, headers=sent)
        for name in ("user-agent", "content-type"):
            if headers and headers.get(name, "") is None:
                del request.headers[name]
        return await client.send(request), sink


async def taken(body: bytes, headers: Mapping[str, str | None] | None = None) -> Event:
    """The one event of a request that was taken."""
    response, sink = await ask(body, headers)
    assert response.status_code == 200, response.text
    (found,) = sink.events
    return found


async def test_a_batch_is_taken_event_by_event() -> None:
    """Each event has its result, and the answer repeats the request's id."""
    response, sink = await ask(gzip.compress(batch(event(), event(B))), {"Content-Encoding": "gzip"})
    assert response.json() == {"results": {A: {"result": "ok"}, B: {"result": "ok"}}}
    assert response.headers["posthog-request-id"] == REQUEST
    assert "date" in response.headers
    assert "retry-after" not in response.headers
    assert [found.uuid for found in sink.events] == [A, B]


@pytest.mark.parametrize(
    ("headers", "status", "tag"),
    [
        ({"Authorization": None}, 401, "missing_authorization"),
        ({"Authorization": "Basic abc"}, 400, "invalid_header_value"),
        ({"Authorization": "Bearer phx_personal"}, 401, "invalid_api_token"),
        ({"Authorization": "Bearer " + "x" * 65}, 401, "invalid_api_token"),
        ({"PostHog-Sdk-Info": None}, 400, "missing_required_headers"),
        ({"PostHog-Attempt": None}, 400, "missing_required_headers"),
        ({"PostHog-Request-Id": None}, 400, "missing_required_headers"),
        ({"PostHog-Request-Timestamp": None}, 400, "missing_required_headers"),
        ({"user-agent": None}, 400, "missing_required_headers"),
        ({"content-type": None}, 400, "missing_required_headers"),
        ({"PostHog-Attempt": "0"}, 400, "invalid_header_value"),
        ({"PostHog-Attempt": "1.0"}, 400, "invalid_header_value"),
        ({"PostHog-Request-Id": "x"}, 400, "invalid_header_value"),
        ({"PostHog-Request-Timestamp": "yesterday"}, 400, "invalid_header_value"),
        ({"Content-Type": "text/plain"}, 415, "unsupported_content_type"),
        ({"Content-Encoding": "lz4"}, 415, "unsupported_encoding"),
    ],
)
async def test_headers_are_looked_at_first(headers: dict[str, str | None], status: int, tag: str) -> None:
    """A request without the right headers is an error for all of it."""
    response, sink = await ask(batch(event()), headers)
    assert (response.status_code, response.json()["error"], sink.taken) == (status, tag, 0)


@pytest.mark.parametrize(
    ("body", "status", "tag"),
    [
        (b"", 400, "empty_body"),
        (b"no", 400, "request_parsing_error"),
        (b'{"batch":[]}', 400, "request_parsing_error"),
        (batch(), 400, "empty_batch"),
        (batch(event(), created_at="now"), 400, "invalid_batch"),
        (batch(event(uuid="")), 400, "missing_event_uuid"),
        (batch(event(uuid="x")), 400, "invalid_event_uuid"),
        (batch(event(), event(A.upper())), 400, "duplicate_event_uuid"),
        (batch(event(distinct_id=5)), 400, "request_parsing_error"),
        (batch(event(timestamp=...)), 400, "request_parsing_error"),
        (b'{"created_at":"2026-11-23T12:00:00Z","batch":[{"event":"\xff"}]}', 400, "request_parsing_error"),
        (b"x" * (10 * 2**20 + 1), 413, "payload_too_large"),
    ],
)
async def test_one_wrong_body_is_an_error_for_all(body: bytes, status: int, tag: str) -> None:
    """What cannot be read, and uuids that are not, or not once, there."""
    response, sink = await ask(body)
    assert (response.status_code, response.json()["error"], sink.taken) == (status, tag, 0)


@pytest.mark.parametrize(
    ("changes", "details"),
    [
        ({"event": ""}, "missing_event_name"),
        ({"event": "é" * 101}, "event_name_too_long"),
        ({"event": "$performance_event"}, "dropped_performance_event"),
        ({"distinct_id": "  "}, "missing_distinct_id"),
        ({"distinct_id": "x" * 201}, "distinct_id_too_large"),
        ({"timestamp": "2026-11-23 12:00"}, "invalid_event_timestamp"),
        ({"properties": [1]}, "malformed_event_properties"),
        ({"options": 5}, "invalid_options"),
        ({"options": {"cookieless_mode": "perhaps"}}, "invalid_options"),
        ({"properties": {"x": "y" * 1_000_001}}, "event_too_big"),
    ],
)
async def test_one_bad_event_is_dropped_alone(changes: dict[str, Any], details: str) -> None:
    """The others are taken."""
    response, sink = await ask(batch(event(), event(B, **changes)))
    assert response.json()["results"] == {A: {"result": "ok"}, B: {"result": "drop", "details": details}}
    assert sink.taken == 1


async def test_properties_are_not_looked_into() -> None:
    """They stay sealed: a number beyond a double and deep nesting pass, unlike by `/batch`."""
    deep = b'{"n":1e999,"d":' + b"[" * 200 + b"]" * 200 + b"}"
    body = batch(event()).replace(b'{"plan": "pro"}', deep)
    assert (await taken(body)).properties["n"] == float("inf")


async def test_what_the_request_says_is_written_over_the_properties() -> None:
    """Options and session by their own names, and the library where the header has a version."""
    options = {"process_person_profile": "false", "cookieless_mode": 1, "product_tour_id": 7}
    given = event(options=options, session_id="s", properties={"$lib": "mine", "$session_id": "old"})
    found = await taken(batch(given))
    assert found.properties == {
        "$lib": "mine",
        "$session_id": "s",
        "$process_person_profile": False,
        "$cookieless_mode": True,
        "$product_tour_id": "7",
    }
    found = await taken(batch(given), {"PostHog-Sdk-Info": "posthog-python/7.42.0"})
    assert (found.properties["$lib"], found.properties["$lib_version"]) == ("posthog-python", "7.42.0")


async def test_the_clock_is_corrected_by_the_request_timestamp() -> None:
    """It plays the part of `sent_at`, unless the event says not to."""
    late = {"PostHog-Request-Timestamp": "2026-11-23T11:59:00Z"}
    at = datetime(2026, 11, 23, 11, 0, 0, 123456, UTC)
    assert (await taken(batch(event()), late)).timestamp == at + timedelta(minutes=1)
    fixed = event(options={"disable_skew_correction": True})
    assert (await taken(batch(fixed), late)).timestamp == at
    assert (await taken(batch(event(timestamp="2027-01-01T00:00:00Z")), late)).timestamp == NOW


async def test_an_illegal_id_is_taken_with_a_remark() -> None:
    """It makes no person."""
    response, _ = await ask(batch(event(distinct_id="NULL")))
    assert response.json()["results"][A] == {"result": "ok", "details": "person_processing_disabled"}


async def test_single_events_can_be_told_to_fail() -> None:
    """What is not stored may be sent again, and the answer says when."""
    sink = Sink(single=lambda found: Result("retry", "not_persisted") if found.uuid == A else None)
    response, _ = await ask(batch(event(), event(B)), sink=sink)
    assert response.headers["retry-after"] == "1"
    assert response.json()["results"][A] == {"result": "retry", "details": "not_persisted"}
    assert [found.uuid for found in sink.events] == [B]
    response, _ = await ask(batch(event()), sink=Sink(reject_if=("plan", "pro")))
    assert response.json()["results"][A] == {"result": "drop", "details": "rejected"}
    response, _ = await ask(batch(event()), sink=Sink(retry_rate=1.0))
    assert response.json()["results"][A]["result"] == "retry"


async def test_an_older_installation_has_no_v1() -> None:
    """Then the path is not there."""
    response, _ = await ask(batch(event()), sink=Sink(v1=False))
    assert response.status_code == 404


async def test_bodies_can_be_bounded() -> None:
    """By a 413 or by the end of the connection; and a portal stands before everything."""
    big = batch(event(properties={"x": "y" * 2000}))
    assert (await ask(big, sink=Sink(max_body=1000)))[0].status_code == 413
    assert (await ask(batch(event()), sink=Sink(max_body=1000, cut_over=1000)))[0].status_code == 200
    async with serving(Sink(cut_over=1000)) as url, httpx.AsyncClient(verify=NO_TLS) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(url + PATH, content=big, headers=HEADERS)
    portal, _ = await ask(big, sink=Sink(portal=True))
    assert (portal.status_code, portal.text[:15]) == (200, "<!DOCTYPE html>")
    busy, _ = await ask(big, sink=Sink(status=429, retry_after=2.5))
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "2.5")
