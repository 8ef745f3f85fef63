"""How much of a source's reads may be on its way into the buffer: in all, of one user, and of one client."""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from agent.events import CHUNK_BYTES, CHUNK_EVENTS

# Between reader and putter: 8 chunks (the handbook's joint). Beyond it nobody reads.
QUEUE_BYTES = 8 * CHUNK_BYTES
# And in lines, where no client is known that could have too many: 8 MiB of lines of a byte are work for 15 s,
# and what comes behind them is late, or dropped by the kernel.
QUEUE_LINES = 32 * CHUNK_EVENTS
# What one client may have on its way: two puts, so that one is read while the other commits.
CLIENT_BYTES, CLIENT_LINES = 2 * CHUNK_BYTES, 8 * CHUNK_EVENTS
# And all clients of one user, so that others find room: a queue of lines of a byte is work for ten seconds.
USER_BYTES = QUEUE_BYTES // 2
# Beyond these for clients that have little on their way: they do not stand in line behind those who flood.
# Half a read is little: 5,000 events a second are 15 KiB each 10 ms.
SPARE_BYTES, LITTLE_BYTES = 2 * CHUNK_BYTES, 128 * 1024
# So many reads of a user at once: each is 256 KiB, and of lines of a byte 1 ms of everybody's time.
USER_READS = 4


class Room:
    """Who reads next, and when. Where no user is known, a client is one."""

    def __init__(self) -> None:
        self.held = 0
        self._held_of: Counter[object] = Counter()  # of a client, and of a user
        self._lines_of: Counter[object] = Counter()
        self._reads_of: Counter[object] = Counter()
        self._freed = trio.Event()
        self._moved = trio.Event()  # something was freed, or a read has ended
        self._turns: defaultdict[object, trio.StrictFIFOLock] = defaultdict(trio.StrictFIFOLock)

    async def wait(self) -> None:
        """Return when somebody whom nobody knows may read; readers take turns.

        Without turns all who wait would read in the same moment, and be far beyond what there is room for.
        """
        await self._wait_turn(None, lambda: self.held >= QUEUE_BYTES or self._lines_of[None] >= QUEUE_LINES)

    @asynccontextmanager
    async def read(self, client: object, user: object) -> AsyncIterator[None]:
        """A block for one read by a client, of so many at once of its user's."""
        while self._held_of[client] >= CLIENT_BYTES or self._lines_of[client] >= CLIENT_LINES:
            await self._freed.wait()
        little = self._held_of[client] < LITTLE_BYTES
        spare = SPARE_BYTES if little else 0
        await self._wait_turn((user, little), lambda: self._is_busy(user, USER_BYTES + spare))
        self._reads_of[user] += 1
        try:
            await self._wait_turn(little, lambda: self.held >= QUEUE_BYTES + spare)
            yield
        finally:
            self._reads_of[user] -= 1
            if not self._reads_of[user]:
                del self._reads_of[user]
            self._move()

    def _is_busy(self, user: object, most: int) -> bool:
        return self._held_of[user] >= most or self._reads_of[user] >= USER_READS

    async def _wait_turn(self, whose: object, is_full: Callable[[], bool]) -> None:
        turn = self._turns[whose]
        if is_full() or turn.locked():
            async with turn:
                while is_full():
                    await self._moved.wait()
        if not turn.locked():  # users come and go
            self._turns.pop(whose, None)

    def hold(self, client: object, user: object, size: int, lines: int) -> None:
        """So much of a client's and its user's is on its way."""
        self._count(client, user, size, lines)

    def free(self, client: object, user: object, size: int, lines: int) -> None:
        """It has arrived; see `tell`."""
        self._count(client, user, -size, -lines)

    def _count(self, client: object, user: object, size: int, lines: int) -> None:
        self.held += size
        for held, whose, more in (
            (self._held_of, client, size),
            (self._held_of, user, size),
            (self._lines_of, client, lines),
        ):
            held[whose] += more
            if not held[whose]:
                del held[whose]

    def tell(self) -> None:
        """Those who wait look again."""
        self._freed.set()
        self._freed = trio.Event()
        self._move()

    def _move(self) -> None:
        self._moved.set()
        self._moved = trio.Event()
