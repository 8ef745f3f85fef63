"""The stand-in for PostHog: every answer that PostHog's capture gives, asked for over a real socket."""

import base64
import gzip
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from random import Random
from urllib.parse import quote, urlencode
from uuid import UUID

import httpx
import pytest
import trio

from agent.sink import (
    PATHS,
    Afterwards,
    Fault,
    Reply,
    Request,
    Sink,
    serving,
)
from agent.sink.judge import DEPTH
from agent.sink.payload import PAYLOAD_LIMIT, WIRE_LIMIT
from agent.sink.times import final_timestamp

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
UUID7 = "0197a5c0-7e1c-7abc-8def-0123456789ab"
EVENT = {"event": "signup", "distinct_id": "user-1", "uuid": UUID7, "properties": {"plan": "pro"}}
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # else every client makes one, in 30 ms
NO_MATCH = "data did not match any variant of untagged enum RawRequest"
NO_NAME = "failed to hydrate events from request: non-engage request missing event name attribute"


def batch(*events: object, **root: object) -> bytes:
    return json.dumps({"api_key": "phc_key", "batch": events, **root}).encode()


def within_batch(event: bytes) -> bytes:
    """A batch whose second event is these very bytes."""
    return b'{"api_key":"phc_key","batch":[{"event":"good","distinct_id":"u"},' + event + b"]}"


def with_property(value: bytes) -> bytes:
    return within_batch(b'{"event":"e","distinct_id":"u","properties":{"p":' + value + b"}}")


async def ask(
    body: bytes,
    target: str = "/batch/",
    *,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
    sink: Sink | None = None,
) -> tuple[httpx.Response, Sink]:
    sink = sink or Sink(now=lambda: NOW, random=Random(1))
    async with serving(sink) as url, httpx.AsyncClient(timeout=30, verify=NO_TLS) as client:
        return await client.request(method, url + target, content=body, headers=headers), sink


async def refused(
    body: bytes, target: str = "/batch/", *, headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Status and text of an answer that must not have taken anything, and must be plain text."""
    response, sink = await ask(body, target, headers=headers)
    assert sink.taken == 0
    assert response.headers["content-type"].startswith("text/plain")
    assert "retry-after" not in response.headers
    return response.status_code, response.text


# What is taken.


@pytest.mark.parametrize("path", [path + end for path in PATHS for end in ("", "/")])
async def test_every_path_takes_a_batch(path: str) -> None:
    """All paths of the v0 family take a batch, with and without a trailing slash, and say so in JSON."""
    response, sink = await ask(batch(EVENT), path)
    assert (response.status_code, response.json()) == (200, {"status": "Ok"})
    (event,) = sink.events
    assert (event.uuid, event.event, event.distinct_id) == (UUID7, "signup", "user-1")
    assert (event.properties, event.api_key, event.request) == ({"plan": "pro"}, "phc_key", 1)


@pytest.mark.parametrize("path", ["/", "/_readiness", "/_liveness"])
async def test_health_is_answered(path: str) -> None:
    """The health paths answer 200 and count as no request."""
    response, sink = await ask(b"", path, method="GET")
    assert (response.status_code, sink.requests) == (200, 0)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("OPTIONS", "/batch", 200),
        ("PUT", "/batch", 405),
        ("DELETE", "/e/", 405),
        ("GET", "/i/v1/analytics/events", 405),
        ("POST", "/i/v1/ai/events", 404),
    ],
)
async def test_other_methods_and_paths(method: str, path: str, status: int) -> None:
    """OPTIONS is fine, other methods are a 405, and what is not served here is a 404."""
    response, sink = await ask(b"", path, method=method)
    assert (response.status_code, sink.taken) == (status, 0)


@pytest.mark.parametrize(
    "body",
    [
        [{**EVENT, "token": "phc_key"}, {**EVENT, "$token": "phc_key"}, {**EVENT, "api_key": "phc_key"}],
        [{**EVENT, "properties": {"token": "phc_key"}}, EVENT],
        {**EVENT, "api_key": " phc_key\n"},
        {"token": "phc_key", "batch": [EVENT], "unknown": {"x": [1]}},
        {"api_key": "phc_key", "batch": [{**EVENT, "token": "phc_other"}]},
    ],
)
async def test_shapes_and_keys(body: object) -> None:
    """Arrays, single events and batches are taken, with the key wherever PostHog looks for it, trimmed."""
    response, sink = await ask(json.dumps(body).encode(), "/e/")
    assert response.status_code == 200
    assert {event.api_key for event in sink.events} == {"phc_key"}


async def test_engage_becomes_identify() -> None:
    """A person's profile without an event name is `$identify` on /engage and a 400 elsewhere."""
    body = json.dumps({"token": "phc_key", "distinct_id": "u", "$set": {"plan": "pro"}}).encode()
    response, sink = await ask(body, "/engage/")
    assert response.status_code == 200
    assert [(event.event, event.set) for event in sink.events] == [("$identify", {"plan": "pro"})]
    assert await refused(body, "/e/") == (400, NO_NAME)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"distinct_id": 23.4}, "23.4"),
        ({"distinct_id": True}, "true"),
        ({"distinct_id": {"b": 1, "a": ["x"]}}, '{"a":["x"],"b":1}'),
        ({"$distinct_id": "u"}, "u"),
        ({"distinct_id": None, "properties": {"distinct_id": 7}}, "7"),
        ({"distinct_id": "  u "}, "  u "),
        ({"distinct_id": "a\0b"}, "a\ufffdb"),
        ({"distinct_id": "é" * 250}, "é" * 200),
    ],
)
async def test_distinct_ids(fields: dict[str, object], expected: str) -> None:
    """Any JSON value is an id, as text; NUL is replaced, 200 characters are kept, spaces too."""
    _, sink = await ask(batch({"event": "e", **fields}))
    assert [event.distinct_id for event in sink.events] == [expected]


@pytest.mark.parametrize(
    "given", [UUID7, UUID7.upper(), UUID7.replace("-", ""), f"{{{UUID7}}}", f"urn:uuid:{UUID7}"]
)
async def test_uuids_in_every_spelling(given: str) -> None:
    """A uuid may be spelt in every way that the Rust library reads; it is recorded in the usual one."""
    _, sink = await ask(batch({**EVENT, "uuid": given}))
    assert [event.uuid for event in sink.events] == [UUID7]


async def test_a_missing_uuid_is_made() -> None:
    """An event with no uuid, or an empty one, gets a version 7 uuid of its own time."""
    events = [{**EVENT, "uuid": given, "timestamp": "2026-11-23T11:00:00Z"} for given in ("", None)]
    _, sink = await ask(batch(*events))
    uuids = [UUID(event.uuid) for event in sink.events]
    assert {(uuid.version, uuid.int >> 80) for uuid in uuids} == {(7, 1795431600000)}
    assert len(set(uuids)) == 2


async def test_performance_events_vanish() -> None:
    """`$performance_event` is filtered without a word, and a batch of nothing else is a 200."""
    performance = {**EVENT, "event": "$performance_event"}
    response, sink = await ask(batch(performance, EVENT))
    assert (response.status_code, sink.taken) == (200, 1)
    response, sink = await ask(batch(performance))
    assert (response.status_code, sink.taken) == (200, 0)


async def test_beacon_gets_no_content() -> None:
    """With `beacon=1` success is a 204 without a body; other values change nothing."""
    response, sink = await ask(batch(EVENT), "/e/?beacon=1")
    assert (response.status_code, response.content, sink.taken) == (204, b"", 1)
    assert (await ask(batch(EVENT), "/e/?beacon=0"))[0].status_code == 200


# Encodings.

PLAIN = batch(EVENT)
ZIPPED = gzip.compress(PLAIN, mtime=0)
B64 = base64.b64encode(PLAIN)


def form(**fields: str) -> bytes:
    return urlencode(fields).encode()


FORM_TYPE = {"content-type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize(
    ("body", "query", "headers"),
    [
        (ZIPPED, "", {"content-encoding": "gzip"}),
        (ZIPPED, "", {"content-encoding": "gzip-js"}),
        (ZIPPED, "", {}),
        (ZIPPED, "?compression=GZIP-JS", {}),
        (PLAIN, "", {"content-type": "text/plain", "content-encoding": "identity"}),
        (B64, "", {"content-encoding": "base64"}),
        (B64, "?compression=b64", {}),
        (base64.b64encode(ZIPPED), "?compression=gzip", {}),
        (form(data=PLAIN.decode()), "", FORM_TYPE),
        (form(data=B64.decode(), compression="base64"), "", FORM_TYPE),
        (b"data=" + B64, "", FORM_TYPE),
        (b"", f"?data={quote(PLAIN)}", {}),
        (b"", f"?data={quote(B64)}&compression=base64", {}),
    ],
)
async def test_encodings(body: bytes, query: str, headers: dict[str, str]) -> None:
    """gzip, gzip-js, base64, forms and `?data=` are read, by whatever hint says so or by their look."""
    response, sink = await ask(body, "/e/" + query, headers=headers)
    assert (response.status_code, response.text, sink.taken) == (200, '{"status":"Ok"}', 1)


async def test_a_get_carries_an_event() -> None:
    """A GET with `?data=` is taken as a POST is."""
    response, sink = await ask(b"", f"/e/?data={quote(B64)}", method="GET")
    assert (response.status_code, sink.taken) == (200, 1)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (ZIPPED[:-1], {}),
        (ZIPPED[:-9], {}),
        (ZIPPED[: len(ZIPPED) // 2], {}),
        (ZIPPED + ZIPPED, {}),
        (ZIPPED + b"\0", {}),
        (ZIPPED[:-8] + bytes(4) + ZIPPED[-4:], {}),
        (PLAIN, {"content-encoding": "gzip"}),
        (PLAIN, {"content-encoding": "lz64"}),
        (zlib.compress(PLAIN), {"content-encoding": "deflate"}),
        (b"\x28\xb5\x2f\xfd" + PLAIN, {"content-encoding": "zstd"}),
        (b"", {}),
        (PLAIN, FORM_TYPE),
        (form(compression="gzip"), FORM_TYPE),
    ],
)
async def test_encodings_that_are_refused(body: bytes, headers: dict[str, str]) -> None:
    """Cut, damaged or second gzip members, encodings of v1, no body, and a form that is none are 400s."""
    status, text = await refused(body, headers=headers)
    assert status == 400
    assert text


# What JSON is refused.


@pytest.mark.parametrize(
    "body",
    [
        *(
            with_property(value)
            for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 400)
        ),
        *(with_property(value) for value in (b'"\\ud83d"', b'"\\udc00"', b'"\\ud83dx"', b'{"\\ud83d":1}')),
        *(
            with_property(value)
            for value in (b'"\xff"', b'"\xed\xa0\x80"', b'{"\xff":1}', b'"\x01"', b"01", b"'x'")
        ),
        *(
            within_batch(b'{"event":"e","distinct_id":"u","x":' + value + b"}")
            for value in (b"1e999", b'"\xff"')
        ),
        *(PLAIN + tail for tail in (b"x", b"{}", b"\0")),
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN[:-1],
        b"   ",
        b"[" * 100_000,
    ],
)
async def test_json_that_serde_refuses(body: bytes) -> None:
    """What Python's json writes or reads but serde_json does not is a 400 for the whole request."""
    status, text = await refused(body)
    assert status == 400
    assert text.startswith("failed to parse request: ")


@pytest.mark.parametrize(
    "value", [b"1e308", b"1e-999", b"-0", b"9" * 308, b'"' + b"9" * 400 + b'"', b'{"a":1,"a":2}']
)
async def test_json_that_serde_takes(value: bytes) -> None:
    """Numbers that fit a double, digits in a text and a name given twice in the properties are fine."""
    response, sink = await ask(with_property(value))
    assert (response.status_code, sink.taken) == (200, 2)


@pytest.mark.parametrize(("spare", "status"), [(0, 200), (1, 400)])
async def test_nesting(spare: int, status: int) -> None:
    """127 containers in each other are read, counted from the root of the document; one more is not."""
    depth = DEPTH - 4 + spare  # the root, its batch, the event and its properties
    response, _ = await ask(with_property(b"[" * depth + b"]" * depth))
    assert response.status_code == status


# What events are refused.


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"event": ""}, "event submitted with an empty event name"),
        ({"event": None}, NO_NAME),
        ({"event": 7}, NO_NAME),
        ({"distinct_id": None}, "event submitted without a distinct_id"),
        ({"distinct_id": ""}, "event submitted without a distinct_id"),
        ({"distinct_id": " \t\u2003"}, "event submitted without a distinct_id"),
        ({"uuid": "not-a-uuid"}, NO_NAME),
        ({"uuid": UUID7[:-1]}, NO_NAME),
        ({"uuid": 7}, NO_NAME),
        ({"properties": None}, NO_NAME),
        ({"properties": ["a"]}, NO_NAME),
        ({"properties": {"$cookieless_mode": "yes"}}, "event submitted with invalid cookieless mode"),
        ({"properties": {"$cookieless_mode": None}}, "event submitted with invalid cookieless mode"),
        ({"timestamp": 1700000000}, NO_NAME),
        ({"offset": 1.5}, NO_NAME),
        ({"offset": 2**63}, NO_NAME),
        ({"$set": []}, NO_NAME),
        ({"$distinct_id": "twice"}, NO_NAME),
    ],
)
async def test_one_bad_event_fails_its_batch(change: dict[str, object], text: str) -> None:
    """A batch with one event that PostHog refuses is a 400 with its text, and nothing of it is taken."""
    assert await refused(batch(EVENT, {**EVENT, **change}, EVENT)) == (400, text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (batch(), "request holds no event"),
        (b"[]", "request holds no event"),
        (b"{}", NO_NAME),
        (b"7", "failed to parse request: " + NO_MATCH),
        (b'{"api_key":"phc_key","token":"phc_key","batch":[]}', "failed to parse request: " + NO_MATCH),
        (b'{"api_key":7,"batch":[]}', "failed to parse request: " + NO_MATCH),
        (batch(EVENT, sent_at=7), NO_NAME),
        (batch(EVENT, historical_migration="yes"), NO_NAME),
        (b"[1]", "failed to parse request: " + NO_MATCH),
    ],
)
async def test_roots_that_are_refused(body: bytes, text: str) -> None:
    """Empty batches and roots of no known shape are 400s."""
    assert await refused(body) == (400, text)


@pytest.mark.parametrize("query", ["?_=soon", "?beacon=yes", "?data=a&data=b"])
async def test_queries_that_are_refused(query: str) -> None:
    """A query whose numbers are none, or that names a field twice, is a 400."""
    assert (await refused(PLAIN, "/e/" + query))[0] == 400


# Keys.


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "empty"),
        (" \n\u2003", "empty"),
        ("x" * 65, "too_long"),
        ("phc_é", "not_ascii"),
        ("phx_secret", "personal_api_key"),
        (" phx_secret", "personal_api_key"),
        ("phc_\0key", "null_byte"),
    ],
)
async def test_keys_that_are_refused(key: str, reason: str) -> None:
    """Each rule that capture has for keys is a 401 that names it."""
    assert await refused(batch(EVENT, api_key=key)) == (401, f"API key is not valid: {reason}")


@pytest.mark.parametrize("key", ["x" * 64, "an old key", "phs_secret"])
async def test_keys_of_other_shapes_are_taken(key: str) -> None:
    """There is no rule that a key begins with `phc_`."""
    response, sink = await ask(batch(EVENT, api_key=key))
    assert (response.status_code, sink.events[0].api_key) == (200, key)


async def test_no_key_and_two_keys() -> None:
    """Events without a key, or with different ones, are a 401."""
    keyed = [{**EVENT, "token": key} for key in ("phc_a", "phc_b")]
    assert await refused(json.dumps(EVENT).encode()) == (401, "event submitted without an api_key")
    assert await refused(json.dumps(keyed).encode()) == (
        401,
        "batch submitted with inconsistent api_key values",
    )


# Sizes.


@pytest.mark.parametrize(("size", "status"), [(WIRE_LIMIT, 400), (WIRE_LIMIT + 1, 413)])
async def test_a_body_over_the_wire_limit(size: int, status: int) -> None:
    """20 MiB are read (and found to be no JSON), a byte more is a 413."""
    response, sink = await ask(b" " * size)
    assert response.status_code == status
    assert sink.received == size


async def test_a_body_far_over_the_wire_limit_is_not_read() -> None:
    """Of a body of over twice the limit the rest is not read; the client gets a 413 or a reset."""
    sink, status = Sink(), 413
    async with serving(sink) as url, httpx.AsyncClient(verify=NO_TLS) as client:
        with suppress(httpx.TransportError):
            status = (await client.post(url + "/batch", content=b" " * (2 * WIRE_LIMIT + 1))).status_code
    assert status == 413
    assert sink.received <= 2 * WIRE_LIMIT


def bomb(size: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    piece = b" " * (1024 * 1024)
    parts = [packer.compress(piece) for _ in range(size // len(piece))]
    return b"".join([*parts, packer.compress(piece[: size % len(piece)]), packer.flush()])


async def test_a_bomb_is_a_413() -> None:
    """A small body that decompresses to more than 100 MiB is a 413."""
    status, text = await refused(bomb(PAYLOAD_LIMIT + 1))
    assert status == 413
    assert text.startswith("maximum event size exceeded")


async def test_a_large_event_is_a_413_that_is_not_atomic() -> None:
    """An event over the message limit is a 413, and events before it are taken all the same."""
    large = {**EVENT, "properties": {"p": "x" * 1_000_000}}
    response, sink = await ask(batch(EVENT, large, EVENT))
    assert (response.status_code, sink.taken) == (413, 1)
    assert response.text.startswith("maximum event size exceeded")


@pytest.mark.parametrize(("quotes", "status"), [(240_000, 200), (260_000, 413)])
async def test_an_event_is_measured_as_escaped(quotes: int, status: int) -> None:
    """An event of half the limit is too large if what it is made of doubles when escaped."""
    response, _ = await ask(batch({**EVENT, "properties": {"p": '"' * quotes}}))
    assert response.status_code == status


# Time.

EARLIER = NOW - timedelta(hours=1)


@pytest.mark.parametrize(
    ("given", "offset", "sent_at", "expected"),
    [
        ("2026-11-23T11:00:00Z", None, NOW + timedelta(seconds=10), EARLIER - timedelta(seconds=10)),
        ("2026-11-23T11:00:00Z", None, NOW - timedelta(seconds=10), EARLIER + timedelta(seconds=10)),
        ("2026-11-23T11:00:00Z", None, None, EARLIER),
        ("2026-11-23T14:00:00+03", None, None, EARLIER),
        ("2026-11-23T11:00:00", None, None, EARLIER),
        ("2026-11-23 11:00:00", None, None, EARLIER),
        ("1795431600", None, None, EARLIER),
        ("1795431600000", None, None, EARLIER),
        ("Mon, 23 Nov 2026 11:00:00 +0000", None, None, EARLIER),
        ("soon", None, NOW, NOW),
        ("12", None, NOW, NOW),
        (None, None, EARLIER, NOW),
        ("2026-11-23T11:00:00Z", 5000, EARLIER, NOW - timedelta(seconds=5)),
        ("2026-11-24T11:00:00Z", None, None, NOW + timedelta(hours=23)),
        ("2026-11-24T11:00:01Z", None, None, NOW),
        ("0001-01-01T00:00:00Z", None, NOW + timedelta(days=1), datetime(1970, 1, 1, tzinfo=UTC)),
    ],
)
def test_final_timestamps(
    given: str | None, offset: int | None, sent_at: datetime | None, expected: datetime
) -> None:
    """The client's clock is corrected by `sent_at`; what cannot be read or lies in the future is now."""
    assert final_timestamp(given, offset, sent_at, NOW) == expected


async def test_where_sent_at_comes_from() -> None:
    """`sent_at` is the batch's, else the query's `_` in milliseconds; `$ignore_sent_at` switches it off."""
    timed = {**EVENT, "timestamp": "2026-11-23T11:00:00Z"}
    late = NOW + timedelta(minutes=1)
    milliseconds = int(late.timestamp() * 1000)
    corrected = EARLIER - timedelta(minutes=1)
    for body, query, expected in (
        (batch(timed, sent_at=late.isoformat()), "?_=1795430000000", corrected),
        (batch(timed), f"?_={milliseconds}", corrected),
        (batch(timed), f"?_={milliseconds // 1000}", EARLIER),
        (batch(timed, sent_at="yesterday"), f"?_={milliseconds}", corrected),
        (batch({**timed, "properties": {"$ignore_sent_at": True}}, sent_at=late.isoformat()), "", EARLIER),
    ):
        _, sink = await ask(body, "/batch/" + query)
        (event,) = sink.events
        assert (event.timestamp, event.given) == (expected, "2026-11-23T11:00:00Z")


async def test_what_is_recorded_of_a_request() -> None:
    """An event carries its request's headers, `sent_at` and historical flag."""
    body = batch(EVENT, sent_at="2026-11-23T12:00:00Z", historical_migration=True)
    _, sink = await ask(body, headers={"User-Agent": "capture-agent/1"})
    (event,) = sink.events
    assert (event.sent_at, event.historical_migration) == (NOW, True)
    assert event.headers["user-agent"] == "capture-agent/1"


# Misbehaviour.


@pytest.mark.parametrize("status", [200, 302, 401, 402, 403, 404, 408, 413, 429, 500, 502, 503, 504])
async def test_a_fixed_status(status: int) -> None:
    """Told a status, it answers every request with that and takes nothing."""
    response, sink = await ask(PLAIN, sink=Sink(status=status))
    assert (response.status_code, sink.taken) == (status, 0)
    assert sink.statuses == {status: 1}


async def test_a_share_of_failures() -> None:
    """At a fail rate, about that share of the requests is a 503, and only the others are taken."""
    sink = Sink(fail_rate=0.3, random=Random(7))
    async with serving(sink) as url, httpx.AsyncClient(verify=NO_TLS) as client:
        for _ in range(100):
            await client.post(url + "/batch", content=PLAIN)
    assert 15 <= sink.statuses[503] <= 45
    assert sink.taken == sink.statuses[200] == 100 - sink.statuses[503]


async def test_rejection_by_a_property() -> None:
    """A batch with an event that has the property is a 400 as a whole, any other is taken."""
    sink = Sink(reject_if=("n", "7"))
    events = [{**EVENT, "properties": {"n": n}} for n in (7, "8", [7])]
    async with serving(sink) as url, httpx.AsyncClient(verify=NO_TLS) as client:
        assert (await client.post(url + "/batch", content=batch(*events))).status_code == 400
        assert sink.taken == 0
        assert (await client.post(url + "/batch", content=batch(*events[1:]))).status_code == 200
    assert sink.taken == 2


async def test_latency() -> None:
    """Told a latency, it answers no sooner."""
    began = trio.current_time()
    await ask(PLAIN, sink=Sink(latency=0.05))
    assert trio.current_time() - began >= 0.05


async def test_a_script_sees_the_request_and_may_answer_it() -> None:
    """A script gets the facts of each request, and its reply is sent as it is."""
    seen: list[Request] = []

    def script(request: Request) -> Reply | None:
        seen.append(request)
        return Reply(429, b"later", {"retry-after": "3"}) if request.number == 1 else None

    sink = Sink(script=script)
    async with serving(sink) as url, httpx.AsyncClient(verify=NO_TLS) as client:
        first = await client.post(url + "/batch/?ver=1", content=PLAIN, headers={"X-Mine": "yes"})
        second = await client.post(url + "/batch/", content=PLAIN)
    assert (first.status_code, first.text, first.headers["retry-after"]) == (429, "later", "3")
    assert (second.status_code, sink.taken, sink.statuses) == (200, 1, {429: 1, 200: 1})
    assert (seen[0].method, seen[0].path, seen[0].query, seen[0].body) == ("POST", "/batch/", "ver=1", PLAIN)
    assert seen[0].headers["x-mine"] == "yes"


@pytest.mark.parametrize(("whim", "taken"), [(Fault.HANG_UP, 0), (Afterwards(Fault.HANG_UP), 1)])
async def test_a_connection_that_ends_without_an_answer(whim: Fault | Afterwards, taken: int) -> None:
    """A script can end the connection before or after the events are taken; the client sees no answer."""
    sink = Sink(script=lambda _: whim)
    async with serving(sink) as url, httpx.AsyncClient(verify=NO_TLS) as client:
        with pytest.raises(httpx.TransportError):
            await client.post(url + "/batch", content=PLAIN)
    assert (sink.taken, sink.statuses) == (taken, {0: 1})


async def test_events_taken_behind_an_error() -> None:
    """A script can let events be taken and still have the client see an error."""
    response, sink = await ask(PLAIN, sink=Sink(script=lambda _: Afterwards(Reply(504, b"gateway"))))
    assert (response.status_code, sink.taken) == (504, 1)


async def test_a_stalled_answer_ends_with_the_client() -> None:
    """A stalled request is held until its client gives up, and holds up neither others nor the end."""
    sink = Sink(script=lambda request: Fault.STALL if request.number == 1 else None)
    with trio.fail_after(5):
        async with serving(sink, grace=60) as url, httpx.AsyncClient(verify=NO_TLS) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(url + "/batch", content=PLAIN, timeout=0.1)
            assert (await client.post(url + "/batch", content=PLAIN)).status_code == 200


async def test_a_script_can_hold_a_request() -> None:
    """A request that is made to wait for an event is then judged as ever."""
    gate = trio.Event()
    sink = Sink(script=lambda _: gate)
    async with (
        serving(sink) as url,
        httpx.AsyncClient(verify=NO_TLS) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(lambda: client.post(url + "/batch", content=PLAIN))
        while sink.requests == 0:
            await trio.lowlevel.checkpoint()
        assert sink.taken == 0
        gate.set()
        await sink.wait_for(1)


async def test_a_body_that_stalls_is_a_408() -> None:
    """A client that stops in the middle of its body gets a 408."""
    sink = Sink(body_patience=0.05)
    async with serving(sink) as url:
        stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
        async with stream:
            await stream.send_all(b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            answer = b"".join([piece async for piece in stream])
    assert answer.startswith(b"HTTP/1.1 408")
    assert answer.endswith(b"client stopped sending data")


async def test_a_client_that_leaves_is_counted() -> None:
    """A connection that ends in the middle of a body takes nothing and counts as no answer."""
    sink = Sink()
    async with serving(sink) as url:
        async with await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2])) as stream:
            await stream.send_all(b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await sink.wait_until(lambda: sink.statuses[0] == 1)
    assert sink.taken == 0


# Memory and waiting.


async def test_memory_is_bounded() -> None:
    """Only the newest events are kept, all are counted, and so are requests and bytes."""
    sink = Sink(keep=3)
    async with serving(sink) as url, httpx.AsyncClient(verify=NO_TLS) as client:
        for n in range(4):
            await client.post(
                url + "/batch", content=batch(*[{**EVENT, "event": f"{n}-{i}"} for i in range(2)])
            )
        with trio.fail_after(5):
            await sink.wait_for(8)
    assert [event.event for event in sink.events] == ["2-1", "3-0", "3-1"]
    assert (sink.taken, sink.requests, sink.statuses) == (8, 4, {200: 4})
    assert sink.received == 4 * len(batch({**EVENT, "event": "0-0"}, {**EVENT, "event": "0-1"}))


async def test_arrivals_come_in_lots() -> None:
    """Whoever listens gets every event that was kept, once and in order, to the last."""
    sink = Sink()
    heard: list[str] = []
    async with (
        serving(sink) as url,
        httpx.AsyncClient(verify=NO_TLS) as client,
        trio.open_nursery() as nursery,
    ):

        async def listen() -> None:
            async for events in sink.arrivals():
                heard.extend(event.event for event in events)

        nursery.start_soon(listen)
        for n in range(3):
            await client.post(
                url + "/batch", content=batch(*[{**EVENT, "event": f"{n}-{i}"} for i in range(2)])
            )
        sink.end()
    assert heard == [f"{n}-{i}" for n in range(3) for i in range(2)]


# The command.

COMMAND = [sys.executable, "-c", "from agent.cli.sink import command; command()"]


def _run(
    *arguments: str, talk: Callable[[str], None], stop: signal.Signals = signal.SIGINT
) -> tuple[int, str, str]:
    """Run the command on a free port, talk to it, stop it; exit code and output without the first line."""
    with subprocess.Popen(
        [*COMMAND, "--listen", "127.0.0.1:0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = (process.stderr if "--json" in arguments else process.stdout).readline()
        found = re.search(r"http://\S+:\d+", first)
        assert found is not None, first + process.stderr.read()
        talk(found[0])
        lines = [] if "--quiet" in arguments else [process.stdout.readline()]
        process.send_signal(stop)
        rest, errors = process.communicate(timeout=10)
    return process.returncode, "".join(lines) + rest, errors


def _post(url: str) -> None:
    assert httpx.post(url + "/batch", content=batch({**EVENT, "event": "sign\x1b[2Jup"})).status_code == 200


def test_the_command_prints_what_it_takes() -> None:
    """Each event is a line that no terminal can mistake for commands, and a signal ends with a summary."""
    code, out, _ = _run(talk=_post)
    line, summary = out.splitlines()
    assert "sign\\x1b[2Jup  user-1  phc_key  " in line
    assert '{"plan":"pro"}' in line
    assert summary.startswith("took 1 events in 1 requests")
    assert code == 0


def test_the_command_prints_ndjson() -> None:
    """With --json stdout is nothing but events, one JSON object a line."""
    code, out, errors = _run("--json", talk=_post, stop=signal.SIGTERM)
    assert [json.loads(line)["uuid"] for line in out.splitlines()] == [UUID7]
    assert "took 1 events" in errors
    assert code == 0


def test_the_command_misbehaves_as_told() -> None:
    """Status, latency and rejection are given on the command line."""

    def talk(url: str) -> None:
        assert httpx.post(url + "/batch", content=PLAIN).status_code == 503

    code, out, _ = _run(
        "--quiet", "--status", "503", "--latency", "10ms", "--reject-if", "plan=pro", talk=talk
    )
    assert (code, out) == (0, f"took 0 events in 1 requests ({len(PLAIN)} bytes); answers: 503: 1\n")


def test_an_address_in_use_is_an_error_with_a_hint() -> None:
    """A taken address ends with exit code 1 and says what to do; a mistyped option is a usage error."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        done = subprocess.run(
            [*COMMAND, "--listen", taken],
            capture_output=True,
            text=True,
            timeout=10,
            env=os.environ,
            check=False,
        )
    assert done.returncode == 1
    assert taken in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [*COMMAND, "--listen", "nowhere"], capture_output=True, text=True, timeout=10, check=False
    )
    assert done.returncode == 2
