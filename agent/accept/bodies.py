"""Reads the bodies of HTTP requests, bounded in size, in time, and all together in memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum

import trio

from agent.httpd import Receive


class Unread(Enum):
    """Why there is no body."""

    TOO_LARGE = "the body is too large"
    TOO_SLOW = "the body did not come in time"
    NO_ROOM = "too many bodies are being read"
    GONE = "the client has left"


class Bodies:
    """Each at most `largest` bytes and `seconds` under way; all that are held are at most `together`."""

    def __init__(self, *, largest: int, together: int, seconds: float) -> None:
        self._largest, self._together, self._seconds = largest, together, seconds
        self.held = 0

    @asynccontextmanager
    async def read(self, receive: Receive) -> AsyncIterator[bytes | Unread]:
        """One request's body, which is counted as held for the block."""
        pieces: list[bytes] = []
        try:
            unread: Unread | None = Unread.TOO_SLOW
            with trio.move_on_after(self._seconds):
                unread = await self._gather(receive, pieces)
            pieces[:] = [b"".join(pieces)]
            yield pieces[0] if unread is None else unread
        finally:
            self.held -= sum(map(len, pieces))

    async def _gather(self, receive: Receive, pieces: list[bytes]) -> Unread | None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return Unread.GONE
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size > self._largest:
                return Unread.TOO_LARGE
            if self.held + len(piece) > self._together:
                return Unread.NO_ROOM
            if piece:  # thousands of empty ones would be memory too
                pieces.append(piece)
                self.held += len(piece)
        return None
