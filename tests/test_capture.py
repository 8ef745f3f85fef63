"""Bodies of PostHog's SDKs: every event becomes a line that the door understands, and PostHog agrees."""

import gzip
import json
import tracemalloc
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.decode.capture import answer, read_request
from agent.decode.request import Answer, Posted, Request
from agent.decode.shards import Shards, shatter
from agent.events import Instant, Read
from agent.pack import inflate
from agent.sink import payload
from agent.sink.judge import judge
from agent.vouch import Decoded, Door, Rules

WALL = 1_795_000_000_123_456
AT = Instant(WALL, 1, "boot")
NOW = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=WALL)
EVENT = {"event": "e", "distinct_id": "d", "properties": {"$lib": "posthog-python", "n": 1}}
DOOR = Door(
    Rules(
        source="sdk",
        project="default",
        properties={},
        distinct_id="",
        max_event=100_000,
        max_batch_events=1000,
        max_batch_size=2**20,
    )
)


def asked(body: object, path: str = "/batch/", query: str = "", *, near: bool = False) -> Posted | Answer:
    packed = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_request(Request(path, query, {}, packed, AT, 2**20, near))


def posted(body: object, path: str = "/batch/", query: str = "", *, near: bool = False) -> Posted:
    found = asked(body, path, query, near=near)
    assert isinstance(found, Posted), found
    assert found.lines.count(b"\n") == found.events
    return found


def lines(found: Posted) -> list[dict[str, Any]]:
    return [json.loads(line) for line in found.lines.splitlines()]


def vouched(found: Posted) -> tuple[Decoded, list[dict[str, Any]]]:
    decoded = DOOR.vouch([Read(found.lines, AT)], 12345)
    events: list[dict[str, Any]] = []
    for chunk in decoded.chunks:
        events += json.loads(b"[" + inflate(chunk.packed, chunk.size, chunk.crc) + b"]")
    return decoded, events


def one(event: dict[str, Any], path: str = "/e/", query: str = "", *, near: bool = False) -> dict[str, Any]:
    """What a lone event becomes."""
    [found] = lines(posted({"token": "phc_a", **event}, path, query, near=near))
    return found


@pytest.mark.parametrize(
    ("body", "key", "count"),
    [
        ({"api_key": "phc_a", "batch": [EVENT, EVENT]}, "phc_a", 2),
        ({"token": " phc_a\n", "batch": [EVENT]}, "phc_a", 1),
        ({"batch": [{**EVENT, "token": "phc_a"}]}, "phc_a", 1),
        ([{**EVENT, "token": "phc_a"}, {**EVENT, "api_key": "phc_a"}, EVENT], "phc_a", 3),
        ([{**EVENT, "properties": {"token": "phc_a"}}], "phc_a", 1),
        ({**EVENT, "$token": "phc_a"}, "phc_a", 1),
    ],
)
def test_shapes_and_keys(body: object, key: str, count: int) -> None:
    """Each shape gives its key and its events in order."""
    found = posted(body)
    assert (found.key, found.events) == (key, count)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "request missing data payload"),
        (b"nonsense", 400, "failed to parse request: "),
        (b'{"api_key":"a","batch":[', 400, "failed to parse request: "),
        (b"[" * 5000, 400, "failed to parse request: "),
        (b'"text"', 400, "failed to parse request: data did not match any variant"),
        ({"api_key": "a", "batch": {}}, 400, "failed to parse request: data did not match any variant"),
        ({"api_key": "a", "batch": []}, 400, "request holds no event"),
        ([], 400, "request holds no event"),
        ({"batch": [EVENT]}, 401, "event submitted without an api_key"),
        (EVENT, 401, "event submitted without an api_key"),
        (
            [{**EVENT, "token": "a"}, {**EVENT, "token": "b"}],
            401,
            "batch submitted with inconsistent api_key",
        ),
        ({"api_key": " ", "batch": [EVENT]}, 401, "API key is not valid: empty"),
        ({"api_key": "a" * 65, "batch": [EVENT]}, 401, "API key is not valid: too_long"),
        ({"api_key": "ü", "batch": [EVENT]}, 401, "API key is not valid: not_ascii"),
        ({"api_key": "phx_a", "batch": [EVENT]}, 401, "API key is not valid: personal_api_key"),
        ({"api_key": "a\0b", "batch": [EVENT]}, 401, "API key is not valid: null_byte"),
    ],
)
def test_what_is_refused_as_a_whole(body: Any, status: int, text: str) -> None:
    """In PostHog's words."""
    found = asked(body)
    assert isinstance(found, Answer)
    assert (found.status, found.text.decode()[: len(text)]) == (status, text)
    if found.events:
        assert found.reason == {400: "malformed_json", 401: "unknown_key"}[status]
    else:
        assert body in (b"", []) or not body["batch"]  # there was nothing to lose


def test_ordinary_events_pass_as_they_came() -> None:
    """Not a byte of them is touched, but for newlines between the fields."""
    raw = b'{"event" : "e",\t"distinct_id":7, "properties":{"a":1.0, "a":"\\u00fc"} ,"unknown":[1]}'
    assert posted(b'{"batch":[' + raw + b" , " + raw + b'],"api_key":"a"}').lines == raw + b"\n" + raw + b"\n"
    spread = raw.replace(b"\t", b"\n")
    assert posted(b'{"batch":[' + spread + b'],"api_key":"a"}').lines == raw.replace(b"\t", b" ") + b"\n"


@pytest.mark.parametrize(
    ("fields", "who"),
    [
        ({"distinct_id": "a", "$distinct_id": "b"}, "a"),
        ({"$distinct_id": "b"}, "b"),
        ({"distinct_id": None, "properties": {"distinct_id": "c"}}, "c"),
        ({"properties": {"distinct_id": 7}}, 7),
        ({"distinct_id": ["x", 1]}, '["x",1]'),
        ({"distinct_id": {"b": 1, "a": [None]}}, '{"a":[null],"b":1}'),
        ({"distinct_id": True}, "true"),
    ],
)
def test_ids_under_other_names(fields: dict[str, Any], who: object) -> None:
    """The id is the one that PostHog would take."""
    assert one({"event": "e", **fields})["distinct_id"] == who


def test_engage_needs_no_name() -> None:
    """Elsewhere it does, says the door."""
    person = {"$distinct_id": "d", "$set": {"a": 1}}
    assert one(person, "/engage/")["event"] == "$identify"
    assert "event" not in one(person)


def stamp(seconds: float) -> str:
    return (NOW + timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize(
    ("sent", "query", "fields", "seconds"),
    [
        (None, "", {"timestamp": stamp(-60)}, -60),
        (stamp(0.9), "", {"timestamp": stamp(-60)}, -60),  # no more than a slow request
        (stamp(100), "", {"timestamp": stamp(40)}, -60),
        (stamp(-100), "", {"timestamp": stamp(-160)}, -60),
        (stamp(100), "", {"timestamp": stamp(40), "properties": {"$ignore_sent_at": True}}, 40),
        (stamp(100), "", {"timestamp": stamp(40), "properties": {"$ignore_sent_at": False}}, -60),
        ("nonsense", f"_={WALL // 1000 + 100_000}", {"timestamp": stamp(40)}, -60),
        (None, f"_={WALL // 1_000_000 + 100}", {"timestamp": stamp(40)}, 40),  # seconds are ignored
        (None, "_=99999999999999999999", {"timestamp": stamp(40)}, 40),
        (None, "", {"offset": 60_000}, -60),
        (stamp(100), "", {"offset": 60_000, "timestamp": stamp(1)}, -60),
        (stamp(100), "", {"offset": "x", "timestamp": stamp(40)}, -60),
    ],
)
def test_a_client_with_another_clock(
    sent: str | None, query: str, fields: dict[str, Any], seconds: float
) -> None:
    """Its events happened when PostHog would say that they did."""
    body = {"api_key": "a", "batch": [{**EVENT, **fields}], **({"sent_at": sent} if sent else {})}
    [event] = vouched(posted(body, "/batch/", query))[1]
    told = datetime.fromisoformat(event["timestamp"])
    assert abs(told - NOW - timedelta(seconds=seconds)) < timedelta(milliseconds=1)


def test_an_event_with_an_address_of_its_own_is_looked_up() -> None:
    """What comes from this host has no place, unless it brings one."""
    mine = {**EVENT, "properties": {"$ip": "1.2.3.4"}}
    assert one(mine, near=True)["properties"] == {"$geoip_disable": False, "$ip": "1.2.3.4"}
    assert one(mine)["properties"] == {"$ip": "1.2.3.4"}
    other = {**EVENT, "properties": {"$ip": "1.2.3.4", "$geoip_disable": True}}
    assert one(other, near=True)["properties"] == other["properties"]
    assert lines(posted({"api_key": "a", "batch": [mine, EVENT]}, near=True))[1] == EVENT


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("blank", [None, ""])
def test_a_blank_address_is_none(blank: str | None, *, near: bool) -> None:
    """The event is taken as one that says nothing of its address, alone or in a batch."""
    blanked = {**EVENT, "properties": {"$ip": blank, "n": 1, "$geoip_disable": False}}
    bare = {**EVENT, "properties": {"n": 1, "$geoip_disable": False}}
    assert one(blanked, near=near) == {**bare, "token": "phc_a"}
    found = posted({"api_key": "a", "batch": [blanked, EVENT]}, near=near)
    assert (lines(found), found.placed) == ([bare, EVENT], False)


def test_what_needs_nothing_added_is_told() -> None:
    """Only where each event says itself whether it may be looked up, at the place where that counts."""
    told = {**EVENT, "properties": {"$geoip_disable": False}}
    for events, placed in (
        ([told, told], True),
        ([told, EVENT], False),
        ([told, {**EVENT, "properties": {"a": {"$geoip_disable": True}}}], False),
        ([told, {**EVENT, "$geoip_disable": True}], False),
        ([told, {"event": "e", "distinct_id": "d"}], False),
        ([told, {**EVENT, "properties": {"$geoip_disable": None}}], False),
    ):
        found = posted({"api_key": "a", "batch": events}, near=True)
        assert (lines(found), found.placed) == (events, placed)


def test_what_is_told_of_the_request() -> None:
    """Whether it is history, and whether it wants an empty answer."""
    found = posted({"api_key": "a", "batch": [EVENT], "historical_migration": True}, query="beacon=1")
    assert (found.historical, found.beacon) == (True, True)
    found = posted({"api_key": "a", "batch": [EVENT]}, query="beacon=2")
    assert (found.historical, found.beacon) == (False, False)


GOOD = b'{"event":"e","distinct_id":"d","properties":{"t":"]}\\\\"}}'
BAD = [
    b'{"event":"e","distinct_id":"d","properties":{"n":NaN}}',
    b'{"event":"e","distinct_id":"d","properties":{"n":-Infinity,"x":[{}]}}',
    b'{"event":"\\ud83d","distinct_id":"d"}',
    b'{"event":"e","distinct_id":"d","properties":{"n":1e9999}}}'[:-1],
    b'{"event":"e","distinct_id":"d","properties":' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"event":"a\nb","distinct_id":"d"}',
    b'{"event":"\xff","distinct_id":"d"}',
    b'{"event":""}',
    b'{"event":"e"}',
    b"[]",
    b"null",
    b"Infinity",
    b"{}",
    b"{'event':'e'}",
]


@pytest.mark.parametrize("wrapped", [b'{"sent_at":null,"batch":[%b],"api_key":"a"}', b"[%b]"])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_event_takes_no_other_with_it(bad: bytes, wrapped: bytes) -> None:
    """The door refuses it alone, whatever is wrong with it."""
    good = GOOD if b"api_key" in wrapped else GOOD[:-1] + b',"token":"a"}'
    found = posted(wrapped % b", ".join([good, bad, good]))
    assert (found.key, found.events) == ("a", 3)
    decoded, events = vouched(found)
    if b"1e9999" not in bad:  # for the door a number is a number
        assert [reject.line for reject in decoded.rejects] == [1]
        assert [event["properties"] for event in events] == [{"t": "]}\\"}] * 2
        assert answer(found, {1: decoded.rejects[0].reason}).status == 200


@pytest.mark.parametrize(
    ("reasons", "status", "text"),
    [
        ([], 200, b'{"status":"Ok"}'),
        (["missing_event", "too_deep"], 400, b"event submitted with an empty event name"),
        (["too_deep"], 200, b'{"status":"Ok"}'),
        (["too_deep", "bad_uuid"], 400, b"failed to parse request: data did not match"),
        (["too_large", "bad_uuid"], 413, b"maximum event size exceeded"),
        (["filtered", "sampled"], 200, b'{"status":"Ok"}'),
        (["rate_limited", "bad_uuid"], 429, b"rate limited"),
        (["buffer_full"], 503, b"transient error, please retry"),
    ],
)
def test_answers(reasons: list[str], status: int, text: bytes) -> None:
    """A client is told the worst only where nothing was taken, and to come again where that helps."""
    told = answer(posted({"api_key": "a", "batch": [EVENT, EVENT]}), dict(enumerate(reasons)))
    assert (told.status, told.text[: len(text)], told.again) == (status, text, status in (429, 503))


def test_a_beacon_is_answered_without_a_body() -> None:
    """Where its events were taken."""
    found = posted({"api_key": "a", "batch": [EVENT]}, query="beacon=1")
    assert answer(found, {}) == Answer(204)
    assert answer(found, {0: "bad_uuid"}).status == 400


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"batch":[', b'{"batch":[{}', b'["', b'{"a":[1]}', b"[" * 10, b"}]" * 10, b'"[]', b'["]'],
)
def test_brackets_without_sense(text: bytes) -> None:
    """Nothing is made up."""
    assert shatter(text) == "malformed_json"


LAST = GOOD.replace(b'"d"', b'"last"')


@pytest.mark.parametrize(
    "events",
    [
        GOOD + b',{"event":"d","distinct_id":"u","properties":{"a":1},' + LAST,
        GOOD + b',{"event":"d","distinct_id":"u","properties":{"a":{"b":1} , ' + LAST,
        GOOD + b',{"event":"d","distinct_id":"u","properties":{"a":[{"b":[1}]}},' + LAST,
        GOOD + b',{"event":"d","distinct_id":"u"}},' + LAST,
        GOOD + b"," + LAST + b',{"event":"d","distinct_id":"u","properties":{"a":1}',
        b'{"event":"d","distinct_id":"u","properties":{"a":1},' + GOOD + b"," + LAST,
        GOOD + b',{"event":"d","distinct_id":"u","properties":{"a":' + b"[" * 120_000 + b"1}}," + LAST,
        GOOD + b',{"event":"d","distinct_id":"u","properties":' + b'{"a":' * 99_999 + b"1," + LAST,
        GOOD + b",[1}," + LAST,
        GOOD + b",nonsense," + LAST,
    ],
)
def test_a_bracket_that_is_missing_takes_no_other_event_with_it(events: bytes) -> None:
    """Nor one too many: where the next event begins, the text tells all the same."""
    found = posted(b'{"api_key":"a","batch":[%b],"sent_at":null}' % events)
    took = [event["distinct_id"] for event in vouched(found)[1]]
    assert [who for who in took if who != "u"] == ["d", "last"]


@pytest.mark.parametrize("body", [b"[%b]", b'{"api_key":"a","batch":[%b]}', b"%b"])
@pytest.mark.parametrize(
    "nested", [b"[" * 120_000 + b"]" * 120_000, b'{"a":' * 99_999 + b"1" + b"}" * 99_999]
)
def test_no_answer_speaks_of_recursion(body: bytes, nested: bytes) -> None:
    """The event is refused for what it is, or the request in PostHog's words."""
    found = asked(body % (b'{"event":"e","distinct_id":"d","token":"a","properties":%b}' % nested))
    if isinstance(found, Answer):
        assert found.text in (
            b"failed to parse request: data did not match any variant of untagged enum RawRequest",
            b"event submitted without an api_key",
        )
    else:
        assert vouched(found)[0].tally.rejected == {"too_large": 1}


@given(
    st.lists(
        st.dictionaries(
            st.text('a"\\[{', max_size=3),
            st.recursive(st.text('"]},', max_size=3), st.lists, max_leaves=8),
            max_size=4,
        ),
        max_size=6,
    ),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_what_is_whole_is_found_as_it_is(
    events: list[dict[str, object]], array: bool, indent: int | None
) -> None:
    """The events of a body that is JSON are those that JSON has."""
    body = events if array else {"b": {"batch": [1]}, "batch": events, "c": []}
    shards = shatter(json.dumps(body, indent=indent).encode())
    assert isinstance(shards, Shards)
    assert [json.loads(event) for event in shards.events] == events
    assert json.loads(shards.root) == ([] if array else {**body, "batch": []})  # type: ignore[dict-item]


def dense(events: int) -> list[bytes]:
    """Events of sixty numbers each."""
    fields = {**EVENT, "properties": {f"p{number}": number for number in range(60)}}
    return [json.dumps(fields).encode()] * events


@pytest.mark.parametrize("bad", [b"", b'{"event":"e","distinct_id":"d","properties":{"n":NaN}},'])
@pytest.mark.parametrize("wrapped", [b'{"api_key":"a","batch":[%b]}', b"[%b]"])
def test_many_dense_events_are_taken(bad: bytes, wrapped: bytes) -> None:
    """A body of 6 MB with half a million values, and with a bad one among them all but that."""
    events = dense(9000)
    events[0] = events[0][:-1] + b',"token":"a"}'
    body = wrapped % (bad + b",".join(events))
    found = read_request(Request("/batch/", "", {}, body, AT, 20 * 2**20))
    assert isinstance(found, Posted)
    assert found.lines.splitlines()[-9000:] == events
    assert found.events == 9000 + bool(bad)


def test_one_event_may_hold_many_values() -> None:
    """A lone one is no list of events; the door says whether it is too large."""
    lone = json.dumps({**EVENT, "token": "a", "properties": {"all": [1] * 300_000}}).encode()
    found = posted(lone)
    assert (found.key, found.events, found.lines) == ("a", 1, lone + b"\n")


@pytest.mark.parametrize("wrapped", [b'{"api_key":"a","batch":[%b]}', b"[%b]"])
@pytest.mark.parametrize("many", [b"{}," * 300_000, b"[" * 2_100_000, b"{NaN}," * 300_000])
def test_too_many_events_or_brackets_are_refused(wrapped: bytes, many: bytes) -> None:
    """As too large, whatever else is wrong with them, and counted as one: nobody knows how many there are."""
    found = read_request(Request("/batch/", "", {}, wrapped % many, AT, 20 * 2**20))
    assert isinstance(found, Answer)
    assert (found.status, found.reason, found.events) == (413, "too_large", 1)


def test_a_million_values_that_are_no_events_cost_nothing() -> None:
    """All between two events is one that is refused."""
    body = b'{"api_key":"a","batch":[' + b"1," * 1_000_000 + b"1]}"
    tracemalloc.start()
    found = read_request(Request("/batch/", "", {}, body, AT, 20 * 2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found, Posted)
    assert (found.events, peak < 8 * len(body)) == (1, True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
# What PostHog and we read alike; its stand-in reads fewer forms of time than the door.
FIELDS = st.fixed_dictionaries(
    {"event": st.text("abc", min_size=1, max_size=5)},
    optional={
        "distinct_id": JSON,
        "properties": st.fixed_dictionaries(
            {"a": JSON}, optional={"distinct_id": JSON, "$ignore_sent_at": st.booleans()}
        ),
        "timestamp": st.floats(-(10**6), 10**4).map(stamp) | st.just(stamp(0)),
        "offset": st.integers(0, 10**7),
        "uuid": st.uuids().map(str),
        "$set": st.dictionaries(st.text(max_size=3), JSON, max_size=2),
    },
)


@given(
    st.lists(FIELDS, min_size=1, max_size=4),
    st.none() | st.sampled_from([stamp(500), stamp(-500.25)]),
    st.sampled_from(["/batch/", "/e", "/engage"]),
    st.booleans(),
)
def test_posthog_agrees(events: list[dict[str, Any]], sent: str | None, path: str, array: bool) -> None:
    """What its strict stand-in takes is taken, with the same name, id, uuid and instant."""
    body: object = {"api_key": "a", "batch": events, **({"sent_at": sent} if sent else {})}
    if array:
        body = [{**event, "token": "a"} for event in events]
    packed = gzip.compress(json.dumps(body).encode())
    request = payload.Request(number=1, method="POST", path=path, query="", headers={}, body=packed)
    reply, theirs = judge(request, NOW, lambda _: 0)
    decoded, ours = vouched(posted(packed, path))
    if reply.status != 200:
        assert decoded.rejects
        return
    assert not decoded.rejects
    assert len(theirs) == len(ours)
    for their, our in zip(theirs, ours, strict=True):
        who = our["distinct_id"].replace("\0", "\ufffd")  # which PostHog does once it has it
        assert (their.event, their.distinct_id) == (our["event"], who)
        assert abs(their.timestamp - datetime.fromisoformat(our["timestamp"])) < timedelta(milliseconds=1)
        assert "uuid" not in events[ours.index(our)] or their.uuid == our["uuid"]


@given(
    st.binary(max_size=60)
    | st.text('{}[]",:\\ batchevn\n', max_size=60).map(str.encode)
    | JSON.map(lambda value: json.dumps({"api_key": "a", "batch": [value]}).encode())
    | JSON.map(lambda value: json.dumps(value).encode())
)
def test_nothing_raises(body: bytes) -> None:
    """Whatever a client sends becomes lines that the door judges, or a refusal."""
    found = asked(body)
    if isinstance(found, Posted):
        assert vouched(found)[0].tally.received == found.events


def test_a_batch_of_an_sdk_is_quick() -> None:
    """The ordinary way is taken: a hundred events take a fraction of a millisecond."""
    event = {**EVENT, "timestamp": stamp(0), "uuid": "00000000-0000-4000-8000-000000000000"}
    request = Request(
        "/batch/", "", {}, json.dumps({"api_key": "a", "batch": [event] * 100}).encode(), AT, 2**20
    )
    for _ in range(100):
        read_request(request)


def test_who_has_little_time_looks_at_few_brackets() -> None:
    """Each is looked at by itself: what has more of them is told as too large, and may be read elsewhere."""
    body = b"[" * 50_000
    request = Request("/batch/", "", {}, body, AT, 2**20)
    found = [read_request(request._replace(brackets=most)) for most in (10_000, 100_000)]
    assert [isinstance(one, Answer) and one.status for one in found] == [413, 400]
