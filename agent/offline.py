"""Opens the buffer of an agent that does not run, under its lock, for the commands that look into it."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory

import trio
from starlette.applications import Starlette

from agent import contents, httpd, letters
from agent.buffer.sqlite import open_sqlite
from agent.config import Buffer
from agent.metrics import Metrics


@asynccontextmanager
async def offline(settings: Buffer) -> AsyncIterator[str]:
    """The path of a socket with the pages on what the buffer holds, for a block, without any agent.

    Raises `BufferBusy` where an agent runs after all, `BufferBroken` where the file cannot be used.
    """
    async with open_sqlite(settings, Metrics()) as buffer, trio.open_nursery() as nursery:
        # A folder of its own, which nobody else may enter.
        with TemporaryDirectory(prefix="capture-agent-") as folder, socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"{folder}/sock")
            sock.listen()
            app = Starlette(routes=[*letters.routes(buffer), *contents.routes(buffer)])
            await nursery.start(_serve, app, sock)
            yield f"{folder}/sock"
            nursery.cancel_scope.cancel()


async def _serve(
    app: httpd.App, sock: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    await httpd.serve(app, [sock], shutdown=trio.Event(), max_connections=1, task_status=task_status)
