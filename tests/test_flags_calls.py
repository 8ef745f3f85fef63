"""`agent.accept.flags.calls`: what is passed on, which calls are the same, what an answer means."""

import gzip
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.accept.flags.calls import Call, Meaning, key_of, passed_back, read_answer, read_call

PAGE = b"<!doctype html><p>Log in"
HTML = {"content-type": "text/html"}
JSON = {"content-type": "application/json"}


def raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def call(
    body: bytes = b"",
    *,
    method: str = "POST",
    path: str = "/flags",
    query: bytes = b"v=2",
    client: str = "",
    origins: tuple[str, ...] = (),
    **headers: str,
) -> Call:
    named = raw({name.replace("_", "-"): value for name, value in headers.items()})
    return read_call(method, path, query, named, body, client=client, origins=origins)


def of(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


PERSON = of(distinct_id="u", api_key="phc_a")

SAME: dict[str, tuple[Call, Call]] = {
    "when it was sent, by posthog-python": (
        call(of(distinct_id="u", sent_at="2026-01-01T00:00:00Z")),
        call(of(sent_at="2026-01-02T00:00:00Z", distinct_id="u")),
    ),
    "when it was sent, by an older one": (call(of(a=1, sentAt="x")), call(of(a=1))),
    "when it was packed": (
        call(gzip.compress(PERSON, mtime=1), content_encoding="gzip"),
        call(gzip.compress(PERSON, 1, mtime=2), content_encoding="gzip"),
    ),
    "when it was sent, by posthog-js": (call(query=b"v=2&_=17&ver=1"), call(query=b"v=2&ver=1&_=18")),
    "the how manieth attempt": (call(query=b"v=2&retry_count=1"), call(query=b"v=2")),
    "a slash": (call(path="/flags/"), call(path="/flags")),
    "the order of headers": (
        call(accept="*/*", user_agent="posthog-node/5"),
        call(user_agent="posthog-node/5", accept="*/*"),
    ),
    "what is not passed on": (call(cookie="a=1", x_request_id="1"), call(cookie="b=2")),
    "what the client has": (call(method="GET", if_none_match='"1"'), call(method="GET")),
    "who asks": (call(client="8.8.8.8"), call(client="9.9.9.9")),
    "which coding it knows beside gzip": (
        call(accept_encoding="gzip, br"),
        call(accept_encoding="deflate,gzip"),
    ),
    "a page that may not ask": (call(origin="https://a.example"), call()),
}
OTHER: dict[str, tuple[Call, Call]] = {
    "method": (call(method="GET"), call(method="POST")),
    "path": (call(path="/flags"), call(path="/decide")),
    "query": (call(query=b"v=2"), call(query=b"v=3")),
    "person": (call(of(distinct_id="u")), call(of(distinct_id="v"))),
    "a field deeper down": (call(of(p={"sent_at": 1})), call(of(p={"sent_at": 2}))),
    "key": (call(authorization="Bearer phs_a"), call(authorization="Bearer phs_b")),
    "no key": (call(authorization="Bearer phs_a"), call()),
    "whose flags": (call(user_agent="Mozilla/5.0"), call(user_agent="posthog-python/7.9")),
    "coding of the body": (call(PERSON, content_type="text/plain"), call(PERSON)),
    "coding of the answer": (call(accept_encoding="gzip"), call()),
    "page": (
        call(origin="https://a.example", origins=("*",)),
        call(origin="https://b.example", origins=("*",)),
    ),
    "where a header ends": (call(accept="ab", user_agent="c"), call(accept="a", user_agent="bc")),
    "unreadable bodies": (call(b"\xff1"), call(b"\xff2")),
}


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME)
def test_calls_that_posthog_answers_alike_have_one_key(pair: tuple[Call, Call]) -> None:
    """What differs only in the moment, or in what says nothing about flags, is the same call."""
    assert key_of(pair[0]) == key_of(pair[1])


@pytest.mark.parametrize("pair", OTHER.values(), ids=OTHER)
def test_any_other_difference_is_another_call(pair: tuple[Call, Call]) -> None:
    """Nobody is given another's flags."""
    assert key_of(pair[0]) != key_of(pair[1])


@given(st.binary(), st.binary(), st.lists(st.tuples(st.binary(), st.binary())))
def test_any_input_is_read(query: bytes, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Whatever a client sends, there is a key, and it is the same the next time."""
    known = [(b"accept-encoding", query), (b"authorization", body), (b"if-none-match", query), *headers]
    first = read_call("GET", "/flags", query, known, body, client=repr(query), origins=["*"])
    assert key_of(first) == key_of(
        read_call("GET", "/flags", query, known, body, client=repr(query), origins=["*"])
    )
    packed = gzip.compress(body)[: len(body) + 5]
    assert len(key_of(first._replace(body=packed))) == 32


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSONS), st.text(), st.text())
def test_a_time_of_sending_changes_no_key(fields: dict[str, Any], one: str, other: str) -> None:
    """Whatever else is in the body, plain or packed."""
    bodies = [of(**{**fields, "sent_at": moment}) for moment in (one, other)]
    bodies += [gzip.compress(body) for body in bodies]
    assert len({key_of(call(body)) for body in bodies}) == 1


@given(st.dictionaries(st.text(), JSONS), st.dictionaries(st.text(), JSONS))
def test_other_fields_make_another_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two bodies with one key say the same."""
    for fields in (one, other):
        fields.pop("sent_at", None)
        fields.pop("sentAt", None)
    texts = [{name: json.dumps(value) for name, value in fields.items()} for fields in (one, other)]
    assert (key_of(call(of(**one))) == key_of(call(of(**other)))) is (texts[0] == texts[1])


def test_a_key_holds_no_secret() -> None:
    """It is a hash of fixed length."""
    key = key_of(call(PERSON, authorization="Bearer phs_secret"))
    assert len(key) == 32
    assert b"phs_" not in key


@pytest.mark.parametrize(
    ("accepted", "asked"),
    [
        ("gzip", b"gzip"),
        ("gzip, deflate", b"gzip"),
        ("br;q=1.0, GZIP;q=0.8", b"gzip"),
        ("*", b"gzip"),
        ("gzip;q=0", b"identity"),
        ("gzip; q=0.0, br", b"identity"),
        ("br, zstd", b"identity"),
        ("xgzip", b"identity"),
        ("", b"identity"),
    ],
)
def test_only_gzip_is_asked_for(accepted: str, asked: bytes) -> None:
    """Where the client reads it; PostHog's bytes are passed on as they come."""
    assert (b"accept-encoding", asked) in call(accept_encoding=accepted).headers


@pytest.mark.parametrize(
    ("client", "public"),
    [
        ("8.8.8.8", "8.8.8.8"),
        ("::ffff:8.8.8.8", "8.8.8.8"),
        ("2606:4700::1111", "2606:4700::1111"),
        ("127.0.0.1", ""),
        ("192.168.1.4", ""),
        ("100.64.0.1", ""),
        ("::1", ""),
        ("fe80::1%eth0", ""),
        ("::ffff:10.0.0.1", ""),
        ("", ""),
        ("unix", ""),
        ("8.8.8.8, 1.1.1.1", ""),
    ],
)
def test_only_a_public_address_tells_posthog_who_asks(client: str, public: str) -> None:
    """A private one means another machine in every network."""
    assert call(client=client).client == public


GOOD = of(flags={}, errorsWhileComputingFlags=False)
ANSWERS: dict[str, tuple[int, dict[str, str], bytes, Meaning]] = {
    "flags": (200, JSON, GOOD, Meaning.GOOD),
    "flags of the first version": (200, JSON, of(featureFlags={}), Meaning.GOOD),
    "flags with a charset": (200, {"content-type": "application/json; charset=utf-8"}, GOOD, Meaning.GOOD),
    "packed flags": (200, {**JSON, "content-encoding": "gzip"}, gzip.compress(GOOD), Meaning.GOOD),
    "not all flags": (200, JSON, of(errorsWhileComputingFlags=True), Meaning.FINAL),
    "not all flags, packed": (200, JSON, gzip.compress(of(errorsWhileComputingFlags=True)), Meaning.FINAL),
    "over quota": (200, JSON, of(flags={}, quotaLimited=["feature_flags"]), Meaning.FINAL),
    "another quota": (200, JSON, of(flags={}, quotaLimited=[]), Meaning.GOOD),
    "half of it": (200, JSON, GOOD[:-1], Meaning.FINAL),
    "no flags": (200, JSON, b"[]", Meaning.FINAL),
    "a text": (200, {"content-type": "text/plain"}, b"ok", Meaning.FINAL),
    "no type": (200, {}, GOOD, Meaning.FINAL),
    "a page": (200, HTML, PAGE, Meaning.AWAY),
    "a page in disguise": (200, JSON, PAGE, Meaning.AWAY),
    "nothing new": (304, {}, b"", Meaning.SAME),
    "another path": (301, {"location": "/flags/"}, b"", Meaning.FINAL),
    "another host": (302, {"location": "https://portal.example/flags"}, b"", Meaning.AWAY),
    "another host without a scheme": (307, {"location": "//portal.example/"}, b"", Meaning.AWAY),
    "nowhere": (302, {}, b"", Meaning.AWAY),
    "no address": (302, {"location": "http://[::1"}, b"", Meaning.AWAY),
    "bad call": (400, JSON, b"{}", Meaning.FINAL),
    "bad call to nginx": (400, HTML, PAGE, Meaning.FINAL),
    "wrong key": (401, JSON, b"{}", Meaning.FINAL),
    "unpaid": (402, JSON, b"{}", Meaning.FINAL),
    "wrong scope": (403, JSON, b"{}", Meaning.FINAL),
    "firewall": (403, HTML, PAGE, Meaning.BUSY),
    "not served": (404, HTML, PAGE, Meaning.FINAL),
    "proxy's password": (407, HTML, PAGE, Meaning.AWAY),
    "slow client": (408, JSON, b"{}", Meaning.BUSY),
    "too large": (413, HTML, PAGE, Meaning.FINAL),
    "limit": (429, JSON, b"{}", Meaning.BUSY),
    "error": (500, JSON, b"{}", Meaning.BUSY),
    "gateway": (502, HTML, PAGE, Meaning.AWAY),
    "busy": (503, JSON, b"{}", Meaning.AWAY),
    "late": (504, JSON, b"{}", Meaning.AWAY),
    "login wanted": (511, HTML, PAGE, Meaning.AWAY),
    "origin unreachable": (522, HTML, PAGE, Meaning.AWAY),
}


@pytest.mark.parametrize("case", ANSWERS.values(), ids=ANSWERS)
def test_what_an_answer_means(case: tuple[int, dict[str, str], bytes, Meaning]) -> None:
    """PostHog's word, its trouble, or somebody else's voice."""
    status, headers, body, meaning = case
    assert read_answer(call(), status, raw(headers), body) is meaning


def test_the_answer_to_a_browsers_question_is_good() -> None:
    """Without it a page could not ask while PostHog is away; a portal's page is none."""
    asked = call(method="OPTIONS")
    assert read_answer(asked, 204, [], b"") is Meaning.GOOD
    assert read_answer(asked, 200, [], b"") is Meaning.GOOD
    assert read_answer(asked, 200, raw(HTML), PAGE) is Meaning.AWAY


@given(
    st.integers(100, 999),
    st.dictionaries(st.text(), st.text()),
    st.binary(),
    st.sampled_from(["/flags", "/flags/definitions"]),
)
def test_any_answer_has_a_meaning(status: int, headers: dict[str, str], body: bytes, path: str) -> None:
    """Whatever comes back, it is read."""
    named = raw({**JSON, "location": path + status * "x"}) + raw(headers)
    asked = call(path=path)
    assert read_answer(asked, status, named, body) in Meaning
    assert passed_back(asked, status, named, body).body == body
