"""Requests of PostHog's v1 protocol: headers, events beside their options, and a result for each."""

import gzip
import json
import zlib
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.decode.capture_v1 import answer, read_request
from agent.decode.request import Answer, Posted, Request
from agent.events import Instant
from agent.sink import payload, v1

WALL = 1_795_000_000_123_456
AT = Instant(WALL, 1, "boot")
NOW = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=WALL)
PATH = "/i/v1/analytics/events"
HEADERS = {
    "authorization": "Bearer phc_a",
    "content-type": "application/json",
    "user-agent": "posthog-python/7.91.1",
    "posthog-sdk-info": "posthog-python/7.91.1",
    "posthog-attempt": "1",
    "posthog-request-id": "0194f3b4-0000-7000-8000-000000000000",
    "posthog-request-timestamp": NOW.isoformat(),
}


def event(number: int = 0, **fields: object) -> dict[str, Any]:
    return {
        "event": "e",
        "uuid": str(UUID(int=number)),
        "distinct_id": "d",
        "timestamp": NOW.isoformat(),
        "properties": {"n": number},
        **fields,
    }


def asked(body: object, near: bool = False, limit: int = 100_000, **headers: str | None) -> Posted | Answer:
    packed = body if isinstance(body, bytes) else json.dumps(body).encode()
    changes = {name.replace("_", "-"): value for name, value in headers.items()}
    told = {name: value for name, value in {**HEADERS, **changes}.items() if value is not None}
    return read_request(Request(PATH, "", told, packed, AT, limit, near))


def posted(*events: object, near: bool = False, **headers: Any) -> Posted:
    found = asked({"created_at": NOW.isoformat(), "batch": events}, near, **headers)
    assert isinstance(found, Posted), found
    assert found.lines.count(b"\n") == found.events == len(found.uuids)
    return found


def test_ordinary_events_pass_as_they_came() -> None:
    """With the key, the uuids and what the header says of the SDK."""
    found = posted(event(1), event(2))
    assert found.lines == b"".join(json.dumps(event(number)).encode() + b"\n" for number in (1, 2))
    assert (found.key, found.uuids) == ("phc_a", [str(UUID(int=1)), str(UUID(int=2))])
    assert found.defaults == {"$lib": "posthog-python", "$lib_version": "7.91.1"}


@pytest.mark.parametrize("told", ["nonsense", "/1", "a/", "a" * 200 + "/1"])
def test_a_header_that_names_no_sdk_names_none(told: str) -> None:
    """As PostHog reads it."""
    assert posted(event(), posthog_sdk_info=told).defaults == {}


@pytest.mark.parametrize(
    ("status", "tag", "headers"),
    [
        (401, "missing_authorization", {"authorization": None}),
        (400, "missing_required_headers", {"posthog_attempt": None}),
        (400, "invalid_header_value", {"authorization": "Basic x"}),
        (400, "invalid_header_value", {"user_agent": "ü"}),
        (401, "invalid_api_token", {"authorization": "Bearer phx_a"}),
        (401, "invalid_api_token", {"authorization": "Bearer  "}),
        (415, "unsupported_content_type", {"content_type": "text/plain"}),
        (415, "unsupported_encoding", {"content_encoding": "zstd"}),
        (415, "unsupported_encoding", {"content_encoding": "br"}),
        (400, "invalid_header_value", {"posthog_request_id": "x"}),
        (400, "invalid_header_value", {"posthog_attempt": "0"}),
        (400, "invalid_header_value", {"posthog_request_timestamp": "now"}),
        (400, "request_decoding_error", {"content_encoding": "gzip"}),
    ],
)
def test_headers(status: int, tag: str, headers: dict[str, Any]) -> None:
    """What PostHog refuses for its headers is refused in its words, its strict stand-in agrees."""
    body = json.dumps({"created_at": NOW.isoformat(), "batch": [event()]}).encode()
    found = asked(body, **headers)
    assert isinstance(found, Answer)
    assert (found.status, json.loads(found.text)["error"], found.kind) == (status, tag, "application/json")
    changes = {name.replace("_", "-"): value for name, value in headers.items()}
    told = {name: value for name, value in {**HEADERS, **changes}.items() if value is not None}
    request = payload.Request(number=1, method="POST", path=PATH, query="", headers=told, body=body)
    reply, _ = v1.judge(request, NOW, lambda _: None)
    assert (reply.status, json.loads(reply.body)["error"]) == (status, tag)


@pytest.mark.parametrize(
    ("status", "tag", "body"),
    [
        (400, "empty_body", b""),
        (400, "request_parsing_error", b"nonsense"),
        (400, "request_parsing_error", b"[]"),
        (400, "request_parsing_error", {"batch": {}}),
        (400, "empty_batch", {"batch": []}),
        (413, "payload_too_large", b" " * 100_001),
    ],
)
def test_bodies_that_hold_nothing(status: int, tag: str, body: object) -> None:
    """They are refused as a whole."""
    found = asked(body)
    assert isinstance(found, Answer)
    assert (found.status, json.loads(found.text)["error"]) == (status, tag)


def test_packed_bodies() -> None:
    """gzip and deflate, within the limit."""
    body = json.dumps({"batch": [event()]}).encode()
    for encoding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        assert isinstance(asked(packed, content_encoding=encoding), Posted)
    bomb = asked(gzip.compress(b" " * 100_001), content_encoding="gzip")
    assert isinstance(bomb, Answer)
    assert bomb.status == 413


@pytest.mark.parametrize(
    ("fields", "properties"),
    [
        ({"options": {"cookieless_mode": True}}, {"$cookieless_mode": True}),
        ({"options": {"cookieless_mode": "1"}}, {"$cookieless_mode": True}),
        ({"options": {"disable_skew_correction": "false"}}, {"$ignore_sent_at": False}),
        ({"options": {"process_person_profile": 0}}, {"$process_person_profile": False}),
        ({"options": {"product_tour_id": 7}}, {"$product_tour_id": "7"}),
        ({"options": {"product_tour_id": None, "other": 1}}, {}),
        ({"options": None}, {}),
        ({"options": [1]}, {}),
        ({"session_id": "s", "window_id": "w"}, {"$session_id": "s", "$window_id": "w"}),
        ({"session_id": "s", "properties": {"$session_id": "own", "n": 1}}, {"$session_id": "own"}),
    ],
)
def test_what_stands_beside_the_properties(fields: dict[str, Any], properties: dict[str, Any]) -> None:
    """It becomes the property that it is on PostHog's other endpoints, unless there is one."""
    [line] = posted(event(1, **fields)).lines.splitlines()
    assert json.loads(line)["properties"] == {"n": 1, **properties}


@pytest.mark.parametrize(("options", "seconds"), [({}, -60), ({"disable_skew_correction": True}, 40)])
def test_a_client_with_another_clock(options: dict[str, object], seconds: float) -> None:
    """Its events happened when PostHog would say that they did."""
    there = (NOW + timedelta(seconds=100)).isoformat()
    stamped = event(timestamp=(NOW + timedelta(seconds=40)).isoformat(), options=options)
    [line] = posted(stamped, posthog_request_timestamp=there).lines.splitlines()
    assert datetime.fromisoformat(json.loads(line)["timestamp"]) == NOW + timedelta(seconds=seconds)


def test_what_needs_nothing_added_is_told() -> None:
    """Where each event says itself whether it may be looked up."""
    told = event(1, properties={"$geoip_disable": True})
    assert posted(told, near=True).placed
    assert not posted(told, event(2), near=True).placed


def test_one_bad_event_takes_no_other_with_it() -> None:
    """Not even one that is no JSON; each has its result but those without a uuid."""
    good = json.dumps(event(1)).encode()
    found = asked(b'{"batch":[' + good + b',{"uuid":NaN},{"event":"e"},' + good + b"]}")
    assert isinstance(found, Posted)
    assert found.uuids == [str(UUID(int=1)), "", "", str(UUID(int=1))]


@pytest.mark.parametrize("bad", [b"", b'{"uuid":NaN},', b'{"event":"e","properties":{"a":1},'])
def test_many_dense_events_are_taken(bad: bytes) -> None:
    """Half a million values are no reason to refuse a body, nor is one bad event among them."""
    many = [json.dumps(event(1, properties={f"p{n}": n for n in range(60)})).encode()] * 9000
    found = asked(b'{"batch":[' + bad + b",".join(many) + b"]}", limit=20 * 2**20)
    assert isinstance(found, Posted)
    assert found.uuids[-9000:] == [str(UUID(int=1))] * 9000
    assert found.events == 9000 + bool(bad)


def test_too_many_events_are_refused() -> None:
    """As too large, and counted as one."""
    found = asked(b'{"batch":[' + b"{}," * 300_000 + b"{}]}", limit=20 * 2**20)
    assert isinstance(found, Answer)
    assert (found.status, found.reason, found.events) == (413, "too_large", 1)


def test_results() -> None:
    """PostHog's word for what the door found, and whether to come again."""
    found = posted(*(event(number) for number in range(1, 6)), {"event": "e"})
    refused = {1: "missing_distinct_id", 2: "too_deep", 3: "filtered", 4: "rate_limited", 5: "missing_event"}
    told = answer(found, refused)
    assert (told.status, told.kind, told.again) == (200, "application/json", True)
    assert list(json.loads(told.text)["results"].values()) == [
        {"result": "ok"},
        {"result": "drop", "details": "missing_distinct_id"},
        {"result": "drop", "details": "rejected"},
        {"result": "drop", "details": "event_restriction_drop"},
        {"result": "retry", "details": "not_persisted"},
    ]
    assert answer(found, {}).again is False
    assert answer(found, {0: "buffer_full"}).status == 503


@given(st.binary(max_size=80) | st.text('{}[]",: batchud\n', max_size=80).map(str.encode), st.booleans())
def test_nothing_raises(body: bytes, packed: bool) -> None:
    """Whatever a client sends, it is lines or a refusal."""
    found = asked(gzip.compress(body) if packed else body, content_encoding="gzip" if packed else None)
    assert isinstance(found, Posted | Answer)
