"""Accepts the clients of a source's stream sockets, as many as there are places for."""

import os
import socket
import ssl
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from functools import partial
from math import inf

import structlog
import trio

from agent.accept.connection import Connection, Partials, Reader
from agent.accept.handed import HandedClient
from agent.accept.peer import PlainPeer, TlsPeer
from agent.accept.putter import Putter
from agent.accept.sender import Senders, peer_of
from agent.accept.shortage import Shortage
from agent.accept.turns import Turns
from agent.accept.whose import whose
from agent.clock import Clock
from agent.events import Origin
from agent.guard import Guard
from agent.places import accept_all

# To whom may not send here.
FAREWELL = b'{"error":"forbidden"}\n'
# They can read it only if what they have sent is read (a close with bytes unread is a reset): for so long, in
# bites of so much, a few times what a Unix client's kernel buffer holds by default, of so many at a time.
# Others are just closed.
PARTING_SECONDS, PARTING_BITE, PARTING_BYTES, PARTINGS = 1.0, 64 * 1024, 1024 * 1024, 16

log = structlog.get_logger("accept")


class StreamSource:
    """Listening stream sockets and their connections."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        putter: Putter,
        clock: Clock,
        *,
        reader: Callable[[], Reader],
        ack: bool,
        max_connections: int,
        idle_timeout: float = inf,
        tls: ssl.SSLContext | None = None,
        senders: Senders | None = None,
        allowed: Container[int] = (),
        handed: Sequence[HandedClient] = (),
    ) -> None:
        self._listeners = listeners
        self._old: socket.socket | None = None
        self._scopes: dict[socket.socket, trio.CancelScope] = {}
        self._handed = handed
        self.putter = putter
        self.clock = clock
        self.reader = reader
        self.ack = ack
        self.idle_timeout = idle_timeout
        self._tls = tls
        self._turns = Turns()
        self._senders = senders
        self._allowed = allowed
        self._guard = Guard("connection")
        self.turned_away = 0
        self._named: set[int | None] = set()
        self.partials = Partials()
        self.shortage = Shortage(putter.source)
        self._stopping = False
        self._leaving = False
        self._left: list[tuple[Connection, int]] = []
        self.connections: set[Connection] = set()
        self._places = trio.Semaphore(max_connections)
        self._partings = trio.CapacityLimiter(PARTINGS)

    def leave(self) -> None:
        """At the end leave connections as they are, for another process; see `handed`."""
        self._leaving = True

    def serve_beside(self, listener: socket.socket) -> None:
        """Serve the listener that has the only one's file now, while it runs.

        The one before is served on, for who has another name of it (a container's mount); only the last one.
        """
        if self._old is not None:
            self._close(self._old)
        [self._old], self._listeners = self._listeners, [listener]
        self._accepting.start_soon(self._accept, listener)

    def handed(self) -> list[HandedClient]:
        """The connections that were left, once nothing more is put."""
        return [connection.handed(descriptor) for connection, descriptor in self._left]

    async def run(self, stop: trio.Event) -> None:
        """Serve connections until `stop`; then read each to its end, or leave it."""
        async with trio.open_nursery() as self._serving:
            for client in self._handed:
                sock = trio.socket.from_stdlib_socket(socket.socket(fileno=client.descriptor))
                placed = self._try_place()
                self._serving.start_soon(partial(self._serve, sock, client, placed=placed))
            async with trio.open_nursery() as self._accepting:
                for listener in self._listeners:
                    self._accepting.start_soon(self._accept, listener)
                await stop.wait()
                self._stopping = True
                self._accepting.cancel_scope.cancel()
            if self._old is not None:
                self._close(self._old)
            for connection in tuple(self.connections):
                self._end(connection)

    async def _accept(self, listener: socket.socket) -> None:
        def start(sock: trio.socket.SocketType) -> None:
            self._serving.start_soon(self._serve, sock)

        with trio.CancelScope() as self._scopes[listener]:
            await accept_all(listener, self._places, start, self.shortage.make_room)

    def _close(self, old: socket.socket) -> None:
        """Let nobody come any more, and serve who waits there, also without a place."""
        self._scopes.pop(old).cancel()
        old.shutdown(socket.SHUT_RD)
        with old, suppress(OSError):  # nobody waits any more, or there is no descriptor for who does
            while True:
                sock = trio.socket.from_stdlib_socket(old.accept()[0])
                self._serving.start_soon(partial(self._serve, sock, placed=self._try_place()))

    def _end(self, connection: Connection) -> None:
        if self._leaving:
            connection.leave()
        else:
            connection.stop()

    def _try_place(self) -> bool:
        """Whether there is a place left; who was served before is served without one too."""
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            return False
        return True

    async def _serve(
        self, sock: trio.socket.SocketType, handed: HandedClient | None = None, *, placed: bool = True
    ) -> None:
        with sock:
            stranger = None
            try:
                origin = None
                if self._senders is not None:
                    origin = await self._senders.origin(peer_of(sock.getsockopt))
                if origin is not None and self._allowed and origin.uid not in self._allowed:
                    stranger = origin
                    for read in () if handed is None else handed.reads:  # of when the user might send
                        self.putter.offer(read, admitted=True)
                else:
                    await self._converse(sock, origin, handed)
            finally:
                if placed:
                    self._places.release()
            if stranger is not None:  # who may not send here takes no place from those who may
                await self._turn_away(sock, stranger)

    async def _converse(
        self, sock: trio.socket.SocketType, origin: Origin | None, handed: HandedClient | None
    ) -> None:
        """Take what a client sends, to its end."""
        unix = sock.family == socket.AF_UNIX
        user: object = peer_of(sock.getsockopt).uid if unix else whose(sock)
        if user is None:
            user = sock
        unsent = b"" if handed is None else handed.unsent
        peer = PlainPeer(sock, unsent) if self._tls is None else TlsPeer(sock, self._tls, self._turns, user)
        connection = Connection(self, peer, origin, handed, user)
        self.connections.add(connection)
        self.shortage.came(connection, user)
        if self._stopping:
            self._end(connection)
        try:
            await self._guard.keep(connection.run)
            peer.part()
        finally:
            self.connections.discard(connection)
            self.shortage.left(connection)
        if connection.left:
            self._left.append((connection, os.dup(sock.fileno())))

    async def _turn_away(self, sock: trio.socket.SocketType, origin: Origin) -> None:
        """A user who may not send here is told so, where there is somebody to read it."""
        self.turned_away += 1
        if origin.uid not in self._named:
            self._named.add(origin.uid)
            hint = "add the user to the source's allow_uids, if it should"
            log.warning("a user may not send here; connections are closed", uid=origin.uid, hint=hint)
        with suppress(OSError):
            os.write(sock.fileno(), FAREWELL)
            sock.shutdown(socket.SHUT_WR)
            if self._partings.available_tokens:
                async with self._partings:
                    with trio.move_on_after(PARTING_SECONDS):
                        await _discard(sock)


async def _discard(sock: trio.socket.SocketType) -> None:
    """Read what a client sends until it ends, within bounds."""
    left = PARTING_BYTES
    while left > 0 and (some := await sock.recv(PARTING_BITE)):
        left -= len(some)
