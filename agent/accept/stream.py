"""Accepts the clients of a stream socket, as many as there are places for."""

import errno
import socket
import ssl
from math import inf

import trio

from agent.accept.connection import Connection, Partials
from agent.accept.guard import guarded
from agent.accept.peer import PlainPeer, TlsPeer
from agent.accept.putter import Putter
from agent.clock import Clock

# Out of descriptors: wait for some to be closed.
EXHAUSTED_SECONDS = 0.1


class StreamSource:
    """A listening stream socket and its connections."""

    def __init__(
        self,
        listener: socket.socket,
        putter: Putter,
        clock: Clock,
        *,
        max_event: int,
        ack: bool,
        max_connections: int,
        idle_timeout: float = inf,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._listener = trio.socket.from_stdlib_socket(listener)
        self.putter = putter
        self.clock = clock
        self.max_event = max_event
        self.ack = ack
        self.idle_timeout = idle_timeout
        self._tls = tls
        self.partials = Partials()
        self.stopping = False
        self.connections: set[Connection] = set()
        self._places = trio.Semaphore(max_connections)

    async def run(self, stop: trio.Event) -> None:
        """Serve connections until `stop`; then read each to its end."""
        async with trio.open_nursery() as nursery:
            accepting = trio.CancelScope()
            nursery.start_soon(self._accept, nursery, accepting)
            await stop.wait()
            self.stopping = True
            accepting.cancel()
            for connection in tuple(self.connections):
                connection.stop()

    async def _accept(self, nursery: trio.Nursery, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await self._places.acquire()
                try:
                    sock, _ = await self._listener.accept()
                except OSError as error:
                    self._places.release()
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        await trio.sleep(EXHAUSTED_SECONDS)
                    continue
                except trio.Cancelled:
                    self._places.release()
                    raise
                nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        peer = PlainPeer(sock) if self._tls is None else TlsPeer(sock, self._tls)
        connection = Connection(self, peer)
        self.connections.add(connection)
        try:
            with sock:
                await guarded(connection.run, "connection")
        finally:
            self.connections.discard(connection)
            self._places.release()
