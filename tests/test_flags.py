"""`agent.accept.flags`: over real sockets, before a PostHog that answers, fails, goes away and comes back."""

import gzip
import json
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import httpx
import pytest
import structlog
import trio

from agent import httpd
from agent.accept.flags import LONG_REPLIES, FlagCalls, upstream
from agent.config import Delivery, Project, Secret
from agent.httpc import WayOutError
from agent.httpd import Message, Receive, Send

FLAGS = {"flags": {"new-ui": {"key": "new-ui", "enabled": True}}, "errorsWhileComputingFlags": False}
DEFINITIONS = {"flags": [{"key": "new-ui"}], "group_type_mapping": {}, "cohorts": {}}
LOCAL = "/flags/definitions?token=phc_a&send_cohorts"
OLD_LOCAL = "/api/feature_flag/local_evaluation/?token=phc_a&send_cohorts"
BEARER = {"Authorization": "Bearer phs_secret-of-this-test"}
STALE = "x-capture-agent-stale"


class Terms(NamedTuple):
    """What of a source's settings is about flags."""

    flags_timeout: float = 5.0
    flags_max_age: float = 86400.0
    flags_cache: int = 16 * 1024 * 1024


class Asked(NamedTuple):
    """What arrived at PostHog."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes


class Said(NamedTuple):
    """What PostHog says: status, body, headers."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


def told(document: object, status: int = 200, **headers: str) -> Said:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Said(status, json.dumps(document).encode(), {"content-type": "application/json", **named})


class PostHog:
    """Answers as `script` says: a reply, or None for silence; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.script: Callable[[Asked], Said | None] = lambda _: told(FLAGS)

    def says(self, said: Said | None) -> None:
        self.script = lambda _: said

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        asked = Asked(scope["method"], scope["path"], scope["query_string"].decode(), headers, body)
        self.asked.append(asked)
        said = self.script(asked)
        if said is None:
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        raw = [(name.encode(), value.encode()) for name, value in said.headers.items()]
        if said.status not in (204, 304):
            raw.append((b"content-length", str(len(said.body)).encode()))
        await send({"type": "http.response.start", "status": said.status, "headers": raw})
        await send({"type": "http.response.body", "body": said.body})


@asynccontextmanager
async def serving(app: httpd.App, port: int = 0) -> AsyncIterator[str]:
    """An app on a port of this machine; it is closed when the block is left."""
    shutdown = trio.Event()
    with socket.create_server(("127.0.0.1", port)) as sock:
        serve = partial(
            httpd.serve, app, [sock], shutdown=shutdown, max_connections=50, grace=0.05, max_body=20 * 2**20
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
            shutdown.set()


class Agent(NamedTuple):
    """The agent's side: a client of it, its clock, and how it answered."""

    http: httpx.AsyncClient
    clock: list[float]
    counts: Counter[str]
    calls: FlagCalls

    async def flags(self, person: str = "u1", **headers: str) -> httpx.Response:
        """An evaluation, as posthog-python asks for it: the time of sending is another each time."""
        body = {"distinct_id": person, "api_key": "phc_a", "sent_at": f"{trio.current_time()}"}
        return await self.http.post("/flags/?v=4", json=body, headers=headers)


@asynccontextmanager
async def agent(
    host: str,
    terms: Terms | None = None,
    *,
    origins: tuple[str, ...] = (),
    client: str = "127.0.0.1",
    **delivery: object,
) -> AsyncIterator[Agent]:
    project = Project(host=host, delivery=Delivery(**delivery))  # type: ignore[arg-type]
    clock, counts = [1000.0], Counter[str]()
    calls = FlagCalls(
        project,
        terms or Terms(),
        client_of=lambda _: client,
        origins=origins,
        now=lambda: clock[0],
        count=lambda how: counts.update([how]),
    )
    with trio.fail_after(20):
        async with (
            calls,
            serving(calls) as url,
            httpx.AsyncClient(base_url=url, timeout=10, verify=False) as http,
        ):
            yield Agent(http, clock, counts, calls)


@asynccontextmanager
async def both(terms: Terms | None = None, **more: object) -> AsyncIterator[tuple[PostHog, Agent]]:
    posthog = PostHog()
    async with serving(posthog) as host, agent(host, terms, **more) as local:  # type: ignore[arg-type]
        yield posthog, local


def dead_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


# ---- while PostHog answers


@pytest.mark.parametrize(
    "path",
    [
        path + end
        for path in ("/flags", "/decide", "/flags/definitions", "/api/feature_flag/local_evaluation")
        for end in ("", "/")
    ],
)
async def test_a_call_is_passed_on_as_it_came(path: str) -> None:
    """Method, path, query and body arrive at PostHog, and its reply comes back."""
    query = "v=2&_=17&x=%C3%A4+b"
    async with both() as (posthog, local):
        for method in ("GET", "POST", "OPTIONS"):
            body = gzip.compress(b'{"distinct_id":"u1"}') if method == "POST" else b""
            packed = {"Content-Encoding": "gzip"} if body else {}
            reply = await local.http.request(
                method, f"{path}?{query}", content=body, headers={**packed, **BEARER}
            )
            asked = posthog.asked.pop()
            assert (asked.method, asked.path, asked.query, asked.body) == (method, path, query, body)
            assert asked.headers["authorization"] == BEARER["Authorization"]
            assert asked.headers.get("content-encoding") == packed.get("Content-Encoding")
            assert (reply.status_code, reply.json()) == (200, FLAGS)
            assert STALE not in reply.headers
        assert local.counts == {"passed": 3}


async def test_what_belongs_to_the_connection_is_not_passed_on() -> None:
    """Neither cookies nor the client's own host, nor PostHog's cookies back."""
    async with both() as (posthog, local):
        posthog.says(told(FLAGS, set_cookie="pod=7", x_posthog_rate_limit_warning="true", server="envoy"))
        reply = await local.flags(cookie="session=1", te="trailers", x_forwarded_for="6.6.6.6", via="1.1 x")
        (asked,) = posthog.asked
    assert not asked.headers.keys() & {"cookie", "te", "x-forwarded-for", "via"}
    assert asked.headers["host"].startswith("127.0.0.1:")
    assert asked.headers["host"] != local.http.base_url.netloc.decode()
    assert reply.headers["x-posthog-rate-limit-warning"] == "true"
    assert not reply.headers.keys() & {"set-cookie", "server"}


@pytest.mark.parametrize(
    ("client", "told_as"), [("8.8.8.8", "8.8.8.8"), ("10.0.0.5", None), ("127.0.0.1", None), ("", None)]
)
async def test_posthog_is_told_a_public_client(client: str, told_as: str | None) -> None:
    """An address that many networks have would be taken for somebody else."""
    async with both(client=client) as (posthog, local):
        await local.flags()
        assert posthog.asked[0].headers.get("x-forwarded-for") == told_as


async def test_configured_headers_are_added_but_not_in_a_clients_stead() -> None:
    """What a gateway wants is sent along; a client's own key stays its own."""
    headers = {"X-Gateway": Secret("g1"), "Authorization": Secret("Basic x")}
    async with both(headers=headers) as (posthog, local):
        await local.flags()
        await local.http.get(LOCAL, headers=BEARER)
        plain, keyed = posthog.asked
    assert (plain.headers["x-gateway"], plain.headers["authorization"]) == ("g1", "Basic x")
    assert (keyed.headers["x-gateway"], keyed.headers["authorization"]) == ("g1", BEARER["Authorization"])


@pytest.mark.parametrize("packed", [False, True])
async def test_an_answer_that_repeats_a_secret_is_not_passed_on(packed: bool) -> None:
    """A proxy that answers with what it was asked shows no client what is configured."""

    def reflect(asked: Asked) -> Said:
        said = json.dumps(dict(asked.headers)).encode()
        return Said(403, gzip.compress(said), {"content-encoding": "gzip"}) if packed else Said(403, said)

    async with both(headers={"X-Gateway": Secret("Bearer gate/secret-1")}) as (posthog, local):
        posthog.script = reflect
        reply = await local.flags(accept_encoding="gzip")
        assert (reply.status_code, "secret-1" in reply.text) == (503, False)
        posthog.says(told({"detail": "no"}, 403))
        assert (await local.flags()).status_code == 403


async def test_a_packed_reply_is_passed_on_packed() -> None:
    """The client gets the bytes that PostHog sent, and only what it can read, now and from memory."""
    packed = gzip.compress(json.dumps(FLAGS).encode())
    json_gzip = {"content-type": "application/json", "content-encoding": "gzip"}
    async with both() as (posthog, local):
        posthog.script = lambda asked: (
            Said(200, packed, json_gzip) if asked.headers["accept-encoding"] == "gzip" else told(FLAGS)
        )
        for accepted, coding in (("gzip, deflate, br", "gzip"), ("br", None)):
            assert (await local.flags(accept_encoding=accepted)).json() == FLAGS
            posthog.says(told({}, 503))
            reply = await local.flags(accept_encoding=accepted)
            assert (reply.json(), reply.headers.get("content-encoding")) == (FLAGS, coding)
            posthog.script = lambda asked: told(FLAGS)


async def test_a_web_page_may_ask_only_where_it_is_allowed() -> None:
    """Without permission PostHog hears of no page, and no page is shown the answer."""
    cors: dict[str, Any] = {"access_control_allow_origin": "https://shop.example"}
    for origins in ((), ("https://other.example",), ("https://shop.example",), ("*",)):
        async with both(origins=origins) as (posthog, local):
            posthog.says(told(FLAGS, **cors))
            reply = await local.flags(origin="https://shop.example")
            allowed = origins in (("https://shop.example",), ("*",))
            assert ("origin" in posthog.asked[0].headers) is allowed
            assert ("access-control-allow-origin" in reply.headers) is allowed


async def test_other_paths_and_methods_are_refused() -> None:
    """Only flag calls are passed on: the agent is no way to the rest of PostHog's API."""
    async with both() as (posthog, local):
        for path in ("/api/projects", "/flags/%2e%2e/api/projects", "/flags//", "/flagsx"):
            assert (await local.http.get(path)).status_code == 404
        refused = await local.http.delete("/flags")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, POST, OPTIONS")
        assert not posthog.asked
        assert local.counts == {"refused": 5}


async def test_a_clients_errors_are_posthogs_word() -> None:
    """A 4xx is passed on as it is, is not remembered, and no old reply stands in for it."""
    async with both() as (posthog, local):
        await local.flags()
        for status in (400, 401, 402, 403, 404, 413):
            posthog.says(told({"detail": "no"}, status))
            reply = await local.flags()
            assert (reply.status_code, reply.json()) == (status, {"detail": "no"})
        posthog.says(told({}, 503))
        assert (await local.flags()).status_code == 503


async def test_a_key_that_is_refused_has_nothing_to_fall_back_on() -> None:
    """Who may not see the flags any more does not see the old ones either; other errors take nothing."""
    async with both() as (posthog, local):
        for status, kept in ((400, True), (402, True), (401, False), (403, False)):
            posthog.says(told(DEFINITIONS))
            await local.http.get(LOCAL, headers=BEARER)
            posthog.says(told({}, status))
            await local.http.get(LOCAL, headers=BEARER)
            posthog.says(told({}, 500))
            assert (STALE in (await local.http.get(LOCAL, headers=BEARER)).headers) is kept


async def test_a_redirect_leads_back_to_the_agent_or_nowhere() -> None:
    """A client is told of another path, but never sent to another host with its key."""
    async with both() as (posthog, local):
        posthog.says(told({}, 301, location=OLD_LOCAL))
        assert (await local.http.get(LOCAL)).headers["location"] == OLD_LOCAL
        for place in ("http://portal.example/login", "//portal.example/", "", "http://[::1/"):
            posthog.says(told({}, 302, location=place))
            reply = await local.http.get(LOCAL)
            assert reply.status_code == 503
            assert "location" not in reply.headers


# ---- while it is away


async def test_away_and_back() -> None:
    """The last good reply stands in while nobody answers, says its age, and gives way to a new one."""
    port = dead_port()
    async with agent(f"http://127.0.0.1:{port}") as local:
        first = await local.flags()
        assert (first.status_code, first.headers["retry-after"]) == (503, "5")
        assert "earlier" in first.json()["detail"]
        posthog = PostHog()
        async with serving(posthog, port):
            assert STALE not in (await local.flags()).headers
        local.clock[0] += 40
        stale = await local.flags()
        assert (stale.status_code, stale.json(), stale.headers[STALE]) == (200, FLAGS, "40")
        posthog.says(told({**FLAGS, "requestId": "new"}))
        async with serving(posthog, port):
            assert (await local.flags()).json()["requestId"] == "new"
        assert (await local.flags()).json()["requestId"] == "new"
        assert local.counts == {"unavailable": 1, "passed": 2, "stale": 2}


PAGE = b"<!DOCTYPE html><title>Log in</title>"
HTML = {"content-type": "text/html"}
ABSENCES: dict[str, Said | None] = {
    "silence": None,
    "500": told({"detail": "x"}, 500),
    "502": Said(502, PAGE, HTML),
    "503": told({}, 503),
    "504": Said(504, b"upstream request timeout", {"content-type": "text/plain"}),
    "429": told({"type": "validation_error"}, 429),
    "a captive portal": Said(200, PAGE, HTML),
    "a captive portal that calls itself JSON": Said(200, PAGE, {"content-type": "application/json"}),
    "a captive portal elsewhere": Said(302, b"", {"location": "http://portal.example/"}),
    "a network that wants a login": Said(511, PAGE, HTML),
    "a firewall": Said(403, PAGE, HTML),
    "a proxy that wants a password": Said(407, b"", {}),
}


@pytest.mark.parametrize("absence", ABSENCES.values(), ids=ABSENCES)
async def test_whoever_answers_in_posthogs_stead_gets_no_say(absence: Said | None) -> None:
    """Silence, gateways, portals and limits: the call gets the last good reply, and only that call."""
    async with both(Terms(flags_timeout=0.5)) as (posthog, local):
        assert (await local.flags("u1")).status_code == 200
        posthog.says(absence)
        stale = await local.flags("u1")
        assert (stale.status_code, stale.json(), stale.headers[STALE]) == (200, FLAGS, "0")
        assert (await local.flags("u2")).status_code >= 403


@pytest.mark.parametrize("status", [429, 500])
async def test_without_an_old_reply_a_limit_is_told_as_it_is(status: int) -> None:
    """The client then knows how long to wait."""
    async with both() as (posthog, local):
        posthog.says(told({"detail": "slow down"}, status, retry_after="7"))
        reply = await local.flags()
        assert (reply.status_code, reply.headers["retry-after"]) == (status, "7")
        assert reply.json() == {"detail": "slow down"}


@pytest.mark.parametrize("poor", [{"errorsWhileComputingFlags": True}, {"quotaLimited": ["feature_flags"]}])
async def test_a_reply_without_all_flags_does_not_push_out_a_whole_one(poor: dict[str, object]) -> None:
    """It is passed on; but what is fallen back on later has the flags."""
    async with both() as (posthog, local):
        await local.flags()
        posthog.says(told({"flags": {}, **poor}))
        assert (await local.flags()).json() == {"flags": {}, **poor}
        posthog.says(told({}, 503))
        assert (await local.flags()).json() == FLAGS


async def test_a_reply_goes_only_to_whom_it_was_given() -> None:
    """Another person, key, project, version or path has nothing to fall back on."""
    async with both() as (posthog, local):
        posthog.says(told(DEFINITIONS))
        await local.http.get(LOCAL, headers=BEARER)
        posthog.says(told({}, 502))
        assert (await local.http.get(LOCAL, headers=BEARER)).json() == DEFINITIONS
        others = [
            (LOCAL, {}),
            (LOCAL, {"Authorization": "Bearer phs_other"}),
            (LOCAL.replace("phc_a", "phc_b"), BEARER),
            (OLD_LOCAL, BEARER),
            (LOCAL + "&v=2", BEARER),
        ]
        for path, headers in others:
            assert (await local.http.get(path, headers=headers)).status_code == 503
        assert (await local.http.post(LOCAL, headers=BEARER)).status_code == 503


async def test_an_old_reply_has_its_day() -> None:
    """Beyond `flags_max_age` there is none."""
    async with both(Terms(flags_max_age=100)) as (posthog, local):
        await local.flags()
        posthog.says(told({}, 502))
        local.clock[0] += 100
        assert (await local.flags()).headers[STALE] == "100"
        local.clock[0] += 1
        assert (await local.flags()).status_code == 503


async def test_memory_is_bounded_and_the_longest_unused_goes_first() -> None:
    """Of ten people's flags the cache holds the last few."""
    async with both(Terms(flags_cache=8000)) as (posthog, local):
        posthog.script = lambda asked: told({**FLAGS, "x": "y" * 1000, "body": asked.body.decode()})
        for person in range(10):
            await local.flags(f"u{person}")
        posthog.says(told({}, 502))
        kept = [person for person in range(10) if (await local.flags(f"u{person}")).status_code == 200]
    assert kept == list(range(10 - len(kept), 10))
    assert 2 <= len(kept) <= 6


# ---- tags


def tagged(asked: Asked, tag: str = 'W/"one"') -> Said:
    """Definitions with a tag, as PostHog answers for them."""
    headers = {"etag": tag, "cache_control": "private, must-revalidate"}
    if asked.headers.get("if-none-match") == tag:
        return told(None, 304, **headers)._replace(body=b"")
    return told(DEFINITIONS, 200, **headers)


async def test_a_poll_is_answered_304_and_keeps_the_reply_fresh() -> None:
    """The tag goes both ways; a 304 renews the age of the definitions that it stands for."""
    async with both(Terms(flags_max_age=50)) as (posthog, local):
        posthog.script = tagged
        first = await local.http.get(LOCAL, headers=BEARER)
        tag = {"If-None-Match": first.headers["etag"], **BEARER}
        for _ in range(3):
            local.clock[0] += 30
            poll = await local.http.get(LOCAL, headers=tag)
            assert (poll.status_code, poll.content, poll.headers["etag"]) == (304, b"", 'W/"one"')
            assert poll.headers["cache-control"] == "private, must-revalidate"
        assert [asked.headers.get("if-none-match") for asked in posthog.asked] == [None, *['W/"one"'] * 3]
        posthog.says(told({}, 502))
        local.clock[0] += 20
        unchanged = await local.http.get(LOCAL, headers=tag)
        assert (unchanged.status_code, unchanged.headers[STALE]) == (304, "20")
        full = await local.http.get(LOCAL, headers=BEARER)
        assert (full.json(), full.headers[STALE], full.headers["etag"]) == (DEFINITIONS, "20", 'W/"one"')


async def test_what_is_not_remembered_is_asked_for_whole() -> None:
    """An agent that started anew has something to fall back on after the first poll, which is a 304 still."""
    async with both() as (posthog, local):
        posthog.script = tagged
        poll = await local.http.get(LOCAL, headers={"If-None-Match": '"zero", W/"one"', **BEARER})
        assert (poll.status_code, poll.content) == (304, b"")
        posthog.says(told({}, 502))
        assert (await local.http.get(LOCAL, headers=BEARER)).json() == DEFINITIONS


async def test_an_out_of_date_reply_is_not_fallen_back_on() -> None:
    """A 304 for another tag than ours says that ours is old; the next poll fetches the new one."""
    async with both() as (posthog, local):
        posthog.script = tagged
        await local.http.get(LOCAL, headers=BEARER)
        posthog.script = partial(tagged, tag='"two"')
        poll = {"If-None-Match": '"two"', **BEARER}
        assert (await local.http.get(LOCAL, headers=poll)).status_code == 304
        posthog.says(told({}, 502))
        assert (await local.http.get(LOCAL, headers=BEARER)).status_code == 503
        posthog.script = partial(tagged, tag='"two"')
        assert (await local.http.get(LOCAL, headers=poll)).status_code == 304
        posthog.says(told({}, 502))
        assert (await local.http.get(LOCAL, headers=BEARER)).headers["etag"] == '"two"'


# ---- outages


async def test_a_known_outage_costs_no_wait() -> None:
    """After three silences only one call in a while asks; once that is answered, all do again."""
    async with both(Terms(flags_timeout=0.5)) as (posthog, local):
        await local.flags()
        posthog.says(None)
        for _ in range(10):
            assert STALE in (await local.flags()).headers
        assert len(posthog.asked) == 1 + 3
        local.clock[0] += 5
        for _ in range(3):
            assert STALE in (await local.flags()).headers
        assert len(posthog.asked) == 1 + 3 + 1
        posthog.says(told(FLAGS))
        assert STALE in (await local.flags()).headers
        local.clock[0] += 5
        assert STALE not in (await local.flags()).headers
        assert STALE not in (await local.flags("another")).headers


async def test_a_calls_own_trouble_is_no_outage() -> None:
    """However often one call meets a limit or an error, the others are passed on."""
    async with both() as (posthog, local):
        for status in (429, 500, 400, 403):
            posthog.says(told({}, status))
            for _ in range(4):
                await local.flags("odd")
        posthog.says(told(FLAGS))
        assert (await local.flags()).headers.get(STALE) is None


async def test_a_gateway_says_when_to_come_back() -> None:
    """No call asks before, though never for longer than a minute."""
    async with both() as (posthog, local):
        posthog.says(told({}, 503, retry_after="20"))
        for _ in range(3):
            await local.flags()
        local.clock[0] += 19
        await local.flags()
        assert len(posthog.asked) == 3
        local.clock[0] += 1
        await local.flags()
        assert len(posthog.asked) == 4


async def test_an_outage_is_told_once_when_it_begins_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Two lines, with the reason and without a key."""

    with structlog.testing.capture_logs() as lines:
        async with both() as (posthog, local):
            posthog.says(told({"detail": "phc_a"}, 502))
            for _ in range(5):
                await local.flags(**BEARER)
            posthog.says(told(FLAGS))
            local.clock[0] += 60
            await local.flags()
            await local.flags()
    assert [line["log_level"] for line in lines] == ["warning", "info"]
    assert lines[0]["reason"] == "HTTP 502, and not from PostHog"
    assert "secret" not in str(lines) + caplog.text
    assert "phc_a" not in str(lines) + caplog.text


async def test_a_crowd_is_bounded() -> None:
    """More calls than connections wait a moment, then get what is remembered, or 503."""
    arrived = trio.Event()
    most, at_once = 0, 0

    class Slow(PostHog):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            nonlocal most, at_once
            at_once += 1
            most = max(most, at_once)
            if at_once == upstream.CONCURRENCY:
                arrived.set()
            try:
                await super().__call__(scope, receive, send)
            finally:
                at_once -= 1

    posthog = Slow()
    async with serving(posthog) as host, agent(host, Terms(flags_timeout=9)) as local:
        await local.flags("known")
        posthog.says(None)
        async with trio.open_nursery() as nursery:
            for number in range(upstream.CONCURRENCY):
                nursery.start_soon(local.flags, f"u{number}")
            await arrived.wait()
            began = trio.current_time()
            assert STALE in (await local.flags("known")).headers
            assert (await local.flags("new")).status_code == 503
            assert trio.current_time() - began < 5
            nursery.cancel_scope.cancel()
    assert most == upstream.CONCURRENCY


# ---- hostile input and long answers


async def test_a_large_body_is_refused() -> None:
    """What PostHog would not read is not passed on."""
    async with both() as (posthog, local):
        refused = await local.http.post("/flags", content=b"x" * (2 * 1024 * 1024 + 1))
        assert refused.status_code == 413
        assert (await local.http.post("/flags", content=b"x" * (2 * 1024 * 1024))).status_code == 200
        assert len(posthog.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe",
        b"\x1f\x8bnot gzip",
        b"[" * 500_000,
        b'{"a":' * 300_000,
        gzip.compress(b'{"a":"' + b" " * 30_000_000 + b'"}'),
        gzip.compress(b'{"distinct_id":"u"}')[:-3],
        b'{"\xff":1}',
        b"null",
    ],
    ids=["no text", "no gzip", "deep", "deeper", "bomb", "cut", "no utf-8", "null"],
)
async def test_odd_bodies_are_passed_on_and_remembered_as_they_came(body: bytes) -> None:
    """Whatever a body is, PostHog judges it, and the same bytes get the same reply."""
    async with both() as (posthog, local):
        assert (await local.http.post("/flags", content=body)).json() == FLAGS
        assert posthog.asked[0].body == body
        posthog.says(told({}, 502))
        assert (await local.http.post("/flags", content=body)).json() == FLAGS
        assert (await local.http.post("/flags", content=body + b" ")).status_code == 503


async def test_a_call_that_cannot_be_sent_fails_alone() -> None:
    """An address that is too long for our client is no outage; a host may have a path of its own."""
    posthog = PostHog()
    prefix = "/" + "p" * 200
    async with serving(posthog) as host, agent(host + prefix) as local:
        for _ in range(4):
            assert (await local.http.get("/flags?x=" + "y" * 65_350)).status_code == 503
        assert not posthog.asked
        assert (await local.flags()).status_code == 200
        assert posthog.asked[0].path == prefix + "/flags/"


async def test_an_answer_that_trickles_is_left_in_time() -> None:
    """A byte now and then keeps nobody longer than the timeout."""

    async def drip(stream: trio.SocketStream) -> None:
        try:
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{")
            while True:
                await stream.send_all(b" ")
                await trio.sleep(0.02)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, drip, [listener])
        port = listener.socket.getsockname()[1]
        async with agent(f"http://127.0.0.1:{port}", Terms(flags_timeout=0.2)) as local:
            began = trio.current_time()
            assert (await local.flags()).status_code == 503
            assert trio.current_time() - began < 5
        nursery.cancel_scope.cancel()


async def test_a_long_answer_is_passed_on_and_not_remembered() -> None:
    """Definitions beyond what is held arrive whole; later polls do not fetch them again for nothing."""
    long = json.dumps({**DEFINITIONS, "x": "y" * (2 * upstream.REPLY_BYTES)}).encode()
    async with both() as (posthog, local):
        posthog.script = lambda asked: tagged(asked)._replace(
            body=b"" if "if-none-match" in asked.headers else long
        )
        for _ in range(LONG_REPLIES + 1):
            reply = await local.http.get(LOCAL)
            assert (reply.content == long, reply.headers["etag"]) == (True, 'W/"one"')
        assert (await local.http.get(LOCAL, headers={"If-None-Match": 'W/"one"'})).status_code == 304
        assert posthog.asked[-1].headers["if-none-match"] == 'W/"one"'
        posthog.says(told({}, 502))
        assert (await local.http.get(LOCAL)).status_code == 503


async def test_a_long_answer_that_is_cut_off_shows_as_cut_off() -> None:
    """Half of the definitions must not look like all of them."""

    async def cut(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        size = upstream.REPLY_BYTES * 2
        await stream.send_all(b"%x\r\n{" % size + b" " * (size - 1) + b"\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, cut, [listener])
        port = listener.socket.getsockname()[1]
        async with agent(f"http://127.0.0.1:{port}") as local:
            with pytest.raises(httpx.RemoteProtocolError):
                await local.http.get(LOCAL)
        nursery.cancel_scope.cancel()


async def test_clients_that_do_not_read_long_answers_keep_few_connections() -> None:
    """Beyond those few a long answer is refused, and short ones pass as ever."""
    long = json.dumps({**DEFINITIONS, "x": "y" * (10 * upstream.REPLY_BYTES)}).encode()
    async with both() as (posthog, local):
        posthog.script = lambda asked: (
            told(FLAGS) if asked.method == "POST" else tagged(asked)._replace(body=long)
        )
        place = (local.http.base_url.host, local.http.base_url.port or 0)
        clients = [socket.create_connection(place) for _ in range(LONG_REPLIES)]
        for client in clients:
            client.sendall(f"GET {LOCAL} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        while local.counts["passed"] < LONG_REPLIES:
            await trio.sleep(0.01)
        assert (await local.http.get(LOCAL)).status_code == 503
        assert (await local.flags()).status_code == 200
        for client in clients:
            client.close()


async def test_a_client_that_leaves_takes_nothing_along() -> None:
    """Half a request leaves no trace, and what it held is free again."""
    async with both() as (posthog, local):
        place = (local.http.base_url.host, local.http.base_url.port or 0)
        with socket.create_connection(place) as client:
            client.sendall(b"POST /flags HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            while local.calls._bodies.held == 0:
                await trio.sleep(0.01)
        while local.calls._bodies.held:
            await trio.sleep(0.01)
        assert not posthog.asked
        assert (await local.flags()).status_code == 200


async def test_nothing_of_a_call_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a line for each, nor its key."""
    caplog.set_level(logging.DEBUG)
    async with both() as (_, local):
        await local.http.get(LOCAL, headers=BEARER)
    assert "secret-of-this-test" not in caplog.text


# ---- the way out


async def test_the_projects_proxy_is_used() -> None:
    """Flag calls leave the host as deliveries do."""
    posthog = PostHog()
    async with serving(posthog) as proxy, agent("http://posthog.example", proxy=Secret(proxy)) as local:
        assert (await local.flags()).status_code == 200
    assert posthog.asked[0].headers["host"] == "posthog.example"


async def test_certificates_that_cannot_be_used_are_told_at_the_start() -> None:
    """Not by the first call."""
    with pytest.raises(WayOutError):
        async with agent("https://posthog.example", ca_file="/nowhere/ca.pem"):
            pass
