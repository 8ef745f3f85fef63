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
        body = bytearray()  # a list of its pieces would be many times as large where each is a byte
        whole = b""
        try:
            unread: Unread | None = Unread.TOO_SLOW
            with trio.move_on_after(self._seconds):
                unread = await self._gather(receive, body)
            whole = bytes(body)
            body.clear()
            yield whole if unread is None else unread
        finally:
            self.held -= len(body) + len(whole)

    async def _gather(self, receive: Receive, body: bytearray) -> Unread | None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return Unread.GONE
            piece, more = message.get("body", b""), message.get("more_body", False)
            if len(body) + len(piece) > self._largest:
                return Unread.TOO_LARGE
            if self.held + len(piece) > self._together:
                return Unread.NO_ROOM
            body += piece
            self.held += len(piece)
        return None
