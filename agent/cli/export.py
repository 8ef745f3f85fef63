"""`capture-agent export`: the events that wait in the buffer, as lines."""

import sys
from codecs import getincrementaldecoder
from typing import TYPE_CHECKING

import click

from agent.cli.asking import asked, parts_of, progress
from agent.cli.options import config_option
from agent.cli.output import legible

if TYPE_CHECKING:
    import httpx


@click.command()
@config_option
def command(config_file: str | None) -> None:
    """Print the events that wait in the buffer as NDJSON, the oldest first.

    They stay there and are delivered as ever. Each has its uuid and time: what is also sent by
    `capture-agent send --stdin` to another agent is kept once by PostHog. Through the running agent or,
    where none runs, from its buffer's file.
    """

    async def work(client: "httpx.AsyncClient") -> None:
        from agent.flow import TOTAL

        whole = getincrementaldecoder("utf-8")("backslashreplace").decode  # a part may end within a character
        async with client.stream("GET", "/export") as answer:
            total = int(answer.headers.get(TOTAL, 0))
            # Lines on a terminal are progress enough, and a bar would stand in them.
            terminal = sys.stdout.isatty()
            with progress(total, shown=not terminal) as advance:
                async for part in parts_of(answer):
                    sys.stdout.buffer.write(legible(whole(part)).encode() if terminal else part)
                    advance(part.count(b"\n"))
            sys.stdout.buffer.flush()

    asked(config_file, work)
