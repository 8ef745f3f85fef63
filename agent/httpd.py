"""Serves one ASGI app over sockets that are already open, inside the caller's nursery, with Hypercorn.

It promises: no socket is bound or unlinked here; nothing is logged but errors; a body over `max_body` is a
413 before the app has it whole; an app may answer without reading a body; whatever a client does (never
reads, never writes), a shutdown ends within its grace and a cancellation at once, and it does not keep others
out: where all places are taken, who has kept the server waiting longest leaves for who comes, as does who
asks on and on without waiting for answers.
"""

import logging
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, cast

import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

from agent.guard import Guard
from agent.places import ROOM_SECONDS, accept_all

# ASGI's own shapes: its messages are dicts whose fields depend on their type.
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Request line and headers. A GET may carry its event in the query, hence more than the usual 16 KiB.
MAX_HEAD = 64 * 1024
# Longer than any client's own idle time (httpx 5 s, browsers about 60 s): the client then closes first, and
# no request meets a connection that is just being closed.
KEEP_ALIVE = 75.0
# A client that has taken nothing of its answer for so long is gone. An answer is handed to the kernel in
# pieces of 64 KiB, each of which has this time: 50 kbit/s are enough.
UNREAD_SECONDS = 10.0
PIECE_BYTES = 64 * 1024
# Who has said or taken nothing for so long, when it was his turn, may lose his place to who comes.
TURN_SECONDS = 1.0
# Hypercorn ends a connection after 1,000, upon which a client that does not look for that fails once.
MOST_REQUESTS = 2**31


async def serve(
    app: App,
    sockets: Sequence[socket.socket],
    *,
    shutdown: trio.Event,
    max_connections: int,
    grace: float = 3.0,
    max_body: int = 1024 * 1024,
    keep_alive: float = KEEP_ALIVE,
    unread: float = UNREAD_SECONDS,
    turn: float = TURN_SECONDS,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until `shutdown` is set, then give open ones `grace` seconds.

    Beyond `max_connections` clients wait to be accepted, until others end or keep the server waiting for
    `turn` seconds. Who takes nothing of an answer for `unread` seconds is left. The sockets stay the
    caller's, who closes them; they become non-blocking.
    """
    config = Config()
    config.errorlog = logging.getLogger("agent.httpd")  # a logger of ours: Hypercorn adds no handler to it
    config.errorlog.setLevel(logging.ERROR)
    config.keep_alive_timeout = keep_alive
    config.keep_alive_max_requests = MOST_REQUESTS
    config.h11_max_incomplete_size = MAX_HEAD
    config.include_server_header = False
    served = _Served(partial(_bounded, app, max_body), config, max_connections, unread, turn)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.part_after, shutdown, grace)
        async with trio.open_nursery() as serving:
            async with trio.open_nursery() as accepting:

                def start(sock: trio.socket.SocketType) -> None:
                    serving.start_soon(served.connection, sock)

                again = min(turn, ROOM_SECONDS)
                for sock in sockets:
                    sock.setblocking(False)
                    accepting.start_soon(accept_all, sock, served.places, start, served.make_room, again)
                task_status.started()
                await shutdown.wait()
                accepting.cancel_scope.cancel()
            await served.context.terminated.set()  # Hypercorn then closes connections that are idle
            serving.cancel_scope.deadline = trio.current_time() + grace
        nursery.cancel_scope.cancel()


class _Served:
    """The connections of one app, each of them served by Hypercorn.

    Hypercorn's own `serve` accepts whoever comes, until no descriptor is left, and tells nobody whom.
    """

    def __init__(self, app: App, config: Config, max_connections: int, unread: float, turn: float) -> None:
        self.places = trio.Semaphore(max_connections)
        self.context = WorkerContext(None)
        self._app = ASGIWrapper(cast("Any", app))  # whose messages have types of Hypercorn's own
        self._config = config
        self._unread, self._patience = unread, turn
        self._guard = Guard("HTTP")
        self._open: dict[_Connection, None] = {}  # in the order in which their turn came to say something

    async def connection(self, sock: trio.socket.SocketType) -> None:
        """Serve one client to its end."""
        connection = _Connection(
            self._app, self._config, self.context, sock, self._unread, self._patience, self._requeue
        )
        self._open[connection] = None
        try:
            with sock:
                await self._guard.keep(connection.run)
        finally:
            del self._open[connection]
            self.places.release()

    def _requeue(self, connection: "_Connection") -> None:
        self._open[connection] = self._open.pop(connection)

    def make_room(self) -> None:
        """Somebody wants a place and there is none: hang up on who keeps us waiting longest."""
        if (waiting := next((one for one in self._open if one.keeps_waiting), None)) is not None:
            waiting.hang_up()

    async def part_after(self, shutdown: trio.Event, grace: float) -> None:
        """Hang up on everybody `grace` after a shutdown, or at once when cancelled.

        Hypercorn shields its sends, so that a client which never reads would hold a cancellation for ever.
        """
        try:
            await shutdown.wait()
            await trio.sleep(grace)
        finally:
            for connection in tuple(self._open):
                connection.hang_up()


class _Connection(TCPServer):
    """One client, in HTTP/1.1; it ends when the client has left.

    Hypercorn's would keep its place until the idle time is over, and speak HTTP/2 and web sockets too, where
    a few odd bytes raise what it does not catch.
    """

    _left = False
    _blocked = False  # it does not take what it is told

    def __init__(
        self,
        app: ASGIWrapper,
        config: Config,
        context: WorkerContext,
        sock: trio.socket.SocketType,
        unread: float,
        patience: float,
        answered: Callable[["_Connection"], None],
    ) -> None:
        stream: Any = trio.SocketStream(sock)  # Hypercorn's annotation knows those of TLS only
        super().__init__(app, config, context, ConnectionState({}), stream)
        self._unread = unread
        self._patience = patience
        self._answered = answered
        self._came = self._turn = trio.current_time()  # and since when it is the client's turn, if it is
        self._http: _Http11 | None = None
        self._reading = trio.CancelScope()

    @property
    def keeps_waiting(self) -> bool:
        """Whether it is the client's turn: to ask, to send the rest of a request, or to take its answer.

        Who asks on and on before he is answered has had his turn: no SDK, browser or scraper does so.
        """
        now = trio.current_time()
        if self._asks_on:
            return now >= self._came + self._patience
        if self._blocked:  # an answer takes its time
            return self._unread < inf and now >= self._turn + TURN_SECONDS
        if now < self._turn + self._patience:
            return False
        return self._http is None or self._http.connection.their_state in (h11.IDLE, h11.SEND_BODY)

    @property
    def _asks_on(self) -> bool:
        if self._http is None or self._http.connection.their_state is not h11.DONE:
            return False
        return bool(self._http.connection.trailing_data[0])

    def hang_up(self) -> None:
        """End it, whatever it does."""
        with suppress(OSError):  # it is closed already
            self.stream.socket.shutdown(socket.SHUT_RDWR)

    async def run(self) -> None:
        """Serve it."""
        sock: trio.socket.SocketType = self.stream.socket
        try:
            client, server = sock.getpeername(), sock.getsockname()
            async with TaskGroup() as group:
                self._task_group = group
                self._http = _Http11(
                    self.app,
                    self.config,
                    self.context,
                    group,
                    ConnectionState({}),
                    False,
                    parse_socket_addr(sock.family, client),
                    parse_socket_addr(sock.family, server),
                    self.protocol_send,
                )
                self.protocol = self._http  # type: ignore[assignment]  # what wraps it only changes protocols
                await self.idle_task.restart(group, self._idle_timeout)
                with self._reading:
                    await self._read_data()
                self._left = True
                await self.idle_task.stop()
        except OSError:  # the client has gone
            pass
        finally:
            await self._close()

    async def protocol_send(self, event: Event) -> None:
        """Write, or end; who takes nothing of what is written for too long is hung up on."""
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            if isinstance(event, Updated) and event.idle:
                self._turn = trio.current_time()
                self._answered(self)
            return
        try:
            async with self.send_lock:
                for at in range(0, len(event.data), PIECE_BYTES):
                    await self._write(event.data[at : at + PIECE_BYTES])
        # The last of these: it is just being ended, which the stream takes for sending too.
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            await self.protocol.handle(Closed())
            self._reading.cancel()  # else it would wait with the next request for this answer's end, for ever

    async def _write(self, piece: bytes) -> None:
        self._blocked, self._turn = True, trio.current_time()
        # A cancellation must not end an answer in its middle; `hang_up` does.
        with trio.CancelScope(shield=True, deadline=self._turn + self._unread) as patience:
            await self.stream.send_all(piece)
        self._blocked = False
        if patience.cancelled_caught:
            self.hang_up()
            raise trio.BrokenResourceError

    async def _idle_timeout(self) -> None:
        if (
            not self._left
        ):  # else an answer that was just being written would begin to wait for the next request
            await super()._idle_timeout()


class _Http11(H11Protocol):
    """Ignores that a client would rather speak another protocol, as HTTP allows (RFC 9110, section 7.8).

    A request that tells its length twice is refused, as a proxy before us may have ended it elsewhere and let
    through what we would take for the next one (RFC 9112, section 6.1).
    """

    async def _check_protocol(self, event: h11.Request) -> None:
        """HTTP/1.1 it stays."""

    async def _create_stream(self, request: h11.Request) -> None:
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
            await self._send_error_response(400)
            await self.send(Closed())
            return
        headers = [(name, value) for name, value in request.headers if name != b"upgrade"]
        if len(headers) < len(request.headers):
            request = h11.Request(
                method=request.method,
                target=request.target,
                headers=headers,
                http_version=request.http_version,
            )
        await super()._create_stream(request)


async def _bounded(app: App, max_body: int, scope: Message, receive: Receive, send: Send) -> None:
    """The app for one request; a body that outgrows `max_body` ends it with a 413."""
    exchange = _Exchange(scope, receive, send, max_body)
    with exchange.patience:
        await app(scope, exchange.receive, exchange.send)
    if exchange.patience.cancelled_caught and not exchange.answering:
        text = f"the body is larger than {max_body} bytes".encode()
        headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(text)).encode()))
        await exchange.send({"type": "http.response.start", "status": 413, "headers": headers})
        await exchange.send({"type": "http.response.body", "body": text})


class _Exchange:
    """One request and its answer: counts the body, and goes on reading it while the answer leaves.

    Without the second, Hypercorn's last step would wait for room in a queue that nobody empties any more.
    """

    def __init__(self, scope: Message, receive: Receive, send: Send, max_body: int) -> None:
        self.patience = trio.CancelScope()
        self.answering = False
        self._receive, self._send = receive, send
        self._room = max_body
        headers = dict(scope["headers"])
        self._whole = b"content-length" not in headers and b"transfer-encoding" not in headers
        self._too_long = int(headers.get(b"content-length", 0)) > max_body

    async def receive(self) -> Message:
        if not self._too_long:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._room -= len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._room >= 0:
                return message
        self.patience.cancel()
        await trio.lowlevel.checkpoint()  # leaves by the cancellation
        raise AssertionError("unreachable")

    async def send(self, message: Message) -> None:
        self.answering = True
        if self._whole or message["type"] != "http.response.body" or message.get("more_body", False):
            await self._send(message)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._discard)
            await self._send(message)
            nursery.cancel_scope.cancel()

    async def _discard(self) -> None:
        while (await self._receive()).get("more_body", False):
            pass
