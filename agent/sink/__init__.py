"""The strict stand-in for PostHog's capture endpoints: behind `capture-agent sink`, `demo` and the tests.

It judges requests as PostHog's Rust service does, keeps what it takes in memory, bounded, and can be told to
misbehave.
"""

import socket
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from itertools import islice
from random import Random

import trio
from msgspec import Struct
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from agent import httpd
from agent.sink import v1
from agent.sink.flags import PATH as FLAGS
from agent.sink.flags import flags
from agent.sink.judge import OK, Event, as_text, judge
from agent.sink.payload import WIRE_LIMIT, Refusal, Reply, Request, at_path
from agent.sink.v1 import PATHS as V1_PATHS
from agent.sink.v1 import Result, Single

__all__ = [
    "Afterwards",
    "Event",
    "Fault",
    "Refusal",
    "Reply",
    "Request",
    "Result",
    "Sink",
    "judge",
    "serving",
]

PATHS = ("/batch", "/i/v0/e", "/e", "/track", "/capture", "/engage")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
KEPT = 10_000  # events kept by default: some 30 MB
CONNECTIONS = 1000  # more than the agents of a test open; more wait
# What a captive portal shows whoever is not logged in, whatever was asked for.
PORTAL = Reply(
    200, b"<!DOCTYPE html><html><title>Log in</title></html>", {"content-type": "text/html; charset=utf-8"}
)
BODY_PATIENCE = 30.0  # seconds for the next piece of a body; PostHog's is configurable


class Fault(Enum):
    """What may happen instead of a reply."""

    HANG_UP = "the connection ends without an answer"
    STALL = "no answer comes until the client gives up"


class Afterwards(Struct, frozen=True):
    """The request is judged and its events taken as ever, but the client gets this instead of the reply."""

    instead: Reply | Fault


# What a script may say to a request: nothing, a reply or fault that comes before anything is taken, one that
# comes afterwards, or an event to wait for first.
Whim = Reply | Fault | Afterwards | trio.Event | None
Script = Callable[[Request], Whim]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Sink:
    """Answers like PostHog unless told otherwise, and remembers the newest `keep` events that it took.

    `status` is the answer to every request (nothing is taken then, at 200 neither, as for a project over its
    billing limit); `fail_rate` is the share answered 503; `latency` in seconds precedes every answer; a
    request with an event that has the property `reject_if` is a 400, or by v1 that event is dropped. A body
    over `max_body` bytes is a 413, over `cut_over` the connection ends. `retry_rate` is the share of events
    that v1 does not store. `portal` is a captive one. `retry_after` (s) goes with every 429 and 503. Without
    `v1` that protocol is not served. `script` is asked first for each request, `single` for each event that
    v1 would take.
    """

    def __init__(
        self,
        *,
        status: int | None = None,
        fail_rate: float = 0.0,
        latency: float = 0.0,
        reject_if: tuple[str, str] | None = None,
        max_body: int | None = None,
        cut_over: int | None = None,
        retry_rate: float = 0.0,
        retry_after: float | None = None,
        portal: bool = False,
        v1: bool = True,
        single: Single | None = None,
        script: Script | None = None,
        keep: int = KEPT,
        body_patience: float = BODY_PATIENCE,
        random: Random | None = None,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self.events: deque[Event] = deque(maxlen=keep)
        self.taken = 0
        self.requests = 0
        self.received = 0
        self.statuses: Counter[int] = Counter()  # 0: no answer
        self._status, self._fail_rate, self._latency, self._reject_if = status, fail_rate, latency, reject_if
        self._max_body, self._cut_over, self._portal = max_body, cut_over, portal
        self._retry_rate, self._retry_after, self._single = retry_rate, retry_after, single
        self._script, self._body_patience, self._now = script, body_patience, now
        self._random = random or Random()  # noqa: S311 - no secret
        self._news = trio.Event()
        self._over = False
        routes = [
            Route(path + end, self._capture, methods=["GET", "POST", "OPTIONS"])
            for path in PATHS
            for end in ("", "/")
        ]
        if v1:
            # Any method: PostHog's own are refused by the judge, as there.
            routes += [
                Route(path + end, self._capture, methods=METHODS) for path in V1_PATHS for end in ("", "/")
            ]
        routes += [Route(FLAGS + end, self._capture, methods=["POST"]) for end in ("", "/")]
        routes += [Route(path, _health) for path in ("/", "/_readiness", "/_liveness")]
        self.app = Starlette(routes=routes)
        self.app.router.redirect_slashes = False

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is looked at after every request."""
        while not condition():
            await self._news.wait()

    async def wait_for(self, events: int) -> None:
        """Wait until so many events have been taken in all."""
        await self.wait_until(lambda: self.taken >= events)

    async def arrivals(self) -> AsyncIterator[Sequence[Event]]:
        """The events taken, in lots as they come, until `end`; what `keep` has no room for is left out."""
        seen = 0
        while True:
            await self.wait_until(lambda seen=seen: self._over or self.taken > seen)  # type: ignore[misc]  # as it is
            if self.taken == seen:
                return
            fresh = min(self.taken - seen, len(self.events))
            seen = self.taken
            yield list(islice(self.events, len(self.events) - fresh, None))

    def end(self) -> None:
        """Nothing more will be taken."""
        self._over = True
        self._wake()

    async def _capture(self, http: HttpRequest) -> Response:
        self.requests += 1
        number, url = self.requests, http.url
        try:
            body = await self._read(http)
        except Refusal as refusal:
            return self._tell(refusal.reply)
        except ClientDisconnect:
            return self._tell(Fault.HANG_UP)
        if http.method == "OPTIONS":
            return self._tell(OK)
        headers = dict(http.headers.items())
        request = Request(
            number=number, method=http.method, path=url.path, query=url.query, headers=headers, body=body
        )
        whim = self._script(request) if self._script is not None else None
        if isinstance(whim, trio.Event):
            await whim.wait()
        await trio.sleep(self._latency)
        outcome = whim if isinstance(whim, Reply | Fault) else self._misbehave(body) or self._judge(request)
        outcome = whim.instead if isinstance(whim, Afterwards) else outcome
        answer = self._tell(outcome)
        if outcome is Fault.STALL:
            while (await http.receive())["type"] != "http.disconnect":
                pass
        return answer

    async def _read(self, http: HttpRequest) -> bytes:
        """The body, as far as it is not too long; the rest is read and forgotten (`extractors.rs`)."""
        pieces, size, more = [], 0, True
        while more:
            with trio.move_on_after(self._body_patience) as patience:
                message = await http.receive()
            if patience.cancelled_caught:
                raise Refusal(408, "client stopped sending data")
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            self.received += len(piece)
            if size <= WIRE_LIMIT:
                pieces.append(piece)
        if size > WIRE_LIMIT:
            raise Refusal(
                413, f"maximum event size exceeded: Request body exceeds limit of {WIRE_LIMIT} bytes"
            )
        return b"".join(pieces)

    def _misbehave(self, body: bytes) -> Reply | Fault | None:
        if self._portal:
            return PORTAL
        if self._status is not None:
            return OK if self._status == 200 else self._busy(self._status, b"told to answer this")
        if self._fail_rate and self._random.random() < self._fail_rate:
            return self._busy(503, b"transient error, please retry")
        if self._cut_over is not None and len(body) > self._cut_over:
            return Fault.HANG_UP
        if self._max_body is not None and len(body) > self._max_body:
            return Reply(413, b"length limit exceeded")
        return None

    def _busy(self, status: int, text: bytes) -> Reply:
        after = {"retry-after": f"{self._retry_after:g}"} if self._retry_after is not None else {}
        return Reply(status, text, after if status in (429, 503) else {})

    def _judge(self, request: Request) -> Reply:
        if at_path(request.path, (FLAGS,)):
            return flags(request)
        if at_path(request.path, V1_PATHS):
            reply, events = v1.judge(request, self._now(), self._judge_single)
        else:
            reply, events = judge(request, self._now(), self._random.getrandbits)
            if any(map(self._is_rejected, events)):
                return Reply(400, b"invalid event could not be processed")
        self.events.extend(events)
        self.taken += len(events)
        return reply

    def _is_rejected(self, event: Event) -> bool:
        if self._reject_if is None:
            return False
        name, value = self._reject_if
        return as_text(event.properties.get(name)) == value

    def _judge_single(self, event: Event) -> Result | None:
        if self._single is not None and (said := self._single(event)) is not None:
            return said
        if self._is_rejected(event):
            return Result("drop", "rejected")
        if self._retry_rate and self._random.random() < self._retry_rate:
            return Result("retry", "not_persisted")
        return None

    def _tell(self, outcome: Reply | Fault) -> Response:
        """Count an outcome, wake who waits for news, and make the response of it."""
        self.statuses[outcome.status if isinstance(outcome, Reply) else 0] += 1
        self._wake()
        if isinstance(outcome, Fault):
            return _HungUp()
        return PlainTextResponse(outcome.body, outcome.status, dict(outcome.headers))


class _HungUp(Response):
    """No answer: Hypercorn closes a connection whose app ends after no more than an interim response.

    The client sees "102 Processing", which it skips, and the end of the stream.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 102, "headers": []})


async def _health(_http: HttpRequest) -> Response:
    return PlainTextResponse("capture")


@asynccontextmanager
async def serving(
    sink: Sink, listener: socket.socket | None = None, *, grace: float = 0.1
) -> AsyncIterator[str]:
    """Serve a sink during the block, by default on a free port of 127.0.0.1; gives its URL."""
    shutdown = trio.Event()
    with listener or socket.create_server(("127.0.0.1", 0)) as sock:
        host, port = sock.getsockname()[:2]
        serve = partial(
            httpd.serve,
            sink.app,
            [sock],
            shutdown=shutdown,
            max_connections=CONNECTIONS,
            grace=grace,
            max_body=2 * WIRE_LIMIT,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            shutdown.set()
