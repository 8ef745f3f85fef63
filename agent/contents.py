"""The pages with what is in the buffer: its events as lines, its database as a file; for the admin socket.

They serve a running agent's socket and, where none runs, the command that opened the buffer itself. Nothing
is taken from delivery.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from os import fstat
from typing import IO

import structlog
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.buffer import Contents, Kept, Shown
from agent.deliver.cargo import opened
from agent.events import CHUNK_BYTES
from agent.flow import NDJSON, Body, Flow

log = structlog.get_logger("pages")

# A part is read and sent before the next is read: enough to be quick, and what one reader holds in memory.
PART_BYTES = CHUNK_BYTES


def routes(buffer: Kept) -> list[Route]:
    """The pages, to be part of an app."""

    async def export(_request: Request) -> Response:
        return Flow(partial(_exported, buffer), NDJSON)

    async def backup(_request: Request) -> Response:
        return Flow(partial(_backed_up, buffer), "application/vnd.sqlite3")

    return [Route("/export", export), Route("/backup", backup)]


@asynccontextmanager
async def _exported(buffer: Kept) -> AsyncIterator[Body]:
    """The events that are there now, but for those that are delivered before they are reached."""
    yield Body(_lines(buffer, await buffer.newest()), buffer.stats().events)


async def _lines(buffer: Contents, newest: int) -> AsyncIterator[bytes]:
    after = 0
    while shown := await buffer.beyond(after, newest, PART_BYTES):
        yield await trio.to_thread.run_sync(_as_lines, shown)
        after = shown[-1][0]


def _as_lines(shown: Sequence[Shown]) -> bytes:
    """Each event as it is, on a line of its own."""
    lines: list[bytes] = []
    for ident, chunk in shown:
        events = opened(chunk)
        if events is None:
            log.error(
                "a chunk is damaged; its events are not exported",
                chunk=ident,
                events=chunk.events,
                hint="look for the disk's errors (dmesg); delivery will count them as shed",
            )
        lines += events or ()
    return b"".join(b"%b\n" % line for line in lines)


@asynccontextmanager
async def _backed_up(buffer: Contents) -> AsyncIterator[Body]:
    async with buffer.copied() as file:
        yield Body(_parts(file), fstat(file.fileno()).st_size)


async def _parts(file: IO[bytes]) -> AsyncIterator[bytes]:
    while part := await trio.to_thread.run_sync(file.read, PART_BYTES):
        yield part
