"""Takes datagrams, many at a time: UDP and Unix datagram sockets."""

import socket
from collections.abc import Container

import trio

from agent.accept.drain import Drain, SignedDrain
from agent.accept.putter import Putter
from agent.accept.sender import Senders, ask_credentials
from agent.accept.sockets import read_cookie, read_drops
from agent.buffer import BufferBroken
from agent.clock import Clock
from agent.decode.ndjson import count_lines
from agent.events import Denied, Origin, Read

# A wake-up costs more than a datagram, so after a small drain the reader lets some gather. Measured: 2 ms at
# 200,000 datagrams a second, 10 ms below 2,000, halve the CPU time.
FEW, SEVERAL = 20, 256
SHORT_PAUSE, LONG_PAUSE = 0.002, 0.010
# A smaller kernel buffer would overflow during a pause (1 MiB holds some 800 datagrams of 343 bytes).
PAUSING_BUFFER = 1024 * 1024

DROPS_SECONDS = 1.0


class DatagramSource:
    """A bound datagram socket, read to its end once `stop` is set.

    With `senders` the kernel is asked who sent each datagram, and only `allowed` users may (empty: all).
    """

    def __init__(
        self,
        sock: socket.socket,
        putter: Putter,
        clock: Clock,
        *,
        max_event: int,
        granted: int,
        one_line: bool = False,
        senders: Senders | None = None,
        allowed: Container[int] = (),
    ) -> None:
        self._sock = sock
        self._putter = putter
        self._clock = clock
        self._senders = senders
        self._allowed = allowed
        unix = sock.family == socket.AF_UNIX
        # A Unix socket's queue holds 10 datagrams: a pause there would hold its senders up.
        self._pausing = not unix and granted >= PAUSING_BUFFER
        if senders is not None:
            ask_credentials(sock)
        kind = Drain if senders is None else SignedDrain
        self._drain = kind(sock, max_event, patient=not self._pausing, one_line=one_line)
        # Unlike its descriptor it is never used twice in a boot, and the same for whoever reads the socket.
        self._cookie = read_cookie(sock)
        self._drops = 0
        self._leaving = False
        self._replaced = False
        self._over = trio.Event()
        self.drops_known = self._cookie is not None and read_drops(sock) is not None

    def leave(self) -> None:
        """At the end leave the kernel's queue as it is, for another process; see `replaced`."""
        self._leaving = True

    def replaced(self) -> None:
        """Another socket has its file now: it is never left, but read to its end and closed."""
        self._replaced = True

    def retire(self) -> None:
        """Have one that was replaced end now."""
        self._over.set()

    async def run(self, stop: trio.Event) -> None:
        """Read until `stop`, then drain the kernel's queue once, or leave it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read)
            if self.drops_known:
                nursery.start_soon(self._count_drops)
            nursery.start_soon(self._end_with, stop)
            await self._over.wait()
            nursery.cancel_scope.cancel()
        if self._replaced:
            self._sock.shutdown(socket.SHUT_RD)  # who sends now is told that it does not arrive
            while await self._offer_drain():  # also without room: a Unix socket's queue is short
                pass
        while not self._leaving and await self._offer_drain():
            await self._putter.room()
        await self._count_new_drops()
        if self._replaced:
            self._sock.close()

    async def _end_with(self, stop: trio.Event) -> None:
        await stop.wait()
        self._over.set()

    async def _read(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            await self._putter.room()
            count = await self._offer_drain()
            if self._pausing and count < SEVERAL:
                await trio.sleep(LONG_PAUSE if count <= FEW else SHORT_PAUSE)

    async def _offer_drain(self) -> int:
        """Hand over what is in the kernel's queue; how many datagrams that was."""
        count, pieces = self._drain.take()
        now = self._clock.now()
        with trio.CancelScope(shield=True):  # what was taken from the kernel is nowhere else
            for piece in pieces:
                if self._senders is None:
                    self._putter.offer(Read(piece.lines, now, piece.cut))
                else:
                    origin = await self._senders.origin(piece.sender)
                    self._putter.offer(self._signed(Read(piece.lines, now, piece.cut, origin), origin))
        return count

    def _signed(self, read: Read, origin: Origin) -> Read:
        """The read, or that it was refused as its sender may not send here."""
        if not self._allowed or origin.uid in self._allowed:
            return read
        lines = count_lines(read.lines) + (read.cut is not None)
        who = "of an unknown user" if origin.uid is None else f"of uid {origin.uid}"
        return Read(b"", read.at, denied=Denied("forbidden", lines, who))

    async def _count_drops(self) -> None:
        """Look at the kernel's count, also when no datagram comes any more."""
        while True:
            await self._count_new_drops()
            await trio.sleep(DROPS_SECONDS)

    async def _count_new_drops(self) -> None:
        dropped = read_drops(self._sock)
        if not self.drops_known or dropped is None or dropped == self._drops:
            return
        try:
            await self._putter.note_drops(f"{self._clock.now().boot}/{self._cookie}", dropped)
        except BufferBroken:
            return  # the buffer tells its own trouble; the next look tries again
        self._drops = dropped
