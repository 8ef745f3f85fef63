"""`agent.deliver.reply`: one right verdict for each thing that may answer."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.deliver import v1
from agent.deliver.reply import LONGEST_AFTER, REASON_BYTES, read_reply, server_clock
from agent.deliver.verdict import Accepted, Refused, Rejected, Retry, Split, Verdict

NOW = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z

PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
HTML = {"content-type": "text/html; charset=utf-8"}

# The rows of PostHog's table (`rust/capture/src/api.rs`, `v0_endpoint.rs`, `server.rs`), and what stands
# between it and us.
ROWS: dict[str, tuple[int, dict[str, str], bytes, Verdict]] = {
    "200": (200, {}, b'{"status": "Ok"}', Accepted()),
    "200 of older builds": (200, {}, b'{"status": 1}', Accepted()),
    "200 over quota": (200, {}, b'{"status":"Ok","quota_limited":["events"]}', Accepted()),
    "200 of any JSON": (200, {}, b'{"status": "Error", "page": "<html>"}', Accepted()),
    "200 with nothing": (200, {}, b"", Accepted()),
    "202": (202, {}, b"queued < soon", Accepted()),
    "204 beacon": (204, {}, b"", Accepted()),
    "200 of a captive portal": (200, HTML, PAGE, Refused("host", "")),
    "200 of a portal in disguise": (200, {"content-type": "application/json"}, PAGE, Refused("host", "")),
    "200 of HTML by type": (200, {"content-type": "Text/HTML"}, b"welcome", Refused("host", "")),
    "301": (301, {"location": "https://x.example/batch?token=s3"}, b"", Refused("host", "")),
    "302 to a portal": (302, {"location": "/login"} | HTML, PAGE, Refused("host", "")),
    "304": (304, {}, b"", Refused("host", "")),
    "307": (307, {}, b"", Refused("host", "")),
    "308": (308, {"location": "http://[broken"}, b"", Refused("host", "")),
    "400": (400, {}, b"failed to parse request", Rejected("failed to parse request")),
    "400 without a word": (400, {}, b"", Rejected("HTTP 400")),
    "400 of a proxy": (400, HTML, PAGE, Refused("host", "")),
    "401": (401, {}, b"API key is not valid: personal_api_key", Refused("key", "")),
    "402": (402, {}, b"quota", Refused("billing", "")),
    "403": (403, {}, b"forbidden", Refused("key", "")),
    "403 of a firewall": (403, HTML, PAGE, Refused("key", "")),
    "404": (404, {}, b"not found", Refused("host", "")),
    "405": (405, {}, b"", Refused("host", "")),
    "407": (407, {}, b"", Refused("host", "")),
    "408": (408, {}, b"", Retry(None, "")),
    "410": (410, {}, b"", Refused("host", "")),
    "413": (413, {}, b"length limit exceeded", Split("length limit exceeded")),
    "413 of nginx": (413, HTML, PAGE, Split("HTTP 413")),
    "415": (415, {}, b"", Refused("host", "")),
    "418": (418, {}, b"", Refused("host", "")),
    "429": (429, {}, b"", Retry(None, "")),
    "429 with Retry-After": (429, {"retry-after": "7"}, b"", Retry(7.0, "")),
    "500": (500, {}, b"internal", Retry(None, "")),
    "502 of a load balancer": (502, HTML, PAGE, Retry(None, "")),
    "503": (503, {"retry-after": "1"}, b"transient, retry", Retry(1.0, "")),
    "504": (504, {}, b"", Retry(None, "")),
    "511 of a captive portal": (511, {}, b"log in first", Refused("host", "")),
    "511 with a page": (511, HTML, PAGE, Refused("host", "")),
    "599": (599, {}, b"", Retry(None, "")),
    "199": (199, {}, b"", Refused("host", "")),
    "600": (600, {}, b"", Refused("host", "")),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_reply_has_its_verdict(row: tuple[int, dict[str, str], bytes, Verdict]) -> None:
    """Each row of PostHog's status table, and each thing that answers in its place."""
    status, headers, body_start, expected = row
    verdict = read_reply(status, headers, body_start, NOW)
    match verdict, expected:
        case Refused(hold=hold, why=why), Refused(hold=wanted):
            assert hold == wanted
            assert str(status) in why
            assert "s3" not in why
        case Retry(after=after, reason=reason), Retry(after=wanted_after):
            assert after == wanted_after
            assert str(status) in reason
        case _:
            assert verdict == expected


DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "after"),
    [
        ({}, None),
        ({"retry-after": "120"}, 120.0),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "9" * 400}, LONGEST_AFTER),
        ({"retry-after": "86400"}, LONGEST_AFTER),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "1_0"}, None),
        ({"retry-after": ""}, None),
        # By the server's clock where it tells it, else by ours.
        ({"retry-after": "Fri, 02 Jan 2026 00:00:10 GMT", "date": "Fri, 02 Jan 2026 00:00:00 GMT"}, 10.0),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:30 GMT", "date": "broken"}, 30.0),
        ({"retry-after": "Thursday, 01-Jan-26 00:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu Jan  1 00:00:30 2026"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2015 00:00:30 GMT"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 2099 00:00:30 GMT"}, LONGEST_AFTER),
        ({"retry-after": "Thu, 99 Jan 2026 00:00:30 GMT"}, None),
        ({"retry-after": "Thu, 01 Jan 99999 00:00:30 GMT"}, None),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], after: float | None) -> None:
    """Seconds, fractions and dates are read; what is negative or absurd is bounded, other words ignored."""
    assert read_reply(503, headers, b"", NOW) == Retry(after, "HTTP 503")


def test_a_verdicts_text_is_short_printable_and_without_keys() -> None:
    """PostHog's text goes to logs, status and dead letters."""
    told = b"bad key phc_abc-DEF_1 or phx_zzz\n\x1b[31m\x00 " + "é".encode() * 4000
    verdict = read_reply(400, {}, told, NOW)
    assert isinstance(verdict, Rejected)
    assert verdict.reason.startswith("bad key *** or *** ")
    assert verdict.reason.isprintable()
    assert len(verdict.reason.encode()) <= REASON_BYTES


@pytest.mark.parametrize("key", ["of-the-old-kind", 'odd"of\\a kind'])
def test_the_key_that_was_sent_is_never_told(key: str) -> None:
    """Not every key begins like one; a reply may repeat it plainly, as JSON, or across where it is cut."""
    for told in (
        key.encode(),
        msgspec.json.encode(key),
        b" " * 3985 + key.encode(),
        b"x" * 495 + key.encode(),
    ):
        for read in (read_reply, v1.read):
            verdict = read(400, {}, b"bad key " + told, NOW, secrets=[key])
            assert isinstance(verdict, Rejected)
            assert "kind" not in verdict.reason
            assert key[:5] not in verdict.reason


def test_what_went_out_beside_the_key_is_never_told() -> None:
    """A gateway may repeat its own token, and a long answer may cut it; the words around it stay."""
    secrets = ["phc_k", "Bearer gate/way+0123", "gate/way+0123"]
    for told in (
        b'said "gate\\/way+0123" twice',
        b"said gate%2Fway%2b0123 twice",
        b"said Bearer gate/way+0123 twice",
    ):
        verdict = read_reply(401, {}, told, NOW, secrets=secrets)
        assert isinstance(verdict, Refused)
        assert verdict.why.replace('"', "") == "HTTP 401: said *** twice"
    for before in range(1900, 2010):
        verdict = read_reply(
            401, {}, b"gate/way+0123" * 150 + b"x" * (before - 1950) + b"gate/way+0123", NOW, secrets=secrets
        )
        assert "gate" not in str(verdict)


def test_what_is_too_short_for_a_key_stays() -> None:
    """It could be any word of PostHog's."""
    assert read_reply(400, {}, b"a bad batch", NOW, secrets=["a"]) == Rejected("a bad batch")


@given(
    st.integers(100, 700),
    st.dictionaries(st.sampled_from(["retry-after", "date", "location", "content-type"]), st.text()),
    st.binary(),
)
def test_any_reply_has_a_verdict(status: int, headers: dict[str, str], body_start: bytes) -> None:
    """No reply, however odd, is an exception."""
    verdict = read_reply(status, headers, body_start, NOW)
    if isinstance(verdict, Retry):
        assert verdict.after is None or 0 <= verdict.after <= LONGEST_AFTER
    if isinstance(verdict, Accepted):
        assert 200 <= status <= 299


@pytest.mark.parametrize(
    ("headers", "clock"),
    [({"date": DATE}, NOW + 500_000), ({}, None), ({"date": "now"}, None), ({"date": "x" * 10_000}, None)],
)
def test_the_servers_clock(headers: dict[str, str], clock: int | None) -> None:
    """What it shows is told to the second, so half a second is the best guess."""
    assert server_clock(headers) == clock
