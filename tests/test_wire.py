"""`agent.deliver.wire`: a body that PostHog reads, and one right verdict for each of its replies."""

import gzip
import json
import random
import zlib
from datetime import datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent import __version__, pack
from agent.deliver import wire
from agent.deliver.wire import Accepted, Batch, Damaged, Refused, Rejected, Retry, Split, Verdict
from agent.events import Chunk, Instant

NOW = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z


def chunk(*events: bytes, boot: str = "b", received_at: int = NOW, monotonic: int = 0) -> Chunk:
    data = b",".join(events)
    return Chunk(
        project="default",
        events=len(events),
        size=len(data),
        crc=pack.crc32(data),
        received_at=received_at,
        boot=boot,
        monotonic=monotonic,
        packed=pack.deflate(data),
    )


def batch(*pieces: Chunk) -> Batch:
    size = sum(piece.size for piece in pieces) + len(pieces) - 1
    return Batch(
        project="default", key=None, pieces=pieces, events=sum(piece.events for piece in pieces), size=size
    )


def typical(number: int, rng: random.Random) -> bytes:
    """An event such as a web application sends, about 300 bytes."""
    properties = {
        "$lib": "capture-agent",
        "plan": rng.choice(["free", "pro", "team"]),
        "amount": round(rng.random() * 100, 2),
        "path": f"/app/{rng.choice(['home', 'list', 'item'])}/{rng.randrange(1000)}",
        "duration_ms": rng.randrange(3000),
    }
    return json.dumps(
        {
            "event": rng.choice(["page viewed", "signup", "file opened"]),
            "distinct_id": f"user-{rng.randrange(5000)}",
            "properties": properties,
            "timestamp": f"2026-01-01T12:00:{number % 60:02d}.{rng.randrange(1000000):06d}Z",
            "uuid": str(UUID(int=rng.getrandbits(128))),
        }
    ).encode()


def built(
    sent: Batch, compression: wire.Compression = "gzip", key: str = "phc_k", historical: bool = False
) -> bytes:
    body = wire.body(
        sent, key, "2026-01-01T00:00:00.000Z", historical_migration=historical, compression=compression
    )
    assert isinstance(body, bytes)
    return body


# ---- the request


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.text(min_size=1))
def test_a_body_holds_every_event_once(sizes: list[int], key: str) -> None:
    """Whatever chunks a batch is made of, PostHog finds one array with all events in their order."""
    numbers = iter(range(sum(sizes)))
    pieces = [chunk(*(b'{"n":%d}' % next(numbers) for _ in range(size))) for size in sizes]
    packed, plain = built(batch(*pieces), key=key), built(batch(*pieces), "none", key=key)
    reader = zlib.decompressobj(31)
    assert reader.decompress(packed) == plain
    assert (reader.eof, reader.unused_data) == (True, b"")
    assert json.loads(plain) == {
        "api_key": key,
        "sent_at": "2026-01-01T00:00:00.000Z",
        "batch": [{"n": number} for number in range(sum(sizes))],
    }


def test_large_chunks_travel_unopened() -> None:
    """The packed bytes of a busy host's chunks are in the body as they rested on disk."""
    pieces = [chunk(*(b'{"n":%d}' % number for number in range(500))) for _ in range(3)]
    body = built(batch(*pieces))
    assert all(piece.packed in body for piece in pieces)


def test_many_small_chunks_are_one_stream() -> None:
    """A busy host that receives its events one by one still sends one gzip member of all."""
    rng = random.Random(1)
    pieces = [chunk(typical(number, rng)) for number in range(600)]
    assert batch(*pieces).size > wire.TIGHT_SIZE
    body = built(batch(*pieces))
    assert len(json.loads(gzip.decompress(body))["batch"]) == 600


@pytest.mark.parametrize("count", [50, 500, 1000])
@pytest.mark.parametrize("each", [1, 2, 5, 16, 50, 64, 100])
def test_small_chunks_cost_few_bytes(count: int, each: int) -> None:
    """On a quiet host the bytes on the wire are at most 1.2 times those of the batch gzipped whole."""
    rng = random.Random(7)
    events = [typical(number, rng) for number in range(count)]
    pieces = [chunk(*events[start : start + each]) for start in range(0, count, each)]
    body = built(batch(*pieces))
    assert len(body) <= 1.2 * len(gzip.compress(gzip.decompress(body)))


def test_historical_migration_is_told_at_the_root() -> None:
    """It is a boolean beside the batch, and absent where it is not wanted."""
    assert json.loads(built(batch(chunk(b"{}")), "none", historical=True))["historical_migration"] is True
    assert b"historical" not in built(batch(chunk(b"{}")), "none")


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_a_damaged_chunk_is_named(compression: wire.Compression) -> None:
    """A chunk that cannot be opened is told apart from its neighbours, so that only it is shed."""
    broken = replace(chunk(b"{}"), crc=1)
    sent = batch(chunk(b"{}"), broken)
    body = wire.body(sent, "k", "now", historical_migration=False, compression=compression)
    assert isinstance(body, Damaged)
    assert body.chunk is broken
    assert body.why


def test_configured_headers_cannot_break_the_body() -> None:
    """What frames and codes the body is ours; everything else is the operator's, the User-Agent too."""
    configured = {
        "content-length": "5",
        "Content-Encoding": "br",
        "TRANSFER-ENCODING": "chunked",
        "Host": "elsewhere",
        "content-type": "text/plain",
        "Connection": "close",
        "Expect": "100-continue",
        "X-Team": "data",
    }
    assert wire.headers(configured, "gzip") == {
        "User-Agent": f"capture-agent/{__version__}",
        "Accept-Encoding": "identity",
        "X-Team": "data",
        "Content-Type": "application/json",
        "Content-Encoding": "gzip",
    }
    assert wire.headers({"user-agent": "mine", "accept-encoding": "gzip"}, "none") == {
        "user-agent": "mine",
        "accept-encoding": "gzip",
        "Content-Type": "application/json",
    }


# ---- clocks


@pytest.mark.parametrize(
    ("stamped", "now", "expected"),
    [
        (chunk(monotonic=100), Instant(NOW + 9_000_000, 9_000_100, "b"), "2026-01-01T00:00:09.000Z"),
        # The clock was set forward a year while the chunk waited: still told by the old one.
        (chunk(monotonic=0), Instant(NOW + 10**13, 1_500_000, "b"), "2026-01-01T00:00:01.500Z"),
        # A board that booted in 1970 and was set right since: PostHog's correction undoes the 1970.
        (chunk(received_at=5_000_000, monotonic=5), Instant(NOW, 1_000_005, "b"), "1970-01-01T00:00:06.000Z"),
        # Another boot: nothing but the wall clock is left.
        (chunk(boot="a", monotonic=10**15), Instant(NOW + 2_000, 5, "b"), "2026-01-01T00:00:00.002Z"),
        # Nor do two boots without a name have to be the same one.
        (chunk(boot="", monotonic=0), Instant(NOW, 5_000_000, ""), "2026-01-01T00:00:00.000Z"),
        # A clock of the same name that runs backwards is not that clock.
        (chunk(monotonic=10**15), Instant(NOW, 5, "b"), "2026-01-01T00:00:00.000Z"),
    ],
)
def test_sent_at_is_told_in_the_chunks_clock(stamped: Chunk, now: Instant, expected: str) -> None:
    """Event time less `sent_at` is the time that passed since, whatever the wall clock did."""
    assert wire.sent_at(stamped, now) == expected


@given(st.integers(0, 4 * 10**15))
def test_sent_at_is_rfc_3339(at: int) -> None:
    """Every moment is written in UTC with milliseconds and a Z."""
    text = wire.sent_at(chunk(received_at=at), Instant(at, 0, "b"))
    assert len(text) == 24
    assert text.endswith("Z")
    assert abs(datetime.fromisoformat(text).timestamp() * 1e6 - at) < 1001


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (chunk(monotonic=0), chunk(received_at=NOW + 10**12, monotonic=10**12), True),
        (chunk(monotonic=0), chunk(received_at=NOW + 1_000_000, monotonic=0), True),
        (chunk(monotonic=0), chunk(received_at=NOW + 1_000_001, monotonic=0), False),
        (chunk(received_at=0, monotonic=0), chunk(monotonic=60_000_000), False),
        (chunk(), chunk(boot="another"), False),
    ],
)
def test_clocks_agree_within_a_second(one: Chunk, other: Chunk, together: bool) -> None:
    """Chunks share a batch where no step of the clock lies between them."""
    assert (wire.agree(one, other), wire.agree(other, one)) == (together, together)


# ---- the reply

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
    "599": (599, {}, b"", Retry(None, "")),
    "199": (199, {}, b"", Refused("host", "")),
    "600": (600, {}, b"", Refused("host", "")),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_reply_has_its_verdict(row: tuple[int, dict[str, str], bytes, Verdict]) -> None:
    """Each row of PostHog's status table, and each thing that answers in its place."""
    status, headers, body_start, expected = row
    verdict = wire.read_reply(status, headers, body_start, NOW)
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


@pytest.mark.parametrize(
    "page",
    [
        b"<html>",
        b"<HTML lang=en>",
        b"\xef\xbb\xbf<!doctype html>",
        b"\r\n\t <!DOCTYPE HTML PUBLIC>",
        b"<!-- portal --><html>",
        b"<script>location='/login'</script>",
        b'<meta http-equiv="refresh" content="0">',
        b"<head><title>x</title>",
        b"<html",
    ],
)
def test_html_is_known_by_its_beginning(page: bytes) -> None:
    """A portal that calls its page JSON is a portal all the same."""
    verdict = wire.read_reply(200, {"content-type": "application/json"}, page, NOW)
    assert isinstance(verdict, Refused)
    assert verdict.hold == "host"


@pytest.mark.parametrize("body", [b"<3", b"<headline>", b"ok <html>", b"<htmlish", b"1<a>"])
def test_what_is_not_html_is_not_taken_for_it(body: bytes) -> None:
    """A 2xx of any other body is an acceptance."""
    assert wire.read_reply(200, {}, body, NOW) == Accepted()


DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "after"),
    [
        ({}, None),
        ({"retry-after": "120"}, 120.0),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "9" * 400}, wire.LONGEST_AFTER),
        ({"retry-after": "86400"}, wire.LONGEST_AFTER),
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
        ({"retry-after": "Thu, 01 Jan 2099 00:00:30 GMT"}, wire.LONGEST_AFTER),
        ({"retry-after": "Thu, 99 Jan 2026 00:00:30 GMT"}, None),
        ({"retry-after": "Thu, 01 Jan 99999 00:00:30 GMT"}, None),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], after: float | None) -> None:
    """Seconds, fractions and dates are read; what is negative or absurd is bounded, other words ignored."""
    assert wire.read_reply(503, headers, b"", NOW) == Retry(after, "HTTP 503")


def test_a_verdicts_text_is_short_printable_and_without_keys() -> None:
    """PostHog's text goes to logs, status and dead letters."""
    told = b"bad key phc_abc-DEF_1 or phx_zzz\n\x1b[31m\x00 " + "é".encode() * 4000
    verdict = wire.read_reply(400, {}, told, NOW)
    assert isinstance(verdict, Rejected)
    assert verdict.reason.startswith("bad key *** or *** ")
    assert verdict.reason.isprintable()
    assert len(verdict.reason.encode()) <= wire.REASON_BYTES


@given(
    st.integers(100, 700),
    st.dictionaries(st.sampled_from(["retry-after", "date", "location", "content-type"]), st.text()),
    st.binary(),
)
def test_any_reply_has_a_verdict(status: int, headers: dict[str, str], body_start: bytes) -> None:
    """No reply, however odd, is an exception."""
    verdict = wire.read_reply(status, headers, body_start, NOW)
    if isinstance(verdict, Retry):
        assert verdict.after is None or 0 <= verdict.after <= wire.LONGEST_AFTER
    if isinstance(verdict, Accepted):
        assert 200 <= status <= 299
