"""Shaping: who is taken, what is renamed, and that nothing that was to be hidden is ever seen."""

import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from agent.config import Secret, UnixStream
from agent.envelope import Envelope
from agent.events import Cut, Instant, Read
from agent.pack import inflate
from agent.shape import Shape, shape_of, share_of
from agent.vouch import Decoded, Door, Rules

AT = Instant(1_795_000_000_123_456, 1, "boot")
KEY = "a key of the tests"
HIDDEN = "[redacted]"


def shaped_by(**told: Any) -> UnixStream:
    if "hash" in told:
        told["hash_key"] = Secret(KEY)
    return UnixStream(name="app", project="default", path="/s", **told)


def door(**told: Any) -> Door:
    source = shaped_by(**told)
    rules = Rules(
        source="app",
        project="default",
        properties={"site": "berlin"},
        distinct_id=source.distinct_id,
        max_event=source.max_event,
        max_batch_events=1000,
        max_batch_size=5 * 2**20,
    )
    return Door(rules, shape=shape_of(source))


def vouch(by: Door, *lines: bytes) -> Decoded:
    return by.vouch([Read(b"".join(line + b"\n" for line in lines), AT)], 12345)


def texts_of(decoded: Decoded) -> list[bytes]:
    return [inflate(chunk.packed, chunk.size, chunk.crc) for chunk in decoded.chunks]


def events_of(decoded: Decoded) -> list[dict[str, Any]]:
    return [event for text in texts_of(decoded) for event in json.loads(b"[" + text + b"]")]


def reasons_of(decoded: Decoded) -> list[tuple[int, str]]:
    return [(reject.line, reject.reason) for reject in decoded.rejects]


def one(by: Door, **fields: Any) -> dict[str, Any]:
    """What one event becomes."""
    decoded = vouch(by, json.dumps({"event": "e", "distinct_id": "d", **fields}).encode())
    assert not decoded.rejects
    [event] = events_of(decoded)
    return event


def properties(by: Door, given_properties: object) -> dict[str, Any]:
    """What one event's properties become, without the source's own."""
    found: dict[str, Any] = one(by, properties=given_properties)["properties"]
    return {name: value for name, value in found.items() if name != "site"}


def keyed(text: str) -> str:
    return hmac.new(KEY.encode(), text.encode(), "sha256").hexdigest()


# --- by name ---------------------------------------------------------------------------------------


def test_a_source_that_says_nothing_has_no_shape() -> None:
    """Nobody pays for what is not asked for."""
    assert shape_of(shaped_by()) is None


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ({"drop": ("debug*",)}, ["signup", "Debug", "a.b"]),
        ({"drop": ("*",)}, []),
        ({"drop": ("[dD]ebug", "?.?")}, ["signup", "debug 2"]),
        ({"keep": ("signup",)}, ["signup"]),
        ({"keep": ("*debug*", "signup"), "drop": ("debug",)}, ["signup", "debug 2"]),
        ({"keep": ("[!s]*",)}, ["debug", "debug 2", "Debug", "a.b"]),
    ],
)
def test_drop_and_keep(told: dict[str, Any], taken: list[str]) -> None:
    """Globs by the name that came, upper and lower case apart; what is dropped is dropped though kept."""
    names = ["signup", "debug", "debug 2", "Debug", "a.b"]
    decoded = vouch(door(**told), *(json.dumps({"event": n, "distinct_id": "d"}).encode() for n in names))
    assert [event["event"] for event in events_of(decoded)] == taken
    refused = [(at, "filtered") for at, name in enumerate(names) if name not in taken]
    assert reasons_of(decoded) == refused
    assert decoded.tally.received == 5
    assert decoded.tally.rejected == ({"filtered": len(refused)} if refused else {})


def test_each_line_keeps_its_own_fate() -> None:
    """Dropped, broken, cut and good lines of several reads: each is told by its own place and reason."""
    by = door(drop=("x",))
    reads = [
        Read(b'nonsense\n{"event":"x","distinct_id":"d"}\n\n{"event":"a","distinct_id":"d"}\n', AT),
        Read(b"", AT),
        Read(b'{"event":"x","distinct_id":"d"}\n{"event":"b"}\n{"event":"x"}\n', AT, Cut("truncated", "c")),
    ]
    decoded = by.vouch(reads, 1)
    assert [(reject.read, reject.line, reject.reason) for reject in decoded.rejects] == [
        (0, 0, "malformed_json"),
        (0, 1, "filtered"),
        (2, 0, "filtered"),
        (2, 1, "missing_distinct_id"),
        (2, 2, "filtered"),
        (2, 3, "truncated"),
    ]
    assert [event["event"] for event in events_of(decoded)] == ["a"]
    assert decoded.tally.received == 7
    assert sum(decoded.tally.rejected.values()) == 6


def test_a_chunk_without_the_bad_ones_keeps_places_and_times() -> None:
    """Where every line is an event, those that are left keep their own times, a microsecond a line."""
    names = ["a", "x", "b", "x", "c"]
    lines = [json.dumps({"event": name, "distinct_id": "d"}).encode() for name in names]
    whole, some = vouch(door(drop=("never",)), *lines), vouch(door(drop=("x",)), *lines)
    times = [event["timestamp"] for event in events_of(whole) if event["event"] != "x"]
    assert [event["timestamp"] for event in events_of(some)] == times
    assert reasons_of(some) == [(1, "filtered"), (3, "filtered")]


def test_rename() -> None:
    """Events and properties get their new names at once, so that two can change places."""
    told = {"old": "new", "e": "f", "properties.a": "b", "properties.b": "a", "properties.$x": "site"}
    by = door(rename=told)
    assert one(by, event="old")["event"] == "new"
    assert one(by, event="older")["event"] == "older"
    assert properties(by, {"a": 1, "b": 2, "c": {"a": 3}}) == {"b": 1, "a": 2, "c": {"a": 3}}
    line = b'{"event":"e","distinct_id":"d","properties":{"\\u0061":1,"$x":"own"}}'
    assert events_of(vouch(by, line))[0]["properties"] == {"b": 1, "site": "own"}
    [text] = texts_of(vouch(by, line))
    assert text.count(b'"site"') == 1


def test_a_property_that_has_the_new_name_wins() -> None:
    """As everywhere at the door: what is there is not written over."""
    assert properties(door(rename={"properties.a": "b"}), {"a": 1, "b": 2}) == {"b": 2}


def test_roots_are_properties_for_a_renaming() -> None:
    """A `$set` beside the properties is renamed like one among them."""
    event = one(door(rename={"properties.$set": "person"}), **{"$set": {"a": 1}})
    assert event["properties"]["person"] == {"a": 1}
    assert "$set" not in event["properties"]
    event = one(door(rename={"properties.person": "$process_person_profile"}), properties={"person": False})
    assert event["options"] == {"process_person_profile": False}


# --- by person -------------------------------------------------------------------------------------


def test_the_sample_is_named_and_stable() -> None:
    """It is the first 32 bits of SHA-256, so that anybody can tell who is in it."""
    digest = hashlib.sha256(b"user-1").hexdigest()
    assert share_of("user-1") == int(digest[:8], 16) / 2**32
    assert round(share_of("user-1"), 6) == 0.776406


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.99])
def test_a_sample_takes_persons_whole_and_near_its_share(share: float) -> None:
    """All of a person's events are taken or none, and about as many persons as asked for."""
    persons = 4000
    lines = [
        b'{"event":"%b","distinct_id":"user-%d"}' % (event, n)
        for event in (b"a", b"b")
        for n in range(persons)
    ]
    decoded = vouch(door(sample=share), *lines)
    taken = [(event["event"], event["distinct_id"]) for event in events_of(decoded)]
    first = {who for event, who in taken if event == "a"}
    assert first == {who for event, who in taken if event == "b"}
    assert abs(len(first) / persons - share) < 0.03
    assert decoded.tally.rejected == {"sampled": 2 * (persons - len(first))}


def test_a_person_is_the_same_however_the_id_is_written() -> None:
    """A number is its text, an escape its character, none the source's: all before the dice are thrown."""
    for who, text in (
        ("5", b"5"),
        ("5", b'"5"'),
        ("5", b'"\\u0035"'),
        ("host-7", b"null"),
        ("host-7", b'""'),
    ):
        by = door(sample=share_of(who), distinct_id="host-7")
        line = b'{"event":"e","distinct_id":%b}' % text
        assert reasons_of(vouch(by, line)) == [(0, "sampled")]
        by = door(sample=share_of(who) + 1e-9, distinct_id="host-7")
        assert events_of(vouch(by, line))[0]["distinct_id"] == who


@pytest.mark.parametrize("who", [b"null", b'""', b'"  "', b"{}"])
def test_who_has_no_id_is_refused_for_that(who: bytes) -> None:
    """Neither a sample nor a hash makes an id of none."""
    line = b'{"event":"e","distinct_id":%b}' % who
    assert reasons_of(vouch(door(sample=0.5), line)) == [(0, "missing_distinct_id")]
    assert reasons_of(vouch(door(hash=("distinct_id",)), line)) == [(0, "missing_distinct_id")]


# --- hidden ----------------------------------------------------------------------------------------


def test_redact_by_name() -> None:
    """At any depth, in lists, in `$set`, as globs; whatever the value is; upper and lower case apart."""
    by = door(redact=("email", "*_token", "pass*", "a/b"))
    event = one(
        by,
        properties={
            "email": "bob@example.com",
            "Email": "seen",
            "x_token": {"deep": 1},
            "password": 5,
            "list": [{"email": None}, [{"a_token": 1.5}], 1.50],
            "a/b": 1,
        },
        **{"$set": {"email": "bob@example.com", "plan": "pro"}, "$set_once": {"passport": 1}},
    )
    del event["properties"]["site"]
    assert event["properties"] == {
        "email": HIDDEN,
        "Email": "seen",
        "x_token": HIDDEN,
        "password": HIDDEN,
        "list": [{"email": HIDDEN}, [{"a_token": HIDDEN}], 1.5],
        "a/b": HIDDEN,
        "$set": {"email": HIDDEN, "plan": "pro"},
        "$set_once": {"passport": HIDDEN},
    }


def test_no_property_is_lost_where_names_become_equal() -> None:
    """The first name that is redacted is that alone, the others have numbers that nothing has yet."""
    came = {"a@x.de": 1, "[redacted] 2": 2, "b@x.de": 3, "c@x.de": 4, "to d@x.de": 5, "to e@x.de": 6}
    told = properties(door(redact=("@email",)), {**came, "deep": {"[redacted]": 7, "f@x.de": {"g@x.de": 8}}})
    assert told == {
        "[redacted]": 1,
        "[redacted] 2": 2,
        "[redacted] 3": 3,
        "[redacted] 4": 4,
        "to [redacted]": 5,
        "to [redacted] 2": 6,
        "deep": {"[redacted]": 7, "[redacted] 2": {"[redacted]": 8}},
    }


def test_what_is_not_hidden_stays_as_it_was_written() -> None:
    """Numbers that no double holds are passed on digit by digit, beside what is redacted."""
    line = (
        b'{"event":"e","distinct_id":"d","properties":{"a":1.50,"b":1e999,"c":123456789012345678901234567890,'
        b'"email":"x"}}'
    )
    [text] = texts_of(vouch(door(redact=("email",)), line))
    assert b'"a":1.50,"b":1e999,"c":123456789012345678901234567890,"email":"[redacted]"' in text


def test_switches_of_posthog_are_left() -> None:
    """What tells PostHog how to take an event says nothing of anybody; but only where it is true or false."""
    by = door(redact=("$*",), hash=("$process_person_profile",))
    event = one(by, properties={"$process_person_profile": False, "$ignore_sent_at": "secret", "$a": 1})
    del event["properties"]["site"]
    assert event["properties"] == {"$process_person_profile": False, "$ignore_sent_at": HIDDEN, "$a": HIDDEN}
    assert event["options"] == {"process_person_profile": False}


def test_hash() -> None:
    """The same HMAC-SHA-256 for an id wherever it stands and however it is written."""
    by = door(hash=("distinct_id", "$user_id", "$anon_distinct_id", "alias", "list"))
    event = one(
        by,
        distinct_id=5,
        properties={
            "$user_id": "5",
            "alias": 5,
            "$anon_distinct_id": "ü",
            "distinct_id": 5,
            "list": [1, "a"],
        },
        **{"$set": {"alias": 1.5, "other": 1}},
    )
    del event["properties"]["site"]
    assert event["distinct_id"] == keyed("5")
    assert event["properties"] == {
        "$user_id": keyed("5"),
        "alias": keyed("5"),
        "$anon_distinct_id": keyed("ü"),
        "distinct_id": keyed("5"),
        "list": keyed('[1,"a"]'),
        "$set": {"alias": keyed("1.5"), "other": 1},
    }


@pytest.mark.parametrize("size", [16, 63, 64, 65, 200])
def test_the_hash_is_hmac_for_keys_of_any_length(size: int) -> None:
    """Anybody who has the key can compute it with any library."""
    source = msgspec.structs.replace(shaped_by(hash=("distinct_id",)), hash_key=Secret("k" * size))
    envelope = Envelope(event="e", distinct_id="user-1")
    assert Shape(source).apply([envelope]) == {}
    assert envelope.distinct_id == hmac.new(b"k" * size, b"user-1", "sha256").hexdigest()


@pytest.mark.parametrize("nobody", ["null", "undefined", "Anonymous", '"guest"', "0", "[object Object]", ""])
def test_a_word_for_nobody_is_not_hashed(nobody: str) -> None:
    """PostHog merges nobody by these words; hashed, they would be a person that everybody is merged with."""
    by = door(hash=("distinct_id", "alias", "plan"))
    assert properties(by, {"alias": nobody, "plan": nobody}) == {"alias": nobody, "plan": keyed(nobody)}
    assert properties(by, {"alias": None, "plan": True}) == {"alias": None, "plan": keyed("true")}
    if nobody:
        assert one(by, distinct_id=nobody)["distinct_id"] == nobody


def test_an_id_that_is_an_address_is_hashed_and_not_redacted() -> None:
    """Else all persons whose ids look like addresses would become one."""
    by = door(redact=("@email", "secret"), hash=("distinct_id", "alias", "secret"))
    event = one(by, distinct_id="b@x.com", properties={"alias": "b@x.com", "t": "b@x.com", "secret": "s"})
    assert event["distinct_id"] == event["properties"]["alias"] == keyed("b@x.com")
    assert event["properties"]["t"] == event["properties"]["secret"] == HIDDEN


def test_rename_comes_before_hiding() -> None:
    """What is hidden is named by its new name."""
    by = door(rename={"properties.mail": "email"}, redact=("email",))
    assert properties(by, {"mail": "x"}) == {"email": HIDDEN}


def test_a_time_that_cannot_be_read_is_nobodys_to_see() -> None:
    """It is kept as a property, and may be anything."""
    event = one(door(redact=("@email",)), timestamp="bob@example.com")
    assert event["properties"]["$agent_timestamp"] == HIDDEN
    event = one(door(redact=("@email",)), timestamp="2026-01-02T03:04:05Z")
    assert event["timestamp"] == "2026-01-02T03:04:05.000000Z"
    assert one(door(drop=("x",)), timestamp="soon")["properties"]["$agent_timestamp"] == "soon"


@pytest.mark.parametrize("told", [{"redact": ("a",)}, {"hash": ("a",)}])
def test_samples_of_refused_lines_show_nothing(told: dict[str, Any]) -> None:
    """Where something is hidden, no part of a refused line is shown to anybody."""
    lines = [b"bob@example.com", b'{"event":"e"}', b'{"event":"e","distinct_id":"d","uuid":"bob@x.com"}']
    read = Read(b"".join(line + b"\n" for line in lines), AT, Cut("too_large", "bob@example.com"))
    decoded = door(**told).vouch([read], 1)
    assert {reject.sample for reject in decoded.rejects} == {HIDDEN}
    assert len(decoded.rejects) == 4


def test_what_grows_too_large_by_hashing_is_refused() -> None:
    """Many short values that become hashes cannot make an event that PostHog would not take."""
    line = json.dumps({"event": "e", "distinct_id": "d", "properties": {"l": [{"a": 1}] * 100}}).encode()
    assert reasons_of(vouch(door(hash=("a",), max_event=2000), line)) == [(0, "too_large")]


def test_what_cannot_be_opened_is_not_let_through() -> None:
    """Properties that cannot be looked into are refused where something in them is to be hidden."""
    number = b"1" * 5000
    line = b'{"event":"e","distinct_id":"d","properties":{"email":1,"n":%b}}' % number
    assert reasons_of(vouch(door(redact=("email",)), line)) == [(0, "bad_properties")]
    line = b'{"event":"e","distinct_id":"d","properties":[{"email":1}]}'
    assert reasons_of(vouch(door(redact=("email",)), line)) == [(0, "bad_properties")]
    line = b'{"event":"e","distinct_id":"d","$set":5}'
    assert reasons_of(vouch(door(redact=("email",)), line)) == [(0, "bad_properties")]


# --- more than can be looked through -----------------------------------------------------------------

PATTERNS = ("@email", "@card", "@ip")
CARD = "4111 1111 1111 1111"


@pytest.mark.parametrize(
    "much",
    [
        "4111 1111 1111 1112 " * 40_000,
        ["4111111111111112"] * 40_000,
        [[CARD]] * 20_000,
        {"a": [CARD] * 20_000},
    ],
)
def test_what_would_take_too_long_to_look_through_is_redacted_whole(much: object) -> None:
    """Nobody waits for an event of nothing but digits; what comes before and behind it is looked through."""
    told = properties(door(redact=PATTERNS), {"a": f"by {CARD}", "much": much, "b": f"by {CARD}", "c": 1})
    assert told.pop("much") in (HIDDEN, {"a": HIDDEN})
    assert told == {"a": f"by {HIDDEN}", "b": f"by {HIDDEN}", "c": 1}


def test_a_large_event_is_looked_through_like_any() -> None:
    """A long text loses its cards alone; what holds nothing to hide stays, however much it is."""
    by = door(redact=("email", *PATTERNS))
    floats, text = [n / 8 for n in range(50_000)], "It was said, and then again. " * 2000
    came = {"floats": floats, "text": f"{text}{CARD} {text}", "rest": text}
    assert properties(by, came) == {**came, "text": f"{text}{HIDDEN} {text}"}


def test_no_name_is_missed_in_a_large_property() -> None:
    """Where patterns find nothing in it, names are hidden in it all the same, also after a renaming."""
    by = door(redact=("email", "@ip"), rename={"properties.old": "new"})
    secret = [{"email": "S3CRET"}, "x" * 5000]
    quiet = ["x" * 5000]
    assert properties(by, {"ip": "10.0.0.1", "a": secret})["a"][0] == {"email": HIDDEN}
    told = properties(by, {"ip": "10.0.0.1", "old": quiet, "new": [*secret, "10.0.0.1"]})
    assert told["new"] == [{"email": HIDDEN}, "x" * 5000, HIDDEN]
    assert properties(by, {"ip": "10.0.0.1", "old": secret})["new"][0] == {"email": HIDDEN}


def test_more_names_than_can_be_looked_through_are_refused() -> None:
    """An event of so many properties is none that PostHog could show, and none that may pass unseen."""
    line = {"event": "e", "distinct_id": "d", "properties": {f"{n}@x.de": 1 for n in range(20_000)}}
    assert reasons_of(vouch(door(redact=PATTERNS), json.dumps(line).encode())) == [(0, "too_large")]


# --- whatever comes --------------------------------------------------------------------------------

NAME = st.sampled_from(["email", "näme", "a_token", "pass/word", 'quo"te', "line\nend", "$user_id"])


def written(name: str, data: st.DataObject) -> str:
    """A name as JSON may write it, each character plain or as one of its escapes."""
    short = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\n": "\\n"}
    text = ""
    for char in name:
        ways = [f"\\u{ord(char):04x}", f"\\u{ord(char):04X}"]
        ways += [short[char]] if char in short else [char]
        ways += ["/"] if char == "/" else []
        text += data.draw(st.sampled_from(ways))
    return f'"{text}"'


VALUES = st.sampled_from(['"S3CRET"', '["S3CRET"]', '{"x":"S3CRET"}', '"\\u00533CRET"', '{"S3CRET":[[1]]}'])
FRAMES = st.lists(
    st.sampled_from(['{{"a":{}}}', "[1,{}]", '{{"$set":{}}}', '[[{}],"x"]', '{{"a":{},"b":[{{}}]}}']),
    max_size=5,
)
GAPS = st.sampled_from(["", " ", "\t"])


@given(NAME, VALUES, FRAMES, GAPS, st.booleans(), st.booleans(), st.data())
@settings(max_examples=400, deadline=None)
def test_nothing_named_slips_through(
    name: str, value: str, frames: Sequence[str], gap: str, twice: bool, root: bool, data: st.DataObject
) -> None:
    """By escapes, at any depth, twice in one object, with gaps, in the root's `$set`: it is never stored."""
    first = f"{{{gap}{written(name, data)}{gap}:{gap}{value}{gap}}}"
    if twice:
        first = f"{first[:-1]},{written(name, data)}:{value}}}"
    for frame in frames:
        first = frame.format(first)
    where = "$set" if root and first.startswith("{") else "properties"
    body = first if first.startswith("{") else f'{{"list":{first}}}'
    line = f'{{"event":"e","distinct_id":"d","{where}":{body}}}'.encode()
    for told in (
        {"redact": ("email", "n?me", "*_token", "pass/*", 'quo"te', "line\n*", "$user_id")},
        {"hash": ("email", "näme", "a_token", "pass/word", 'quo"te', "line\nend", "$user_id")},
    ):
        decoded = vouch(door(**told), line)
        assert not decoded.rejects
        [text] = texts_of(decoded)
        assert b"S3CRET" not in text
        assert events_of(decoded)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "email", "x@y.de", "$set", "$cookieless_mode"]), inner)
    ),
    max_leaves=8,
)
SHAPES = [
    Shape(shaped_by(drop=("a*",), sample=0.5, rename={"b": "c", "properties.a": "email"}, redact=("email",))),
    Shape(shaped_by(redact=("@email", "@card", "@ip", "*a*"), hash=("distinct_id", "email"))),
    Shape(shaped_by(redact=("*",), rename={"properties.$set": "a"})),
    Shape(shaped_by(keep=("?",), redact=("@card",), distinct_id="x")),
]


@given(
    st.sampled_from(SHAPES),
    st.text(min_size=1, max_size=3),
    st.none() | st.text(max_size=3) | st.integers() | st.floats(),
    st.binary(max_size=12) | JSON.map(lambda value: json.dumps(value).encode()),
    st.none() | JSON.map(lambda value: json.dumps(value).encode()),
    st.none() | st.text(max_size=5) | st.floats(),
)
@settings(max_examples=400, deadline=None)
def test_shaping_never_raises(
    shape: Shape, name: str, who: Any, text: bytes, root: bytes | None, when: Any
) -> None:
    """Whatever an envelope holds, it is shaped or refused."""
    envelope = Envelope(event=name, distinct_id=who, properties=Raw(text), timestamp=when)
    if root is not None:
        envelope.set = Raw(root)
    assert set(shape.apply([envelope]).values()) <= {"filtered", "sampled", "bad_properties", "too_large"}
    deep = Envelope(
        event="e", distinct_id="d", properties=Raw(b'{"email":' + b"[" * 5000 + b"]" * 5000 + b"}")
    )
    assert set(shape.apply([deep]).values()) <= {"filtered", "sampled", "bad_properties"}
