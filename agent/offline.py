"""Opens the buffer of an agent that does not run, under its lock, for the commands that look into it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from agent import letters
from agent.buffer.sqlite import open_sqlite
from agent.config import Buffer
from agent.metrics import Metrics


@asynccontextmanager
async def offline(settings: Buffer) -> AsyncIterator[Starlette]:
    """The socket's pages of the dead letters, for a block, without any agent.

    Raises `BufferBusy` where an agent runs after all, `BufferBroken` where the file cannot be used.
    """
    async with open_sqlite(settings, Metrics()) as buffer:
        yield Starlette(routes=letters.routes(buffer))
