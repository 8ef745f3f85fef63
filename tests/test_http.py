"""HTTP: what PostHog's SDKs send is in the buffer once they are told so, and hostile clients harm nobody."""

import gzip
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import trio
from processes import configure, running
from sources import Taken, http, origins, taking, tcp

from agent.accept import http as source
from agent.accept.whence import Whence, is_near
from agent.buffer import Limits
from agent.config import Secret
from agent.deliver.cargo import together
from agent.events import HISTORICAL, Origin
from agent.sink import Sink, serving

PATHS = ("/batch", "/capture", "/e", "/i/v0/e", "/track", "/engage")
V1 = "/i/v1/analytics/events"


def event(number: int = 0, **fields: object) -> dict[str, Any]:
    return {"event": "e", "distinct_id": "d", "properties": {"n": number}, "uuid": str(uuid4()), **fields}


def batch(*events: object, key: str = "phc_test") -> bytes:
    return json.dumps({"api_key": key, "batch": events}).encode()


@asynccontextmanager
async def client(taken: Taken) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{taken.source.address}", timeout=20) as made:
        yield made


async def test_every_endpoint_acknowledges() -> None:
    """With and without a slash at its end, packed and not: what was answered 200 is in the buffer."""
    async with taking(http()) as taken, client(taken) as sdk:
        for path in PATHS:
            answer = await sdk.post(path, content=batch(event(1)))
            assert (answer.status_code, answer.json()) == (200, {"status": "Ok"})
            packed = gzip.compress(batch(event(2)))
            answer = await sdk.post(path + "/", content=packed, headers={"content-encoding": "gzip"})
            assert answer.status_code == 200
            assert taken.buffer.stats().events == taken.total("accepted")
        one = json.dumps({**event(3), "token": "phc_test"})
        assert (await sdk.get("/e/", params={"data": one})).status_code == 200
        assert (await sdk.post("/e/", params={"beacon": "1"}, content=one)).status_code == 204
        assert len(await taken.events(2 * len(PATHS) + 2)) == taken.total("received")


async def test_the_answers_of_posthog() -> None:
    """Health, what is not there, what is not allowed, and what is wrong."""
    async with taking(http(max_body=10_000)) as taken, client(taken) as sdk:
        for path in ("/", "/_readiness", "/_liveness"):
            assert (await sdk.get(path)).text == "capture"
        assert (await sdk.get("/nothing")).status_code == 404
        assert (await sdk.put("/batch/", content=b"{}")).status_code == 405
        assert (await sdk.get(V1)).status_code == 405
        for content, status, text in (
            (b"", 400, "request missing data payload"),
            (b"{", 400, "failed to parse request: Input data was truncated"),
            (batch(), 400, "request holds no event"),
            (batch(event(), key=""), 401, "API key is not valid: empty"),
            (batch({"event": "", "distinct_id": "d"}), 400, "event submitted with an empty event name"),
            (b" " * 10_001, 413, "maximum event size exceeded: Request body exceeds the limit"),
            (gzip.compress(b" " * 10_001), 413, "maximum event size exceeded: Decompressed payload"),
        ):
            answer = await sdk.post("/batch/", content=content)
            assert (answer.status_code, answer.text[: len(text)]) == (status, text)
        assert taken.total("rejected", "missing_event") == 1


async def test_good_events_are_taken_whatever_the_others_are() -> None:
    """The answer is 200, the bad ones are counted by their reasons, the books balance."""
    async with taking(http()) as taken, client(taken) as sdk:
        nan = batch(event(1), event(2)).replace(b'"n": 2', b'"n": NaN')
        assert (await sdk.post("/batch/", content=nan)).status_code == 200
        assert (await sdk.post("/batch/", content=batch(event(1), {"event": "e"}))).status_code == 200
        assert taken.total("received") == 4
        assert taken.total("accepted") == 2
        assert (
            taken.total("rejected", "malformed_json") == taken.total("rejected", "missing_distinct_id") == 1
        )


HEADERS = {
    "authorization": "Bearer phc_test",
    "content-type": "application/json",
    "posthog-sdk-info": "posthog-node/5.0",
    "posthog-attempt": "1",
    "posthog-request-id": str(uuid4()),
    "posthog-request-timestamp": "2026-11-24T12:00:00Z",
}
STRANGE = {"authorization": "Bearer phc_strange"}
WRONG = {"authorization": "Bearer phx_mine"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
V1_BATCH = json.dumps({"batch": [event(1), event(2), event(3)]}).encode()


@pytest.mark.parametrize(
    ("path", "headers", "content", "status", "reason", "events"),
    [
        ("/batch", {}, batch(event(1), event(2), key="phc_strange"), 401, "unknown_key", 2),
        ("/batch", {}, batch(*[event()] * 5000, key="phc_strange"), 401, "unknown_key", 5000),
        ("/batch", {}, batch(event(1), event(2), key="phx_mine"), 401, "unknown_key", 2),
        ("/e", {}, json.dumps([event(1), event(2)]).encode(), 401, "unknown_key", 2),
        ("/e", {}, json.dumps([event(token="a"), event(token="b")]).encode(), 401, "unknown_key", 2),
        ("/batch", {}, b"nonsense", 400, "malformed_json", 1),
        ("/batch", {}, b"\x1f\x8b\x08", 400, "malformed_json", 1),
        ("/e", FORM, b"nonsense", 400, "malformed_json", 1),
        ("/batch", {}, b" " * 1_000_001, 413, "too_large", 1),
        ("/batch", {}, gzip.compress(b" " * 1_000_001), 413, "too_large", 1),
        ("/batch", {}, b" " * 2_000_001, 413, "too_large", 1),
        ("/batch", {}, b" " * 5_000_000, 413, "too_large", 1),
        ("/batch", {}, b"", 400, None, 0),
        ("/batch", {}, batch(), 400, None, 0),
        (V1, HEADERS | STRANGE, V1_BATCH, 401, "unknown_key", 3),
        (V1, HEADERS | WRONG, V1_BATCH, 401, "unknown_key", 3),
        (V1, {}, V1_BATCH, 401, "unknown_key", 3),
        (V1, HEADERS | {"posthog-attempt": "0"}, V1_BATCH, 400, "malformed_json", 3),
        (V1, HEADERS | {"content-encoding": "br"}, V1_BATCH, 415, "malformed_json", 1),
        (V1, HEADERS, b"nonsense", 400, "malformed_json", 1),
        (V1, HEADERS, b'{"batch":[]}', 400, None, 0),
        (V1, HEADERS, b" " * 1_000_001, 413, "too_large", 1),
    ],
)
@pytest.mark.parametrize("chunked", [True, False])
async def test_what_is_refused_as_a_whole_is_counted(
    path: str,
    headers: dict[str, str],
    content: bytes,
    status: int,
    reason: str | None,
    events: int,
    *,
    chunked: bool,
) -> None:
    """Its events are in the books, as many as it can be told there are, before the client is answered."""

    async def pieces() -> AsyncIterator[bytes]:
        yield content

    async with taking(http(keys="configured", max_body=1_000_000)) as taken, client(taken) as sdk:
        answer = await sdk.post(path, headers=headers, content=pieces() if chunked else content)
        assert answer.status_code == status
        assert taken.total("received") == events
        assert reason is None or taken.total("rejected", reason) == events
        refusals = {(one.reason, one.sample) for one in taken.source.putter.recent}
        assert refusals == ({(reason, f"a request to {path}")} if reason else set())
        assert "phc_strange" not in str(refusals)


async def test_answers_are_counted_by_status() -> None:
    """Whatever was asked, since the start; what was never answered is there, at 0."""
    async with taking(http()) as taken, client(taken) as sdk:
        assert taken.source.answers is not None
        assert set(taken.source.answers.values()) == {0}
        await sdk.post("/batch/", content=batch(event()))
        await sdk.post("/batch/", content=b"nonsense")
        for _ in range(2):
            await sdk.get("/nothing")
        await sdk.get("/")
        found = {status: count for status, count in taken.source.answers.items() if count}
        assert found == {200: 2, 400: 1, 404: 2}
    async with taking(tcp()) as other:
        assert other.source.answers is None


async def test_v1_tells_of_each_event() -> None:
    """A result for each uuid, with the headers that PostHog wants."""
    headers = HEADERS
    good, bad = event(1), event(2, distinct_id=" ")
    body = json.dumps({"created_at": "2026-11-24T12:00:00Z", "batch": [good, bad]})
    async with taking(http()) as taken, client(taken) as sdk:
        told = origins(taken)
        answer = await sdk.post(V1, content=body, headers=headers)
        assert (answer.status_code, answer.json()["results"]) == (
            200,
            {
                good["uuid"]: {"result": "ok"},
                bad["uuid"]: {"result": "drop", "details": "missing_distinct_id"},
            },
        )
        assert told[0] is not None
        named = {name: json.loads(bytes(raw)) for name, raw in told[0].defaults.items()}
        assert named == {"$lib": "posthog-node", "$lib_version": "5.0", "$geoip_disable": True}
        answer = await sdk.post(V1, content=body, headers={**headers, "authorization": "Basic x"})
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_header_value")


@pytest.mark.parametrize(
    ("keys", "key", "status", "project", "kept"),
    [
        ("any", "phc_test", 200, None, None),
        ("any", "phc_other", 200, "other one", None),
        ("any", "phc_strange", 200, None, "phc_strange"),
        ("configured", "phc_test", 200, None, None),
        ("configured", "phc_other", 200, "other one", None),
        ("configured", "phc_strange", 401, None, None),
    ],
)
async def test_keys(keys: Any, key: str, status: int, project: str | None, kept: str | None) -> None:
    """A configured project's key names the project, another is kept with its events, or refused."""
    async with taking(http(keys=keys)) as taken, client(taken) as sdk:
        told = origins(taken)
        answer = await sdk.post("/batch/", content=batch(event(), key=key))
        assert answer.status_code == status
        assert [(origin.project, origin.key) for origin in told if origin] == [(project, kept)] * (
            status == 200
        )


@pytest.mark.parametrize(
    ("trusted", "forwarded", "found"),
    [
        ((), "8.8.8.8", None),  # anybody can say anything
        (("127.0.0.0/8",), "8.8.8.8", "8.8.8.8"),
        (("127.0.0.1",), "1.2.3.4, 8.8.8.8:1234", "8.8.8.8"),
        (("127.0.0.1", "8.8.8.0/24"), "1.2.3.4, 8.8.8.8", "1.2.3.4"),
        (("127.0.0.1",), "10.1.2.3", None),
        (("127.0.0.1",), "[2606:4700::1]:443", "2606:4700::1"),
    ],
)
async def test_a_client_s_address(trusted: Sequence[str], forwarded: str, found: str | None) -> None:
    """It is told to the door; one that says nothing of a place is not looked up."""
    async with taking(http(trusted_proxies=tuple(trusted))) as taken, client(taken) as sdk:
        told = origins(taken)
        await sdk.post("/batch/", content=batch(event()), headers={"x-forwarded-for": forwarded})
        assert told[0] is not None
        named = {name: json.loads(bytes(raw)) for name, raw in told[0].defaults.items()}
        assert named == ({"$ip": found} if found else {"$geoip_disable": True})


@pytest.mark.parametrize(
    ("hiding", "shown"),
    [({"redact": ("@ip",)}, None), ({"redact": ("$ip",)}, None), ({"hash": ("$ip",)}, "hash")],
)
async def test_an_address_that_is_to_be_hidden(hiding: dict[str, Any], shown: str | None) -> None:
    """What the door adds is hidden like what came, and then PostHog is not to look up this host's place."""
    settings = http(trusted_proxies=("127.0.0.1",), hash_key=Secret("k" * 16), **hiding)
    async with taking(settings) as taken, client(taken) as sdk:
        await sdk.post("/batch/", content=batch(event()), headers={"x-forwarded-for": "8.8.8.8"})
        (one,) = await taken.events(1)
        assert one["properties"]["$geoip_disable"] is True
        assert "8.8.8.8" not in json.dumps(one)
        assert ("$ip" in one["properties"]) == (shown is not None)


async def test_a_rate_takes_a_batch_or_leaves_it() -> None:
    """An SDK throws a whole batch away on a 200: one that is not wholly taken comes again, and is counted."""
    async with taking(http(max_events_per_second=10, burst=10)) as taken, client(taken) as sdk:
        assert (await sdk.post("/batch/", content=batch(*map(event, range(8))))).status_code == 200
        answer = await sdk.post("/batch/", content=batch(*map(event, range(8))))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        await trio.sleep(1)
        assert (await sdk.post("/batch/", content=batch(*map(event, range(30))))).status_code == 200
        await taken.events(38)
        assert (taken.total("accepted"), taken.total("rejected", "rate_limited")) == (38, 8)


@pytest.mark.parametrize("blank", [None, ""])
async def test_an_event_with_a_blank_address_has_none(blank: str | None) -> None:
    """It gets the client's or, from this host, is not looked up, unless it says itself what is wanted."""
    blanked = [event(properties={"$ip": blank}), event(properties={"$ip": blank, "$geoip_disable": False})]
    async with taking(http(trusted_proxies=("127.0.0.1",))) as taken, client(taken) as sdk:
        for forwarded in ("8.8.8.8", "10.1.2.3"):
            await sdk.post("/batch/", content=batch(*blanked), headers={"x-forwarded-for": forwarded})
        assert [one["properties"] for one in await taken.events(4)] == [
            {"$ip": "8.8.8.8"},
            {"$ip": "8.8.8.8", "$geoip_disable": False},
            {"$geoip_disable": True},
            {"$geoip_disable": False},
        ]


async def test_nothing_is_added_where_nothing_is_lacking() -> None:
    """Events that say themselves whether they may be looked up pass as they came."""
    async with taking(http()) as taken, client(taken) as sdk:
        told = origins(taken)
        await sdk.post("/batch/", content=batch(event(properties={"$geoip_disable": False})))
        assert told == [Origin()]


def test_addresses() -> None:
    """Of a chain of proxies the last that is not trusted; of nonsense what came before it."""
    whence = Whence(["10.0.0.0/8", "::1", "fd00::/8"])
    for peer, forwarded, found in (
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "nonsense", "10.0.0.1"),
        ("10.0.0.1", "9.9.9.9, nonsense", "10.0.0.1"),
        ("10.0.0.1", "9.9.9.9,10.2.2.2 , 10.3.3.3", "9.9.9.9"),
        ("::ffff:10.0.0.1", "9.9.9.9", "9.9.9.9"),
        ("::1", "fd00::1%eth0", "fd00::1"),
        ("9.9.9.9", "8.8.8.8", "9.9.9.9"),
        ("10.0.0.1", "9.9.9.9," + "10.0.0.1," * 10_000 + "10.0.0.2", "10.0.0.1"),
    ):
        assert str(whence.address(peer, forwarded)) == found
    assert whence.address("", "") is None
    assert is_near(None)


async def test_a_full_buffer_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `Retry-After`; meanwhile no try takes another copy; with room again there is one of each event."""
    monkeypatch.setattr(source, "PATIENCE_SECONDS", 0.2)
    async with taking(http(), max_size=16 * 2**20) as taken, client(taken) as sdk:
        filler = {"event": "e", "distinct_id": "d", "properties": {"t": "".join(map(str, range(100_000)))}}
        while (answer := await sdk.post("/batch/", content=batch(filler))).status_code == 200:
            pass
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.text == "transient error, please retry"
        for _ in range(5):
            assert (await sdk.post("/batch/", content=batch(event(7)))).status_code == 503
        while (lease := await taken.buffer.take(Limits(10_000, 2**30), "default")) is not None:
            await taken.buffer.settle(lease)
        assert (await sdk.post("/batch/", content=batch(event(7)))).status_code == 200
        assert [one for one in await taken.events(1) if one["properties"] == {"n": 7}][1:] == []


async def test_newest_dropped_is_a_503_too() -> None:
    """What was shed was not taken, and the SDK may come again."""
    async with taking(http(), max_size=16 * 2**20, when_full="drop_newest") as taken, client(taken) as sdk:
        filler = {"event": "e", "distinct_id": "d", "properties": {"t": "".join(map(str, range(100_000)))}}
        while (answer := await sdk.post("/batch/", content=batch(filler))).status_code == 200:
            pass
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert taken.total("shed", "full_newest") == 1


async def test_a_large_body_is_put_in_pieces() -> None:
    """Every event of it, in order, while others are served."""
    events = [event(number, distinct_id=f"d{number}", properties={"n": number}) for number in range(12_000)]
    async with taking(http()) as taken, client(taken) as sdk:
        answer = await sdk.post("/batch/", content=gzip.compress(batch(*events, {"event": ""})))
        assert answer.status_code == 200
        found = await taken.events(12_000)
        assert [one["properties"]["n"] for one in found] == list(range(12_000))
        assert taken.total("rejected", "missing_event") == 1


async def send_raw(taken: Taken, text: bytes) -> bytes:
    """The answer to bytes; the connection is kept open until it has come."""
    host, _, port = taken.source.address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(text)
        answer = b""
        while b"\r\n\r\n" not in answer and (some := await stream.receive_some(65536)):
            answer += some
        return answer


async def test_slow_bodies_are_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stalls in its body is left after a while, whatever it trickled."""
    monkeypatch.setattr(source, "BODY_SECONDS", 0.2)
    async with taking(http()) as taken:
        answer = await send_raw(taken, b"POST /batch/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408")


async def test_a_body_that_brings_nothing_gives_its_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a 408 long before one that trickles, and what it held is there for others."""
    monkeypatch.setattr(source, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(source, "BODIES_BYTES", 100_000)
    async with taking(http(max_body=50_000)) as taken, client(taken) as sdk:
        head = b"POST /batch/ HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n"
        answers = []

        async def stall() -> None:
            answers.append((await send_raw(taken, head + b" " * 45_000))[:12])

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(stall)
        assert answers == [b"HTTP/1.1 408"] * 2
        assert (await sdk.post("/batch/", content=batch(event()).ljust(50_000))).status_code == 200
        assert taken.total("received") == 1  # who stalled comes again


async def test_a_body_that_trickles_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow is not silent; its events came when it was whole."""
    monkeypatch.setattr(source, "SILENCE_SECONDS", 1.0)

    body = batch(event())

    async def slowly() -> AsyncIterator[bytes]:
        for piece in (body[:9], body[9:12], body[12:]):
            await trio.sleep(0.4)
            last.append(datetime.now(UTC))
            yield piece

    last: list[datetime] = []
    async with taking(http()) as taken, client(taken) as sdk:
        assert (await sdk.post("/batch/", content=slowly())).status_code == 200
        [one] = await taken.events(1)
        assert datetime.fromisoformat(one["timestamp"]) >= last[-1]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /batch/ HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    ],
)
async def test_who_keeps_us_waiting_leaves_for_who_comes(text: bytes) -> None:
    """Says he nothing, or half of it, or is he done: his place is the next client's."""
    async with taking(http(max_connections=2)) as taken:
        host, _, port = taken.source.address.rpartition(":")
        async with AsyncExitStack() as stack:
            for _ in range(5):
                idle = await stack.enter_async_context(await trio.open_tcp_stream(host, int(port)))
                await idle.send_all(text)
            async with client(taken) as sdk:
                assert (await sdk.post("/batch/", content=batch(event()))).status_code == 200


async def test_a_client_that_waits_for_us_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose request is under way is answered; who comes waits."""
    monkeypatch.setattr(source, "PATIENCE_SECONDS", 0.7)
    async with taking(http(max_connections=1), max_size=16 * 2**20) as taken, client(taken) as sdk:
        filler = {"event": "e", "distinct_id": "d", "properties": {"t": "".join(map(str, range(100_000)))}}
        while (await sdk.post("/batch/", content=batch(filler))).status_code == 200:
            pass
        answers: list[int] = []

        async def post() -> None:
            async with client(taken) as another:
                answers.append((await another.post("/batch/", content=batch(event()))).status_code)

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(post)
        assert answers == [503, 503]
        while (lease := await taken.buffer.take(Limits(10_000, 2**30), "default")) is not None:
            await taken.buffer.settle(lease)


async def test_bodies_share_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it a client is told to come again; what others hold stays."""
    monkeypatch.setattr(source, "BODIES_BYTES", 100_000)
    async with taking(http(max_body=50_000)) as taken, client(taken) as sdk:
        host, _, port = taken.source.address.rpartition(":")
        head = b"POST /batch/ HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n"
        async with AsyncExitStack() as stack:
            for _ in range(2):
                connecting = await trio.open_tcp_stream(host, int(port))
                stream = await stack.enter_async_context(connecting)
                await stream.send_all(head + b" " * 45_000)
            while (answer := await sdk.post("/batch/", content=batch(event()).ljust(20_000))).is_success:
                await trio.sleep(0.005)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        while not (await sdk.post("/batch/", content=batch(event()).ljust(20_000))).is_success:
            await trio.sleep(0.005)  # what those held who left is there again


@pytest.mark.parametrize(
    "text",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /batch/ HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /batch/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /\xff HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"GET /e/?data=%ff&_=\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        (
            b"GET /e HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        ),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01" + bytes(100),
        b"{}\n\n",
    ],
)
async def test_what_is_no_http_ends_only_itself(text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The next client is served, and nobody fills the log."""
    async with taking(http()) as taken, client(taken) as sdk:
        with trio.move_on_after(0.3):
            await send_raw(taken, text)
        assert (await sdk.post("/batch/", content=batch(event()))).status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_client_that_leaves_harms_nobody() -> None:
    """Its events are taken if they were whole, and nothing of it stays."""
    async with taking(http()) as taken, client(taken) as sdk:
        host, _, port = taken.source.address.rpartition(":")
        for body in (batch(event(1)), batch(event(2))[:-5]):
            with socket.create_connection((host, int(port))) as gone:
                size = len(batch(event(1)))
                gone.sendall(b"POST /e HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + body)
        await taken.settled(1)
        assert (await sdk.post("/batch/", content=batch(event(3)))).status_code == 200
        while taken.source.connections:
            await trio.sleep(0.005)
        assert taken.total("accepted") == 2


PREFLIGHT = {"origin": "https://shop.example", "access-control-request-headers": "content-type,x-a"}


@pytest.mark.parametrize(
    ("cors", "allowed"),
    [((), False), (("https://shop.example",), True), (("https://other.example",), False), (("*",), True)],
)
async def test_web_pages_may_send_where_they_are_allowed(cors: tuple[str, ...], allowed: bool) -> None:
    """As PostHog answers a browser; by default no page of any site may use the visitor's own agent."""
    async with taking(http(cors=cors)) as taken, client(taken) as browser:
        for answer in (
            await browser.options("/e/", headers=PREFLIGHT),
            await browser.post("/e/", content=batch(event()), headers=PREFLIGHT),
        ):
            assert answer.status_code == 200
            assert answer.headers.get("access-control-allow-origin") == (
                PREFLIGHT["origin"] if allowed else None
            )
            assert ("access-control-allow-credentials" in answer.headers) is allowed
        preflight = await browser.options("/e/", headers=PREFLIGHT)
        assert preflight.headers.get("access-control-allow-headers") == (
            "content-type,x-a" if allowed else None
        )


async def test_a_stop_answers_what_is_under_way() -> None:
    """A request that came before the stop is taken and answered."""
    async with taking(http()) as taken:
        host, _, port = taken.source.address.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as late:
            body = batch(event())
            await late.send_all(b"POST /e HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
            while not taken.source.connections:
                await trio.sleep(0.005)
            taken.stop.set()
            await late.send_all(body)
            assert (await late.receive_some(100)).startswith(b"HTTP/1.1 200")
        assert taken.total("accepted") == 1


def with_http(folder: Path, url: str, port: int) -> Path:
    """A configuration with an HTTP source."""
    file = configure(folder, url)
    file.write_text(file.read_text() + f'[[source]]\nkind = "http"\nlisten = "127.0.0.1:{port}"\n')
    return file


async def test_what_was_acknowledged_survives(tmp_path: Path) -> None:
    """The agent is killed at once after its 200: the next one delivers the events, as the SDK made them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    events = [event(number, timestamp="2026-11-24T12:00:00.000Z") for number in range(100)]
    async with running(with_http(tmp_path, "http://127.0.0.1:9", port)) as agent:
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=10)) as sdk:
            answer = await sdk.post(f"http://127.0.0.1:{port}/batch/", content=batch(*events))
        assert answer.status_code == 200
        [told] = [one for one in (await agent.status())["sources"] if one["kind"] == "http"]
        assert told["http_answers"] == {"200": 1}
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as pages:
            metrics = (await pages.get("/metrics")).text
        assert 'capture_agent_http_answers_total{source="http",status="200"} 1.0' in metrics
        assert 'capture_agent_http_answers_total{source="http",status="503"} 0.0' in metrics
        assert 'capture_agent_events_rejected_total{reason="unknown_key",source="http"} 0.0' in metrics
        agent.send(signal.SIGKILL)
    sink = Sink()
    async with serving(sink) as url, running(with_http(tmp_path, url, port)):
        with trio.fail_after(20):
            await sink.wait_for(100)
    assert {one.uuid: one.given for one in sink.events} == {
        one["uuid"]: "2026-11-24T12:00:00.000000Z" for one in events
    }


def test_the_server_is_not_loaded_before_others_take_events() -> None:
    """It takes longer to load than their clients should wait."""
    script = (
        "import agent.app, sys; sys.exit(any(name in sys.modules for name in ('hypercorn', 'starlette')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


async def test_old_events_are_told_apart() -> None:
    """What an SDK sends as a migration goes to PostHog as one, and never in a request with others."""
    async with taking(http()) as taken, client(taken) as sdk:
        old = {"api_key": "phc_test", "historical_migration": True, "batch": [event(1)]}
        for content in (batch(event(2)), json.dumps(old), batch(event(3))):
            assert (await sdk.post("/batch/", content=content)).status_code == 200
        lease = await taken.buffer.take(Limits(100, 2**20), "default")
        assert lease is not None
        assert [bool(chunk.marks & HISTORICAL) for chunk in lease.chunks] == [False, True, False]
        assert not together(lease.chunks[0], lease.chunks[1], "batch")
        assert together(lease.chunks[0], lease.chunks[2], "batch")
