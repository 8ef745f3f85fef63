"""Takes datagrams, many at a time: UDP and Unix datagram sockets."""

import os
import socket

import trio

from agent.accept.putter import Putter
from agent.accept.sockets import read_drops
from agent.clock import Clock
from agent.events import Cut, Read, sample

# One drain: what fits a chunk. More stays in the kernel for the next.
DRAIN_BYTES = 512 * 1024
# The largest UDP datagram's payload is 65,507 bytes.
UDP_BYTES = 65_536
# A Unix datagram may be as large as its sender's buffer, by default 208 KiB (net.core.wmem_max).
UNIX_BYTES = 1024 * 1024

# A wake-up costs more than a datagram, so after a small drain the reader lets some gather. Measured: 2 ms at
# 200,000 datagrams a second, 10 ms below 2,000, halve the CPU time.
FEW, SEVERAL = 20, 256
SHORT_PAUSE, LONG_PAUSE = 0.002, 0.010
# A smaller kernel buffer would overflow during a pause (1 MiB holds some 800 datagrams of 343 bytes).
PAUSING_BUFFER = 1024 * 1024
# The queue of a Unix socket holds 10 datagrams (net.unix.max_dgram_qlen), so in a flood its sender refills it
# in less time than going to sleep and waking up would take: the reader steps aside and looks again. Measured
# with none, 32 and 100 looks: 97,000, 131,000 and 150,000 events/s; 9.1, 6.8 and 6.6 CPU s per million.
FLOOD, MOST_LOOKS = 5, 100

DROPS_SECONDS = 1.0
NEWLINE = 10


class DatagramSource:
    """A bound datagram socket, read to its end once `stop` is called."""

    def __init__(
        self, sock: socket.socket, putter: Putter, clock: Clock, *, max_event: int, granted: int
    ) -> None:
        self._sock = sock
        self._putter = putter
        self._clock = clock
        unix = sock.family == socket.AF_UNIX
        # A datagram may hold many events, so its place is not what one event may have.
        self._slot = max(max_event + 1, UNIX_BYTES) if unix else UDP_BYTES
        self._arena = bytearray(DRAIN_BYTES + self._slot + 1)
        self._view = memoryview(self._arena)
        # A Unix socket's queue holds 10 datagrams: a pause there would hold its senders up.
        self._pausing = not unix and granted >= PAUSING_BUFFER
        self._drops = read_drops(sock)
        self.drops_known = self._drops is not None

    async def run(self, stop: trio.Event) -> None:
        """Read until `stop`, then drain the kernel's queue once."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read)
            if self.drops_known:
                nursery.start_soon(self._count_drops)
            await stop.wait()
            nursery.cancel_scope.cancel()
        while self._offer_drain():
            await self._putter.room()
        await self._count_new_drops()

    async def _read(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            await self._putter.room()
            count = self._offer_drain()
            if self._pausing and count < SEVERAL:
                await trio.sleep(LONG_PAUSE if count <= FEW else SHORT_PAUSE)

    def _offer_drain(self) -> int:
        """Hand over what is in the kernel's queue; how many datagrams that was."""
        count, end, cut = self._drain()
        if end or cut:
            self._putter.offer(Read(bytes(self._view[:end]), self._clock.now(), cut))
        return count

    def _drain(self) -> tuple[int, int, Cut | None]:
        """Lay datagrams end to end in the arena, a newline behind each: their count and bytes.

        One that is larger than its place ends the drain: its whole lines count as any others, and what
        follows them is told as the cut.
        """
        arena, view, slot, receive = self._arena, self._view, self._slot, self._sock.recv_into
        count = end = looks = 0
        while end < DRAIN_BYTES:
            try:
                size = receive(view[end : end + slot], 0, socket.MSG_TRUNC)  # tells the size that it had
            except BlockingIOError:
                if self._pausing or count < FLOOD or looks == MOST_LOOKS:
                    break
                looks += 1
                os.sched_yield()
                continue
            except OSError:  # an error of an earlier datagram (ICMP); the next ones are whole
                continue
            count += 1
            if size > slot:
                whole = arena.rfind(b"\n", end, end + slot) + 1 or end
                rest = sample(bytes(view[whole : end + slot]))
                return count, whole, Cut("truncated" if whole > end else "too_large", rest)
            if size:
                end += size
                if arena[end - 1] != NEWLINE:
                    arena[end] = NEWLINE
                    end += 1
        return count, end, None

    async def _count_drops(self) -> None:
        """Look at the kernel's count, also when no datagram comes any more."""
        while True:
            await trio.sleep(DROPS_SECONDS)
            await self._count_new_drops()

    async def _count_new_drops(self) -> None:
        dropped = read_drops(self._sock)
        if dropped is not None and self._drops is not None and dropped != self._drops:
            new = (dropped - self._drops) % 2**32
            self._drops = dropped
            await self._putter.count_dropped(new)
