"""How much of a source's reads may be on its way into the buffer: in all, of one user, and of one client."""

from collections import Counter, defaultdict
from collections.abc import Callable

import trio

from agent.decode.ndjson import count_byte
from agent.events import CHUNK_BYTES, CHUNK_EVENTS

# Between reader and putter: 8 chunks (the handbook's joint). Beyond it nobody reads.
QUEUE_BYTES = 8 * CHUNK_BYTES
# What one client may have on its way: two puts, so that one is read while the other commits.
CLIENT_BYTES, CLIENT_LINES = 2 * CHUNK_BYTES, 8 * CHUNK_EVENTS
# And all clients of one user, so that others find room: a queue of lines of a byte is work for ten seconds.
USER_BYTES = QUEUE_BYTES // 2


class Room:
    """Who reads next, and when."""

    def __init__(self) -> None:
        self.held = 0
        self._held_of: Counter[object] = Counter()  # of a client, and of a user
        self._lines_of: Counter[object] = Counter()
        self._freed = trio.Event()
        self._turn = trio.StrictFIFOLock()
        self._turns: defaultdict[int, trio.StrictFIFOLock] = defaultdict(trio.StrictFIFOLock)

    async def wait(self, client: object, user: int | None) -> None:
        """Return when another read may be made, for a client and its user where told; readers take turns.

        Without turns all who wait would read in the same moment, and be far beyond what there is room for.
        """
        while client is not None and self._has_enough(client):
            await self._freed.wait()
        if user is not None:
            await self._wait_turn(self._turns[user], lambda: self._held_of[user] >= USER_BYTES)
        await self._wait_turn(self._turn, lambda: self.held >= QUEUE_BYTES)

    def _has_enough(self, client: object) -> bool:
        return self._held_of[client] >= CLIENT_BYTES or self._lines_of[client] >= CLIENT_LINES

    async def _wait_turn(self, turn: trio.StrictFIFOLock, is_full: Callable[[], bool]) -> None:
        if not is_full() and not turn.locked():
            return
        async with turn:
            while is_full():
                await self._freed.wait()

    def hold(self, client: object, user: int | None, text: bytes) -> None:
        """This of a client's and its user's is on its way."""
        self._count(client, user, len(text), count_byte(text, b"\n"))

    def free(self, client: object, user: int | None, text: bytes) -> None:
        """It has arrived; see `tell`."""
        self._count(client, user, -len(text), -count_byte(text, b"\n"))

    def _count(self, client: object, user: int | None, size: int, lines: int) -> None:
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
