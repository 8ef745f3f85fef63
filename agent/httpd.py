"""Serves one ASGI app over sockets that are already open, inside the caller's nursery, with Hypercorn.

It promises: no socket is bound or unlinked here; nothing is logged but errors; a body over `max_body` is a
413 before the app has it whole; an app may answer without reading a body; whatever a client does (never
reads, never writes), a shutdown ends within its grace and a cancellation at once.
"""

import logging
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve

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
# Hypercorn ends a connection after 1,000, upon which a client that does not look for that fails once.
MOST_REQUESTS = 2**31
# listen(2) is called again by Hypercorn; the kernel cuts this at somaxconn.
BACKLOG = 4096
# Linux lists a process's open files here; elsewhere `_hang_up` does nothing.
DESCRIPTORS = "/proc/self/fd"


async def serve(
    app: App,
    sockets: Sequence[socket.socket],
    *,
    shutdown: trio.Event,
    grace: float = 3.0,
    max_body: int = 1024 * 1024,
    keep_alive: float = KEEP_ALIVE,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until `shutdown` is set, then give open ones `grace` seconds.

    The sockets stay the caller's, who closes them; they become non-blocking, as they share their state with
    the duplicates that Hypercorn adopts and closes.
    """
    config = Config()
    config.errorlog = logging.getLogger("agent.httpd")  # a logger of ours: Hypercorn adds no handler to it
    config.errorlog.setLevel(logging.ERROR)
    config.graceful_timeout = grace
    config.keep_alive_timeout = keep_alive
    config.keep_alive_max_requests = MOST_REQUESTS
    config.h11_max_incomplete_size = MAX_HEAD
    config.backlog = BACKLOG
    config.include_server_header = False
    addresses = [(sock.family, sock.getsockname()) for sock in sockets]
    duplicates = [os.dup(sock.fileno()) for sock in sockets]
    config.bind = [f"fd://{number}" for number in duplicates]
    run = partial(
        hypercorn_serve,
        partial(_bounded, app, max_body),
        config,
        shutdown_trigger=shutdown.wait,
        mode="asgi",
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_part_after, shutdown, grace, addresses)
        async with trio.open_nursery() as serving:
            await serving.start(run)
            for number in duplicates:
                os.set_inheritable(number, False)  # Hypercorn sets it, for workers that we never have
            task_status.started()
        nursery.cancel_scope.cancel()


async def _part_after(shutdown: trio.Event, grace: float, addresses: Sequence[tuple[int, Any]]) -> None:
    """Hang up on everybody `grace` after a shutdown, or at once when cancelled.

    Hypercorn shields its sends, so that a client which never reads would hold a cancellation for ever.
    """
    try:
        await shutdown.wait()
        await trio.sleep(grace)
    finally:
        _hang_up(addresses)


def _hang_up(addresses: Sequence[tuple[int, Any]]) -> None:
    """Shut down every connection that was accepted at one of these addresses.

    Hypercorn tells nobody its connections, so the kernel is asked: an accepted socket has its listener's
    path or, as the address may have been a wildcard, its port.
    """
    ours = {_place(family, name) for family, name in addresses}
    for number in os.listdir(DESCRIPTORS) if os.path.isdir(DESCRIPTORS) else ():
        with suppress(OSError):  # closed meanwhile, or not connected
            if not os.readlink(f"{DESCRIPTORS}/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as sock:
                listening = sock.type != socket.SOCK_STREAM or sock.getsockopt(
                    socket.SOL_SOCKET, socket.SO_ACCEPTCONN
                )
                if not listening and _place(sock.family, sock.getsockname()) in ours:
                    sock.shutdown(socket.SHUT_RDWR)


def _place(family: int, name: Any) -> tuple[int, Any]:
    return family, name[1] if isinstance(name, tuple) else name


async def _bounded(app: App, max_body: int, scope: Message, receive: Receive, send: Send) -> None:
    """The app for one request; a body that outgrows `max_body` ends it with a 413."""
    if scope["type"] == "lifespan":
        # What an app needs is opened around `serve`; Hypercorn insists on an answer.
        for _ in ("startup", "shutdown"):
            await send({"type": (await receive())["type"] + ".complete"})
        return
    if scope["type"] != "http":
        await app(scope, receive, send)
        return
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
