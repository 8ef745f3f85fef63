"""Passes SDKs' flag calls on to PostHog, and answers from the last good reply while it is away.

It promises an answer within the timeout and a moment, whatever PostHog does (an outage that is known costs no
wait); that an old reply goes only to a call that PostHog would have answered alike, and says how old it is;
and that what is held is bounded. A flag call never touches events.
"""

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec
import structlog
import trio

from agent.accept.bodies import Bodies, Unread
from agent.accept.flags.breaker import Breaker
from agent.accept.flags.calls import (
    DEFINITIONS,
    METHODS,
    PATHS,
    Call,
    Meaning,
    key_of,
    passed_back,
    read_answer,
    read_call,
)
from agent.accept.flags.replies import Replies, Reply, conditional
from agent.accept.flags.upstream import CONCURRENCY, Failed, Rest, Upstream
from agent.advice import AWAY
from agent.config import Project
from agent.httpd import Message, Receive, Send

__all__ = ["PATHS", "Answered", "FlagCalls", "Terms"]

log = structlog.get_logger("accept")

# PostHog reads no longer body (axum's default limit, which `rust/feature-flags/src/router.rs` leaves).
BODY_BYTES = 2 * 1024 * 1024
# Of all calls at once; with bodies of some kilobytes that is thousands of calls.
BODIES_BYTES = 16 * 1024 * 1024
# SDKs have given up a call long before (posthog-python `posthog/client.py`: 3 s, and 10 s).
BODY_SECONDS = 10.0
# They wait 3 s for an evaluation but 10 s for definitions: so these have so many times the timeout.
DEFINITIONS_PATIENCE = 3
# How long a call waits for a connection before it is answered from memory: PostHog answers in 0.1 s.
QUEUE_SECONDS = 0.25
# How often a call asks while PostHog is away. Also what a client is told to wait.
PROBE_SECONDS = 5
# How long an answer that is not held may take to pass, and how many may: a client that does not read it keeps
# its connection to PostHog busy.
LONG_SECONDS = 60.0
LONG_REPLIES = 4

STALE = b"x-capture-agent-stale"

# How a call was answered: by PostHog, from memory, by 503 where that has nothing, or as none that it takes.
Answered = Literal["passed", "stale", "unavailable", "refused"]

REFUSALS = {Unread.TOO_LARGE: 413, Unread.TOO_SLOW: 408, Unread.NO_ROOM: 503}


class Terms(Protocol):
    """What of an http source's settings is about flags, in seconds and bytes."""

    @property
    def flags_timeout(self) -> float: ...
    @property
    def flags_max_age(self) -> float: ...
    @property
    def flags_cache(self) -> int: ...


class FlagCalls:
    """An ASGI app for one http source's flag calls; its connections are open for an `async with`.

    `client_of` tells from a request's scope the address of who asks; web pages may do so from `origins`;
    `now` is a steady clock that goes on while the host sleeps, in seconds; `count` is told of each call how
    it was answered.
    """

    def __init__(
        self,
        project: Project,
        terms: Terms,
        *,
        client_of: Callable[[Message], str],
        origins: Collection[str],
        now: Callable[[], float],
        count: Callable[[Answered], None],
    ) -> None:
        self._timeout = terms.flags_timeout
        self._client_of, self._origins, self._now, self._count = client_of, origins, now, count
        self._upstream = Upstream(project)
        self._bodies = Bodies(largest=BODY_BYTES, together=BODIES_BYTES, seconds=BODY_SECONDS)
        self._replies = Replies(terms.flags_max_age, terms.flags_cache)
        self._breaker = Breaker(
            max(PROBE_SECONDS, QUEUE_SECONDS + DEFINITIONS_PATIENCE * terms.flags_timeout)
        )
        self._places = trio.Semaphore(CONCURRENCY)
        self._long = 0
        self._project = project.name

    async def __aenter__(self) -> Self:
        await self._upstream.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._upstream.__aexit__(kind, error, trace)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        reply = await self._reply(scope, receive, send)
        if reply is not None:
            await _tell(send, reply)

    async def _reply(self, scope: Message, receive: Receive, send: Send) -> Reply | None:
        """What is to be answered; None where nobody waits for it any more."""
        if scope["path"].removesuffix("/") not in PATHS:
            return self._refuse(404, "no flag call has this path")
        if scope["method"] not in METHODS:
            reply = self._refuse(405, "a flag call has another method")
            return reply._replace(headers=(*reply.headers, (b"allow", ", ".join(METHODS).encode())))
        async with self._bodies.read(receive) as body:
            if body is Unread.GONE:
                return None
            if isinstance(body, Unread):
                return self._refuse(REFUSALS[body], body.value)
            call = read_call(
                scope["method"],
                scope["path"],
                scope["query_string"],
                scope["headers"],
                body,
                client=self._client_of(scope),
                origins=self._origins,
            )
            return await self._answer(call, send)

    async def _answer(self, call: Call, send: Send) -> Reply | None:
        key = key_of(call)
        if not self._breaker.admits(self._now()):
            return self._remembered(call, key)
        async with self._place() as granted:
            return await self._ask(call, key, send) if granted else self._remembered(call, key)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[bool]:
        """A connection to PostHog for a block; False where none is free soon."""
        with trio.move_on_after(QUEUE_SECONDS) as patience:
            await self._places.acquire()
        if patience.cancelled_caught:
            yield False
            return
        try:
            yield True
        finally:
            self._places.release()

    async def _ask(self, call: Call, key: bytes, send: Send) -> Reply | None:
        """PostHog's reply, else one from memory."""
        # What is not remembered is asked for as if the client had nothing, so that there is a reply to fall
        # back on also for those who really have nothing.
        asked = call._replace(if_none_match=b"") if self._replies.lacks(key, self._now()) else call
        patience = self._timeout * (DEFINITIONS_PATIENCE if call.path.removesuffix("/") in DEFINITIONS else 1)
        async with self._upstream.asked(asked, patience) as answer:
            if isinstance(answer, Failed):
                if answer.outage:
                    self._failed(answer.reason, 0.0)
                return self._remembered(call, key)
            meaning = read_answer(call, answer.status, answer.headers, answer.body)
            if meaning is not Meaning.GOOD and self._upstream.repeats_a_secret(answer):
                return self._remembered(call, key)
            reply = passed_back(call, answer.status, answer.headers, answer.body)
            if meaning is Meaning.AWAY:
                self._failed(f"HTTP {answer.status}, and not from PostHog", _seconds(reply))
                return self._remembered(call, key)
            if self._breaker.answered():
                log.info("PostHog answers flag calls again", project=self._project)
            if answer.rest is not None:
                if meaning is Meaning.GOOD:
                    self._replies.remember(key, None, self._now())
                if meaning is Meaning.BUSY or self._long >= LONG_REPLIES:
                    return self._remembered(call, key)
                length = dict(answer.headers).get(b"content-length", b"")
                await self._pass_long(reply, length, answer.rest, send)
                return None
        return self._learn(call, key, meaning, reply)

    def _learn(self, call: Call, key: bytes, meaning: Meaning, reply: Reply) -> Reply:
        """What the reply is to the client, once it has been remembered where it is worth it."""
        now = self._now()
        match meaning:
            case Meaning.BUSY:
                return self._remembered(call, key, otherwise=reply)
            case Meaning.GOOD:
                self._replies.remember(key, reply, now)
            case Meaning.FINAL if reply.status in (401, 403):  # whoever has this key may not see it any more
                self._replies.forget(key)
            case Meaning.SAME:
                self._replies.confirm(key, reply.header(b"etag") or call.if_none_match, now)
        self._count("passed")
        return conditional(reply, call.if_none_match)

    async def _pass_long(self, beginning: Reply, length: bytes, rest: Rest, send: Send) -> None:
        """Pass on piece by piece what is too long to be held; what is cut off shows as cut off."""
        self._count("passed")
        self._long += 1
        try:
            with trio.move_on_after(LONG_SECONDS):
                await send(_start(beginning, length))
                await send(_piece(beginning.body, more=True))
                async for piece in rest:
                    await send(_piece(piece, more=True))
                if rest.whole:
                    await send(_piece(b"", more=False))
        finally:
            self._long -= 1

    def _remembered(self, call: Call, key: bytes, otherwise: Reply | None = None) -> Reply:
        """The last good reply, with its age; else what is given, else that there is none."""
        found = self._replies.find(key, self._now())
        if found is not None:
            self._count("stale")
            reply, age = found
            stale = conditional(reply, call.if_none_match)
            return stale._replace(headers=(*stale.headers, (STALE, b"%d" % age)))
        if otherwise is not None:
            self._count("passed")
            return otherwise
        self._count("unavailable")
        return _told(503, "PostHog does not answer, and there is no earlier reply to this call.")

    def _failed(self, reason: str, after: float) -> None:
        if self._breaker.failed(self._now(), after):
            log.warning(
                "PostHog does not answer flag calls; they get the last replies to the same calls",
                project=self._project,
                reason=reason,
                hint=AWAY,
            )

    def _refuse(self, status: int, detail: str) -> Reply:
        self._count("refused")
        return _told(status, detail)


def _told(status: int, detail: str) -> Reply:
    """A reply of the agent's own, in the shape of PostHog's, of which SDKs read `detail`."""
    kind = "invalid_request" if status < 500 else "server_error"
    body = {"type": kind, "code": "capture_agent", "detail": detail, "attr": None}
    later = ((b"retry-after", b"%d" % PROBE_SECONDS),) if status == 503 else ()
    return Reply(status, ((b"content-type", b"application/json"), *later), msgspec.json.encode(body))


def _seconds(reply: Reply) -> float:
    """What `Retry-After` says in seconds; nothing where it says a date, which no gateway does."""
    value = reply.header(b"retry-after")
    return float(value) if value.isdigit() else 0.0


async def _tell(send: Send, reply: Reply) -> None:
    bare = reply.status in (204, 304)  # these have no body, nor a length (RFC 9110, 8.6)
    await send(_start(reply, b"" if bare else b"%d" % len(reply.body)))
    await send(_piece(b"" if bare else reply.body, more=False))


def _start(reply: Reply, length: bytes) -> Message:
    sized = ((b"content-length", length),) if length else ()
    return {"type": "http.response.start", "status": reply.status, "headers": [*reply.headers, *sized]}


def _piece(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
