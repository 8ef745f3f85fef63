"""Takes events over HTTP, as PostHog's SDKs send them to PostHog, and answers as PostHog does.

A 200 is an acknowledgement: the events are in the buffer. It differs from PostHog's where that loses events:
good events are taken whatever is wrong with others of their request, and a full buffer is a 503, upon which
SDKs come again. The events of a client that left before its answer may have been taken.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from socket import socket
from typing import NamedTuple

import msgspec
import trio
from msgspec import Raw

from agent import crash, httpd
from agent.accept.flags import PATHS as FLAG_PATHS
from agent.accept.flags import FlagCalls
from agent.accept.offered import Offered, Outcome, by_line
from agent.accept.putter import Putter
from agent.accept.whence import Address, Whence, is_near
from agent.clock import Clock
from agent.config import Http, Project
from agent.decode import capture, capture_v1
from agent.decode.request import JSON, Answer, Posted, Request, Trouble
from agent.events import CHUNK_EVENTS, Denied, Instant, Origin, Read
from agent.httpd import Message, Receive, Send
from agent.patterns import REDACTED
from agent.shape import shape_of

# A whole body has so long to arrive: the largest at 3 Mbit/s.
BODY_SECONDS = 60.0
# A body that brings nothing for so long has a client that is gone, and holds room that others wait for.
SILENCE_SECONDS = 10.0
# SDKs give up after 10 to 15 s (posthog-node, posthog-python): before that they are told to come again.
PATIENCE_SECONDS = 5.0
# A stop gives open requests so long: less than the agent has to put what was read.
PARTING_SECONDS = 1.0
# The bodies of all requests together, or two of the largest: beyond it clients are told to come again.
BODIES_BYTES = 64 * 1024 * 1024
# What is unpacked while everybody waits; more is done in a thread, one body at a time.
AT_ONCE_BYTES = 256 * 1024
# Where each bracket has to be looked at, at once as many as take 5 ms: 250 KiB of nothing else took 77.
AT_ONCE_BRACKETS = 15_000
# What the door takes at once without holding others up.
PIECE_BYTES = 256 * 1024
# A body of twice what may be is read, though not kept, so that the client sees why it is refused. The server
# gives up some messages (of 64 KiB) later than the source, which counts it.
SPARE_BYTES = 1024 * 1024
ORIGINS_KEPT = 256

_encode = msgspec.json.Encoder().encode


class Dialect(NamedTuple):
    """One of PostHog's protocols: what it allows, and how its requests are read and answered."""

    methods: Sequence[str]
    read: Callable[[Request], Posted | Answer]
    trouble: Callable[[Trouble], Answer]
    answer: Callable[[Posted, Mapping[int, str]], Answer]
    whole: bool  # its answer is one for all events, so that a rate lets in all of them or none


V0 = Dialect(("GET", "POST", "OPTIONS"), capture.read_request, capture.trouble, capture.answer, whole=True)
V1 = Dialect(("POST",), capture_v1.read_request, capture_v1.trouble, capture_v1.answer, whole=False)
DIALECTS = {
    path + end: dialect
    for dialect, paths in ((V0, capture.PATHS), (V1, capture_v1.PATHS))
    for path in paths
    for end in ("", "/")
}
HEALTH = ("/", "/_readiness", "/_liveness")
FLAGS = frozenset(path + end for path in FLAG_PATHS for end in ("", "/"))


class HttpSource:
    """Listening sockets that speak HTTP."""

    def __init__(
        self,
        listeners: Sequence[socket],
        putter: Putter,
        clock: Clock,
        settings: Http,
        projects: Sequence[Project],
    ) -> None:
        self._listeners = listeners
        self._putter = putter
        self._clock = clock
        self._settings = settings
        self._names = {
            project.api_key.reveal(): project.name for project in projects if project.api_key is not None
        }
        self._shape = shape_of(settings)
        self._whence = Whence(settings.trusted_proxies)
        self._origin_of = lru_cache(ORIGINS_KEPT)(self._make_origin)
        self._bodies = _Room(max(BODIES_BYTES, 2 * settings.max_body))
        self._unpacking = trio.CapacityLimiter(1)
        self._stuck: Offered | None = None  # what a client waited for in vain
        self._project = next(project for project in projects if project.name == settings.project)
        self.requests = 0  # under way
        self.flag_calls: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()  # by status

    async def run(self, stop: trio.Event) -> None:
        """Answer requests until `stop`, and then those that are under way."""
        async with FlagCalls(
            self._project,
            self._settings,
            client_of=lambda scope: str(self._address(scope) or ""),
            origins=self._settings.cors,
            now=lambda: self._clock.now().monotonic / 1_000_000,
            count=lambda answered: self.flag_calls.update((answered,)),
        ) as flags:
            await httpd.serve(
                partial(self._serve, flags),
                self._listeners,
                shutdown=stop,
                grace=PARTING_SECONDS,
                max_body=2 * self._settings.max_body + SPARE_BYTES,
                max_connections=self._settings.max_connections,
            )

    async def _serve(self, flags: httpd.App, scope: Message, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        send = self._counting(send)
        if scope["path"] in FLAGS:
            await flags(scope, receive, send)
            return
        answer = await self._answer(scope, receive)
        headers = [(b"content-type", answer.kind.encode()), (b"content-length", b"%d" % len(answer.text))]
        if answer.status == 204:
            headers = []
        if answer.again:
            headers.append((b"retry-after", b"1"))
        if self._settings.cors:
            headers += _cors(self._settings.cors, scope["method"], dict(scope["headers"]))
        crash.point("answer.due")
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.text})
        crash.point("answer.written")

    def _counting(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers[message["status"]] += 1
            await send(message)

        return counted

    async def _answer(self, scope: Message, receive: Receive) -> Answer:
        dialect = DIALECTS.get(scope["path"])
        if dialect is None:
            return Answer(200, b"capture") if scope["path"] in HEALTH else Answer(404)
        if scope["method"] not in dialect.methods:
            return Answer(405)
        if scope["method"] == "OPTIONS":
            return Answer(200, b'{"status":"Ok"}', JSON)
        self.requests += 1
        try:
            answer = await self._take(dialect, scope, receive)
            lost = _denied(answer, self._clock.now(), scope["path"])
            if answer.events and await self._put(lost) is None:
                return dialect.trouble("busy")
            return answer
        finally:
            self.requests -= 1

    async def _take(self, dialect: Dialect, scope: Message, receive: Receive) -> Answer:
        """Read a request, put its events, and tell what became of them."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        address = self._address(scope)
        share = _Share(self._bodies)
        try:
            too_long = int(headers.get("content-length", "0")) > 2 * self._settings.max_body
            body = "too_large" if too_long else await self._read(receive, share)
            if isinstance(body, str):
                return dialect.trouble(body)
            query = scope["query_string"].decode("latin-1")
            now, most = self._clock.now(), self._settings.max_body
            request = Request(scope["path"], query, headers, body, now, most, is_near(address))
            posted = await self._unpack(dialect, request)
            if isinstance(posted, Answer):
                return posted
            origin = self._origin_of(
                posted.key,
                address,
                tuple(posted.defaults.items()),
                placed=posted.placed,
                historical=posted.historical,
            )
            if origin is None:
                return dialect.trouble("unknown_key")._replace(events=posted.events)
            if dialect.whole and not self._putter.admits(posted.events):
                return dialect.trouble("rate_limited")._replace(events=posted.events, reason="rate_limited")
            reads = _pieces(posted.lines, now, origin)
            held = share.hold(len(posted.lines))
            refused = await self._put(reads, admitted=dialect.whole) if held else None
            return dialect.trouble("busy") if refused is None else dialect.answer(posted, refused)
        finally:
            share.hold(0)

    def _address(self, scope: Message) -> Address | None:
        """The client's own."""
        peer = (scope.get("client") or ("",))[0]
        told = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
        return self._whence.address(peer, ",".join(told))

    async def _read(self, receive: Receive, share: "_Share") -> bytes | Trouble:
        """The whole body. What is too much is read and forgotten, so that the client hears of it."""
        body = bytearray()  # a list of its pieces would be many times as large where each is a byte
        size, more, most = 0, True, self._settings.max_body
        end = trio.current_time() + BODY_SECONDS
        while more:
            with trio.move_on_at(min(end, trio.current_time() + SILENCE_SECONDS)) as patience:
                message = await receive()
            if patience.cancelled_caught or message["type"] == "http.disconnect":
                return "stalled"
            more = message.get("more_body", False)
            size += len(message["body"])
            if size > 2 * most:
                break
            if size > most:
                body.clear()
                share.hold(0)
            elif share.hold(size):
                body += message["body"]
            else:
                return "busy"
        return "too_large" if size > most else bytes(body)

    async def _unpack(self, dialect: Dialect, request: Request) -> Posted | Answer:
        """Its events, without holding the others up."""
        if len(request.body) <= AT_ONCE_BYTES:
            limit = min(request.limit, AT_ONCE_BYTES)
            found = dialect.read(request._replace(limit=limit, brackets=AT_ONCE_BRACKETS))
            if isinstance(found, Posted) or found.status != 413:
                return found
        return await trio.to_thread.run_sync(dialect.read, request, limiter=self._unpacking)

    async def _put(self, reads: Iterable[Read], *, admitted: bool = True) -> Mapping[int, str] | None:
        """Which lines the door refused, and why, once the others are in the buffer; None if they are not."""
        offered: list[Offered] = []
        outcomes: list[Outcome] = []
        with trio.move_on_after(PATIENCE_SECONDS):
            if self._stuck is not None:  # else each try of an SDK would be one more copy of its events
                await self._stuck.settled.wait()
                self._stuck = None
            for read in reads:
                await self._putter.room()
                offered.append(self._putter.offer(read, tell=outcomes.append, urgent=True, admitted=admitted))
                if read.denied is not None:  # it takes no room, so that nothing else holds the next one back
                    await offered[-1].settled.wait()
            for part in offered:
                await part.settled.wait()
            return by_line(outcomes)
        if offered:
            self._stuck = offered[-1]
        return None

    def _make_origin(
        self,
        key: str,
        address: Address | None,
        told: tuple[tuple[str, str], ...],
        *,
        placed: bool,
        historical: bool,
    ) -> Origin | None:
        """What follows from who sent events; None where their key is not taken."""
        name = self._names.get(key)
        if name is None and self._settings.keys == "configured":
            return None
        defaults = {property_name: Raw(_encode(text)) for property_name, text in told}
        shown = came = str(address)
        if self._shape is not None:
            shown = self._shape.shown("$ip", came)
        if not is_near(address) and shown != REDACTED:
            defaults["$ip"] = Raw(_encode(shown))
        if not placed and (is_near(address) or shown != came):  # else PostHog would take this host's
            defaults["$geoip_disable"] = Raw(b"true")
        return Origin(
            defaults,
            project=None if name == self._settings.project else name,
            key=key if name is None else None,
            historical=historical,
        )


class _Share:
    """What one request holds of the room that all have together."""

    def __init__(self, room: "_Room") -> None:
        self._room = room
        self._held = 0

    def hold(self, size: int) -> bool:
        """Hold so many bytes instead; False, and no more than before, where there is no room."""
        more = size - self._held
        if more > self._room.left:
            return False
        self._room.left -= more
        self._held = size
        return True


class _Room:
    """How many bytes of bodies and events may yet be held."""

    def __init__(self, size: int) -> None:
        self.left = size


def _pieces(lines: bytes, at: Instant, origin: Origin) -> Iterator[Read]:
    """The lines a few at a time, each piece as much later as it has lines before it."""
    start = 0
    while start < len(lines):
        end = len(lines)
        if end - start > PIECE_BYTES:
            end = lines.rfind(b"\n", start, start + PIECE_BYTES) + 1 or lines.index(b"\n", start) + 1
        piece = lines[start:end]
        yield Read(piece, at, origin=origin)
        count = piece.count(b"\n")
        at = at._replace(wall=at.wall + count, monotonic=at.monotonic + count)
        start = end


def _denied(answer: Answer, at: Instant, path: str) -> Iterator[Read]:
    """The events that are lost with a request, for the books, a few at a time."""
    for first in range(0, answer.events, CHUNK_EVENTS):
        lines = min(CHUNK_EVENTS, answer.events - first)
        yield Read(b"", at, denied=Denied(answer.reason, lines, f"a request to {path}"))


def _cors(allowed: Sequence[str], method: str, asked: Mapping[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    """What a browser wants to hear whose page may send events: `router.rs`, `CorsLayer`."""
    yield b"vary", b"origin, access-control-request-method, access-control-request-headers"
    origin = asked.get(b"origin", b"")
    if not origin or not ("*" in allowed or origin.decode("latin-1") in allowed):
        return
    yield b"access-control-allow-origin", origin
    yield b"access-control-allow-credentials", b"true"
    if method == "OPTIONS":
        yield b"access-control-allow-methods", b"GET,POST,OPTIONS"
        if names := asked.get(b"access-control-request-headers"):
            yield b"access-control-allow-headers", names
