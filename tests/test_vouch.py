"""The door: what is let in, what is refused and why, and that nobody pays for a neighbour."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from agent.events import GIVEN, LONG, SENDER, Cut, Denied, Instant, Origin, Read, Reject
from agent.pack import inflate
from agent.sink.judge import judge
from agent.sink.payload import Request
from agent.vouch import Decoded, Door, Rules

WALL = 1_795_000_000_123_456
AT = Instant(WALL, 1, "boot")
NOW = datetime.fromtimestamp(WALL / 1e6, UTC)
OURS = {"$lib": "capture-agent", "site": "berlin"}
UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def door(**changes: Any) -> Door:
    rules = Rules(
        source="app",
        project="default",
        properties=OURS,
        distinct_id="",
        max_event=10_000,
        max_batch_events=1000,
        max_batch_size=5 * 2**20,
    )
    return Door(msgspec.structs.replace(rules, **changes))


DOOR = door()


def events_of(decoded: Decoded) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for chunk in decoded.chunks:
        events = json.loads(b"[" + inflate(chunk.packed, chunk.size, chunk.crc) + b"]")
        assert len(events) == chunk.events
        found += events
    return found


def vouch(*lines: bytes, by: Door = DOOR) -> Decoded:
    return by.vouch([Read(b"".join(line + b"\n" for line in lines), AT)], 12345)


def one(fields: dict[str, Any], by: Door = DOOR) -> dict[str, Any]:
    """What one event becomes."""
    decoded = vouch(json.dumps({"event": "e", "distinct_id": "d", **fields}).encode(), by=by)
    assert not decoded.rejects, decoded.rejects
    [event] = events_of(decoded)
    return event


def reason(line: bytes, by: Door = DOOR) -> str:
    """Why one line is refused."""
    decoded = vouch(line, by=by)
    [reject] = decoded.rejects
    assert not decoded.chunks
    assert decoded.tally.rejected == {reject.reason: 1}
    return reject.reason


# --- what an event becomes -------------------------------------------------------------------------


def test_a_plain_event() -> None:
    """It is given a uuid, the time of receipt, and the source's properties; its own stay as they are."""
    event = one({"properties": {"a": 1.50, "$x": None}})
    assert UUID7.fullmatch(event.pop("uuid"))
    assert event == {
        "event": "e",
        "distinct_id": "d",
        "timestamp": NOW.isoformat(timespec="microseconds")[:-6] + "Z",
        "properties": {**OURS, "a": 1.5, "$x": None},
    }


@pytest.mark.parametrize(
    ("given_id", "told"),
    [("user", "user"), (5, "5"), (0, "0"), (1.5, "1.5"), ("x" * 300, "x" * 200), ("ü" * 201, "ü" * 200)],
)
def test_distinct_ids(given_id: object, told: str) -> None:
    """A number is its text, a long one is cut at 200 characters."""
    assert one({"distinct_id": given_id})["distinct_id"] == told


def test_cuts_are_counted() -> None:
    """An event with a name or an id cut is counted once."""
    decoded = vouch(json.dumps({"event": "n" * 201, "distinct_id": "d" * 201}).encode())
    [event] = events_of(decoded)
    assert (len(event["event"]), len(event["distinct_id"])) == (200, 200)
    assert decoded.tally.truncated == 1


@pytest.mark.parametrize("who", [{}, {"distinct_id": None}, {"distinct_id": ""}])
def test_the_sources_distinct_id_is_for_events_without_one(who: dict[str, Any]) -> None:
    """An event that has none gets the source's."""
    line = json.dumps({"event": "e", **who}).encode()
    [event] = events_of(vouch(line, by=door(distinct_id="host-7")))
    assert event["distinct_id"] == "host-7"


def test_an_events_own_value_wins() -> None:
    """A source's property is a default, however the event writes the key."""
    for key in ('"site"', '"s\\u0069te"', '"\\u0073ite"'):
        line = b'{"event":"e","distinct_id":"d","properties":{%b:"own"}}' % key.encode()
        [event] = events_of(vouch(line))
        assert event["properties"]["site"] == "own"
        assert event["properties"]["$lib"] == "capture-agent"
        [text] = [inflate(chunk.packed, chunk.size, chunk.crc) for chunk in vouch(line).chunks]
        assert text.count(b"berlin") == 0


@pytest.mark.parametrize(
    ("given_time", "told"),
    [
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05.000000Z"),
        ("2026-01-02T03:04:05.678901+02:00", "2026-01-02T01:04:05.678901Z"),
        ("2026-01-02T03:04:05", "2026-01-02T03:04:05.000000Z"),
        ("2026-01-02", "2026-01-02T00:00:00.000000Z"),
        (1_767_323_045, "2026-01-02T03:04:05.000000Z"),
        (1_767_323_045.5, "2026-01-02T03:04:05.500000Z"),
        (1_767_323_045_678, "2026-01-02T03:04:05.678000Z"),
        (0, "1970-01-01T00:00:00.000000Z"),
    ],
)
def test_timestamps(given_time: object, told: str) -> None:
    """RFC 3339 with any offset or none, seconds, milliseconds: all become UTC."""
    event = one({"timestamp": given_time})
    assert event["timestamp"] == told
    assert "$agent_timestamp" not in event["properties"]


@pytest.mark.parametrize(
    "odd", ["yesterday", "", "1969-12-31T23:59:59Z", "10000-01-01", -1, 1e300, True, [1], {"a": 1}]
)
def test_times_that_cannot_be_read(odd: object) -> None:
    """The time of receipt stands in, what was given is kept, and it is counted."""
    line = json.dumps({"event": "e", "distinct_id": "d", "timestamp": odd}).encode()
    decoded = vouch(line)
    [event] = events_of(decoded)
    assert event["timestamp"].startswith(NOW.isoformat(timespec="milliseconds")[:-6])
    assert "$agent_timestamp" in event["properties"]
    assert decoded.tally.restamped == 1


@pytest.mark.parametrize(
    ("given_uuid", "told"),
    [
        ("0197A5C0-7e1c-7abc-8def-0123456789ab", "0197A5C0-7e1c-7abc-8def-0123456789ab"),
        ("0197a5c07e1c7abc8def0123456789ab", "0197a5c0-7e1c-7abc-8def-0123456789ab"),
        ("{0197a5c0-7e1c-7abc-8def-0123456789ab}", "0197a5c0-7e1c-7abc-8def-0123456789ab"),
        ("urn:uuid:0197a5c0-7e1c-7abc-8def-0123456789ab", "0197a5c0-7e1c-7abc-8def-0123456789ab"),
    ],
)
def test_an_events_own_uuid_is_kept(given_uuid: str, told: str) -> None:
    """In its usual form byte for byte, else in the usual form."""
    assert one({"uuid": given_uuid})["uuid"] == told


def test_roots_are_folded_into_properties() -> None:
    """`$set`, `$set_once` and `$groups` of the root go where v1 reads them; an existing key wins."""
    event = one(
        {
            "$set": {"a": 1, "b": 2},
            "$set_once": {"c": 3},
            "$groups": {"company": "x"},
            "properties": {"$set": {"b": "own"}},
        }
    )
    assert event["properties"]["$set"] == {"a": 1, "b": "own"}
    assert event["properties"]["$set_once"] == {"c": 3}
    assert event["properties"]["$groups"] == {"company": "x"}
    assert not {"$set", "$set_once", "$groups"} & event.keys()


def test_options_are_told_to_both_protocols() -> None:
    """The properties that v1 takes as options are also an `options` object, which v0 ignores."""
    event = one({"properties": {"$process_person_profile": False, "$cookieless_mode": True}})
    assert event["options"] == {"process_person_profile": False, "cookieless_mode": True}
    assert event["properties"]["$process_person_profile"] is False


def test_what_posthog_ignores_is_not_passed_on() -> None:
    """Unknown root fields end here."""
    assert one({"other": {"a": 1}, "api_key": "phc_other", "options": 5}).keys() == {
        "event",
        "distinct_id",
        "properties",
        "uuid",
        "timestamp",
    }


# --- what is refused -------------------------------------------------------------------------------

GOOD = b'{"event":"e","distinct_id":"d","properties":{"a":1}}'


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"nonsense", "malformed_json"),
        (b'{"event":"e","distinct_id":"d"', "malformed_json"),
        (GOOD + GOOD, "malformed_json"),
        (GOOD + b" x", "malformed_json"),
        (b'{"event":"e","distinct_id":"d","properties":{"a":NaN}}', "malformed_json"),
        (b'{"event":"e","distinct_id":"d","properties":{"a":"\\ud800"}}', "malformed_json"),
        (b"[]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"{}", "missing_event"),
        (b'{"event":"","distinct_id":"d"}', "missing_event"),
        (b'{"event":5,"distinct_id":"d"}', "missing_event"),
        (b'{"event":null,"distinct_id":"d"}', "missing_event"),
        (b'{"event":"e"}', "missing_distinct_id"),
        (b'{"event":"e","distinct_id":""}', "missing_distinct_id"),
        (b'{"event":"e","distinct_id":"  \\u3000"}', "missing_distinct_id"),
        (b'{"event":"e","distinct_id":{"a":1}}', "missing_distinct_id"),
        (b'{"event":"e","distinct_id":true}', "missing_distinct_id"),
        (b'{"event":"e","distinct_id":"d","uuid":"x"}', "bad_uuid"),
        (b'{"event":"e","distinct_id":"d","uuid":5}', "bad_uuid"),
        (b'{"event":"e","distinct_id":"d","properties":[]}', "bad_properties"),
        (b'{"event":"e","distinct_id":"d","properties":"a"}', "bad_properties"),
        (b'{"event":"e","distinct_id":"d","$set":5}', "bad_properties"),
        (b'{"event":"e","distinct_id":"d","properties":{"$cookieless_mode":1}}', "bad_properties"),
        (b'{"event":"e","distinct_id":"d","properties":{"$cookieles\\u0073_mode":1}}', "bad_properties"),
        (b'{"event":"e","distinct_id":"d","properties":{"a":"' + b"x" * 10_000 + b'"}}', "too_large"),
        (b'{"event":"e","distinct_id":"d","properties":{"a":"\xff"}}', "bad_utf8"),
        (b'{"event":"\xff","distinct_id":"d"}', "bad_utf8"),
        (
            b'{"event":"e","distinct_id":"d","properties":{"a":' + b"[" * 130 + b"]" * 130 + b"}}",
            "too_deep",
        ),
        (b"[" * 5000, "too_deep"),
        (b'{"a":' * 1500, "too_deep"),
    ],
)
def test_reasons(line: bytes, why: str) -> None:
    """Each rule that is broken has its name, alone and beside others."""
    assert reason(line) == why
    decoded = vouch(GOOD, line, GOOD)
    assert [(reject.read, reject.line, reject.reason) for reject in decoded.rejects] == [(0, 1, why)]
    assert len(events_of(decoded)) == 2


@pytest.mark.parametrize(
    "lines",
    [
        [b'{"event":"a","distinct_id":"b"}],[{"event":"c","distinct_id":"d"}'],
        [b'{"event":"a","distinct_id":"b"},1],[{"event":"c","distinct_id":"d"}'],
        [b'{"event":"a","distinct_id":"b","properties":{"x":[[1', b"2]]}}"],
        [b'{"event":"a","distinct_id":"b","x":[[1', b"2]]}"],
        [
            b'{"event":"a","distinct_id":"b","x":[[1',
            b"2]]}",
            b'{"event":"a","distinct_id":"b"}],[{"event":"c","distinct_id":"d"}',
        ],
    ],
)
def test_no_line_reaches_into_another(lines: list[bytes]) -> None:
    """Lines that would be whole only together, or that would be two, are each refused; none is made up."""
    decoded = vouch(GOOD, *lines, GOOD)
    assert [reject.line for reject in decoded.rejects] == list(range(1, len(lines) + 1))
    assert {reject.reason for reject in decoded.rejects} <= {"malformed_json", "not_an_object"}
    assert len(events_of(decoded)) == 2
    assert decoded.tally.received == len(lines) + 2


def test_a_bomb_of_a_hundred_thousand_brackets() -> None:
    """It costs a rejection, and neither memory nor the stack."""
    huge = door(max_event=10**6)
    for bomb in (b"[" * 100_000, b'{"a":' * 100_000, b'{"properties":' + b"[" * 100_000):
        assert reason(bomb, by=huge) == "too_deep"


def test_a_text_without_an_end_takes_no_time() -> None:
    """A line of a megabyte with brackets and escaped quotes that never close is refused at once."""
    line = b"[" * 126 + b'"' + b'\\"' * 400_000
    assert vouch(line, by=door(max_event=2**20)).rejects[0].reason == "too_deep"


def test_a_cut_line_is_counted_behind_the_whole_ones() -> None:
    """A line that never ended is a rejection of its own, with its place."""
    read = Read(GOOD + b"\n", AT, Cut("truncated", "beginning"))
    decoded = DOOR.vouch([read], 1)
    assert [(reject.line, reject.reason, reject.sample) for reject in decoded.rejects] == [
        (1, "truncated", "beginning")
    ]
    assert (decoded.tally.received, list(decoded.lines)) == (2, [2])


def test_samples_are_printable() -> None:
    """What is shown of a refused line can neither move a cursor nor break a log."""
    for line in (b"\x1b[2J\xff\x00", "ü\u202e".encode(), b"x" * 1000):
        [reject] = vouch(line).rejects
        assert reject.sample.isprintable()
        assert len(reject.sample) <= 1000


# --- what holds for all ----------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["a", "site", "$lib", "$set", "$groups", "$cookieless_mode", "$process_person_profile", "properties", "ü"]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
FIELD = st.sampled_from(
    ["event", "distinct_id", "properties", "timestamp", "uuid", "$set", "$set_once", "$groups", "options"]
)
OBJECT = st.dictionaries(KEYS, JSON, max_size=4)
LIKELY = st.fixed_dictionaries(
    {"event": st.text(max_size=5), "distinct_id": st.text(max_size=3) | st.integers()},
    optional={
        "properties": OBJECT,
        "$set": OBJECT,
        "timestamp": st.text(max_size=8) | st.floats(),
        "x": JSON,
    },
)
EVENTS = st.one_of(
    LIKELY.map(lambda event: json.dumps(event).encode()),
    LIKELY.map(lambda event: json.dumps(event, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.dictionaries(FIELD, JSON, max_size=6).map(lambda event: json.dumps(event).encode()),
)
HALVES = st.tuples(EVENTS, st.integers(0, 60)).map(lambda cut: cut[0][: cut[1]])
# What would cut a line in two, or make one of two, if lines were only laid together.
JOINTS = st.sampled_from([b"],[", b",1],[", b'"x":[[1', b"]", b"[", b"2]]}", b"}{", b"},{", b","])
BRIDGES = st.tuples(HALVES, JOINTS, HALVES).map(b"".join)
LINES = st.one_of(EVENTS, HALVES, EVENTS.map(lambda line: line[10:]), BRIDGES, st.binary(max_size=30)).map(
    lambda line: line.replace(b"\n", b" ").replace(b"\r", b" ")
)


def stripped(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what the door gives afresh each time."""
    shown = []
    for event in events:
        rest = {name: value for name, value in event.items() if name not in {"uuid", "timestamp"}}
        shown.append(rest)
    return shown


@given(st.lists(st.lists(LINES, max_size=4), max_size=4))
@settings(max_examples=300, deadline=None)
def test_nobody_pays_for_a_neighbour(reads: list[list[bytes]]) -> None:
    """Together the lines amount to exactly what each amounts to alone, in order, with its place."""
    alone, refused = [], []
    for number, lines in enumerate(reads):
        place = 0
        for line in lines:
            if not line.strip():
                continue
            decoded = vouch(line)
            alone += events_of(decoded)
            refused += [(number, place, reject.reason) for reject in decoded.rejects]
            place += 1
    whole = DOOR.vouch([Read(b"".join(line + b"\n" for line in lines), AT) for lines in reads], 7)
    assert [(reject.read, reject.line, reject.reason) for reject in whole.rejects] == refused
    events = events_of(whole)
    assert json.dumps(stripped(events)) == json.dumps(stripped(alone))
    assert whole.tally.received == len(events) + len(refused) == sum(whole.lines)
    uuids = [event["uuid"] for event in events]
    assert len(set(uuids)) == len(uuids)


@given(st.lists(LINES, max_size=5))
@settings(max_examples=300, deadline=None)
def test_what_is_let_in_posthog_takes(lines: list[bytes]) -> None:
    """The strict stand-in accepts every chunk (numbers beyond a double excepted, which delivery finds)."""
    for chunk in vouch(*lines).chunks:
        text = inflate(chunk.packed, chunk.size, chunk.crc)
        body = b'{"api_key":"phc_a","batch":[' + text + b"]}"
        request = Request(number=1, method="POST", path="/batch/", query="", headers={}, body=body)
        reply, _ = judge(request, NOW, lambda bits: 1 << (bits - 1))
        assert reply.status == 200, (reply.body, text)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_it_fail(blob: bytes) -> None:
    """Whatever comes is an event or a rejection, and each line is counted."""
    decoded = DOOR.vouch([Read(blob + b"\n", AT)], 1)
    lines = sum(1 for line in blob.split(b"\n") if line.strip())
    assert decoded.tally.received == lines


def with_uuid(number: int, **more: Any) -> bytes:
    ident = f"00000000-0000-4000-8000-{number:012x}"
    return msgspec.json.encode({"event": "e", "distinct_id": "d", "uuid": ident, **more})


def test_a_chunk_has_no_uuid_twice() -> None:
    """What clients send twice, in whatever form, goes into chunks of its own; nothing is dropped."""
    plain = b'{"event":"e","distinct_id":"d","properties":{"a":1}}'
    decoded = vouch(plain, with_uuid(10), plain, with_uuid(11), with_uuid(10), with_uuid(12))
    assert [(chunk.events, chunk.marks) for chunk in decoded.chunks] == [(4, GIVEN), (2, GIVEN)]
    shouted = with_uuid(10).replace(b"00000000a", b"00000000A")
    assert [chunk.events for chunk in vouch(with_uuid(10), shouted, with_uuid(11)).chunks] == [1, 2]
    assert [chunk.marks for chunk in vouch(plain, plain).chunks] == [0]
    assert [chunk.events for chunk in vouch(*[with_uuid(1)] * 4).chunks] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "marks"),
    [
        ({}, 0),
        ({"properties": {"text": "é" * 500}}, 0),
        ({"distinct_id": "é" * 100}, 0),
        ({"distinct_id": "é" * 101}, LONG),
        ({"event": "é" * 100 + "x"}, LONG),
        ({"event": "x" * 200}, 0),
        ({"distinct_id": "\U0001f600" * 60}, LONG),
    ],
)
def test_what_the_newer_protocol_would_drop_is_marked(fields: dict[str, Any], marks: int) -> None:
    """Names and ids are cut at 200 characters, which can be more than 200 bytes."""
    line = msgspec.json.encode({"event": "e", "distinct_id": "d", "properties": {"a": 1}, **fields})
    assert [chunk.marks for chunk in vouch(line).chunks] == [marks]


def test_chunks_keep_their_limits() -> None:
    """No chunk has more events or bytes than the project's batches or a chunk may; order is kept."""
    lines = [b'{"event":"e","distinct_id":"d","properties":{"n":%d}}' % n for n in range(2500)]
    decoded = vouch(*lines)
    assert [event["properties"]["n"] for event in events_of(decoded)] == list(range(2500))
    assert all(chunk.events <= 1000 for chunk in decoded.chunks)
    small = door(max_batch_size=5000)
    decoded = vouch(*lines[:300], by=small)
    assert all(chunk.size <= 5000 or chunk.events == 1 for chunk in decoded.chunks)
    assert [event["properties"]["n"] for event in events_of(decoded)] == list(range(300))


def test_uuids_and_times_ascend() -> None:
    """Events of one read sort as they came, by either."""
    events = events_of(vouch(*[GOOD] * 2500))
    assert [event["timestamp"] for event in events] == sorted({event["timestamp"] for event in events})
    for start in range(0, 2500, 1000):
        some = [event["uuid"] for event in events[start : start + 1000]]
        assert some == sorted(some)
    assert len({event["uuid"] for event in events}) == 2500


# --- who sent it -----------------------------------------------------------------------------------


def from_whom(origin: Origin | None, *events: bytes, by: Door = DOOR) -> Decoded:
    """The events of one sender through a door."""
    return by.vouch([Read(b"".join(event + b"\n" for event in events), AT, None, origin)], 1)


@pytest.mark.parametrize("own", [b"uid", rb"ui\u0064"])
@pytest.mark.parametrize("root", [b"", b',"$set":{"a":1}'])
def test_what_is_forced_no_payload_can_forge(own: bytes, root: bytes) -> None:
    """The kernel's word replaces the payload's, however that writes the name, once and for all."""
    event = b'{"event":"e","distinct_id":"d","properties":{"%b":0,"a":1}%b}' % (own, root)
    decoded = from_whom(Origin(forced={"uid": Raw(b"1000")}), event, GOOD)
    [forged, plain] = events_of(decoded)
    assert forged["properties"]["uid"] == plain["properties"]["uid"] == 1000
    [chunk] = decoded.chunks
    assert inflate(chunk.packed, chunk.size, chunk.crc).count(b"uid") == 4  # and twice in "uuid"


@pytest.mark.parametrize("name", sorted(SENDER))
@pytest.mark.parametrize("root", [b"", b',"$set":{"a":1}'])
def test_who_sent_it_no_payload_can_say(name: str, root: bytes) -> None:
    """However a payload writes these names, they are gone but for what the kernel said of this sender."""
    keys = [name, name.replace("$", "\\u0024"), name.replace("a", "\\u0061"), f'{name}":0,"{name}']
    forged = [
        b'{"event":"e","distinct_id":"d","properties":{"a":1,"%b":0}%b}' % (key.encode(), root)
        for key in keys
    ]
    for origin in (None, Origin(), Origin(forced={"$agent_uid": Raw(b"1000")})):
        *events, plain = events_of(from_whom(origin, *forged, GOOD))
        assert SENDER.intersection(plain["properties"]) == (set(origin.forced) if origin else set())
        for event in events:
            own = {"$set": {"a": 1}} if root else {}
            assert event["properties"] == {**plain["properties"], **own}


def test_an_origins_defaults_give_way() -> None:
    """To what the event has, and to what the source is configured to add."""
    origin = Origin(defaults={"$ip": Raw(b'"192.0.2.1"'), "site": Raw(b'"origin"')})
    own = b'{"event":"e","distinct_id":"d","properties":{"$ip":"198.51.100.7"}}'
    [first, second] = events_of(from_whom(origin, own, GOOD))
    assert (first["properties"]["$ip"], second["properties"]["$ip"]) == ("198.51.100.7", "192.0.2.1")
    assert second["properties"]["site"] == OURS["site"]


def test_each_owners_events_are_chunks_of_their_own() -> None:
    """A key or project of the sender's goes with its events, and with no other's."""
    keys = [None, "phc_a", "phc_a", None, "phc_b"]
    reads = [
        Read(GOOD + b"\n" + b"nonsense\n" + GOOD + b"\n", AT, None, Origin(key=key) if key else None)
        for key in keys
    ]
    reads.append(Read(GOOD + b"\n", AT, None, Origin(project="other")))
    decoded = DOOR.vouch(reads, 1)
    assert [(chunk.project, chunk.key, chunk.events) for chunk in decoded.chunks] == [
        ("default", None, 2),
        ("default", "phc_a", 4),
        ("default", None, 2),
        ("default", "phc_b", 2),
        ("other", None, 1),
    ]
    assert len(decoded.rejects) == 5
    assert len(events_of(decoded)) == 11


def test_denied_lines_are_refused_unread() -> None:
    """They stand behind the whole lines of their read and before its cut."""
    read = Read(GOOD + b"\n", AT, Cut("truncated", "x"), None, Denied("rate_limited", 2, "uid 7"))
    decoded = DOOR.vouch([read, Read(GOOD + b"\n", AT)], 1)
    assert decoded.rejects == [
        Reject(0, 1, "rate_limited", "uid 7", 2),
        Reject(0, 3, "truncated", "x"),
    ]
    assert (decoded.lines, decoded.tally.received) == ([4, 1], 5)


def test_options_among_the_defaults_are_told_too() -> None:
    """What the source adds counts as what the event had; an event's own wins."""
    by = door(properties={"$process_person_profile": False})
    own = b'{"event":"e","distinct_id":"d","properties":{"$process_person_profile":true}}'
    events = events_of(from_whom(None, GOOD, own, by=by))
    told = [(event["options"], event["properties"]["$process_person_profile"]) for event in events]
    assert told == [({"process_person_profile": False}, False), ({"process_person_profile": True}, True)]


@pytest.mark.parametrize("properties", [{"a": 1}, {"site": "own"}, {}])
@pytest.mark.parametrize("when", [None, "2026-01-02T03:04:05.678Z", "2026-01-02T03:04:05.678000+00:00"])
@pytest.mark.parametrize("ident", [None, "0197a5c0-7e1c-7abc-8def-0123456789ab"])
def test_own_uuids_and_times_of_ordinary_events(
    ident: str | None, when: str | None, properties: dict[str, Any]
) -> None:
    """Both are kept, alone and together, whatever the properties need."""
    event = one({"uuid": ident, "timestamp": when, "properties": properties})
    assert ident is None or event["uuid"] == ident
    assert when is None or event["timestamp"] == "2026-01-02T03:04:05.678000Z"
    assert event["properties"] == {**OURS, **properties}
    assert event.keys() == {"event", "distinct_id", "properties", "uuid", "timestamp"}
