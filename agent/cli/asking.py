"""How a command asks for what the buffer holds: the running agent or, where none runs, the buffer's file."""

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import click

from agent.cli.options import load_config, plainly
from agent.cli.reach import find_socket, no_permission, not_running, refused, silent

if TYPE_CHECKING:
    import httpx

# A page is made in milliseconds; a disk that stalls may take long, and then somebody should look.
PATIENCE_SECONDS = 60.0
# Whether the agent's process turns at all needs no disk; an agent under load says so in milliseconds.
FIRST_PATIENCE_SECONDS = 5.0


def asked(config_file: str | None, work: Callable[["httpx.AsyncClient"], Awaitable[None]]) -> None:
    """Do something with whoever has the buffer; tell what goes wrong plainly.

    Exits 3 where there is neither an agent nor a buffer.
    """
    import trio

    async def run() -> None:
        async with _reached(config_file) as client:
            await work(client)

    with plainly():
        try:
            trio.run(run)
        except* (SystemExit, click.ClickException, click.Abort, KeyboardInterrupt, OSError) as ended:
            raise _first(ended) from None


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    first: BaseException = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


@asynccontextmanager
async def _reached(config_file: str | None) -> AsyncIterator["httpx.AsyncClient"]:
    import httpx

    path = find_socket(config_file, "admin.sock", needed=False)
    if path:
        async with at_socket(path) as client:
            try:
                await client.get("/livez", timeout=FIRST_PATIENCE_SECONDS)
            except httpx.ConnectError as error:
                if "Permission denied" in str(error):
                    raise no_permission(path) from None
            except httpx.HTTPError as error:
                raise silent(path, error) from None
            else:
                async with answering(path):
                    yield client
                return
    async with _opened(config_file, path) as client:
        yield client


def at_socket(path: str) -> "httpx.AsyncClient":
    """A client of the pages at a Unix socket."""
    import httpx

    transport = httpx.AsyncHTTPTransport(uds=path)
    return httpx.AsyncClient(transport=transport, base_url="http://agent", timeout=PATIENCE_SECONDS)


@asynccontextmanager
async def answering(path: str) -> AsyncIterator[None]:
    """An agent that does not answer as it should is told in one line; exit code 1."""
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        what = f"HTTP {error.response.status_code}"
        click.echo(f"capture-agent: the agent at {path} refused: {what}; its log says why", err=True)
        raise SystemExit(1) from None
    except httpx.HTTPError as error:
        raise silent(path, error) from None


@asynccontextmanager
async def _opened(config_file: str | None, sock: str) -> AsyncIterator["httpx.AsyncClient"]:
    """The buffer that no agent has open."""
    from agent import logs
    from agent.offline import offline

    settings = load_config(config_file, keys=False).buffer
    if settings.kind != "sqlite" or not _is_there(settings.path):
        raise not_running(sock or "its admin socket, which is off")
    logs.set_up("warning", "auto", os.environ)
    with _as_owner(settings.path):
        async with offline(settings) as path, answering(path), at_socket(path) as client:
            yield client


def _is_there(path: str) -> bool:
    return os.path.exists(path)


@contextmanager
def _as_owner(path: str) -> Iterator[None]:
    """For root, to be a file's owner for a block: what SQLite makes beside it must be theirs."""
    found = os.stat(path)
    if os.geteuid() != 0 or found.st_uid == 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(found.st_gid)
    os.seteuid(found.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


@contextmanager
def progress(total: int, *, shown: bool, sized: bool = False) -> Iterator[Callable[[int], None]]:
    """On a terminal, a bar on stderr for so many steps, or bytes where `sized`; 0 where that is not known."""
    if not shown or not sys.stderr.isatty():
        yield lambda _some: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TimeRemainingColumn,
    )

    columns = BarColumn(), DownloadColumn(binary_units=True) if sized else MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total or None)
        yield lambda some: bar.advance(task, some)


async def parts_of(answer: "httpx.Response") -> AsyncIterator[bytes]:
    """A body as it comes. What the agent will not do is told, and ends the command."""
    if answer.status_code != 200:
        await answer.aread()
        raise refused(answer, "its admin socket")
    async for part in answer.aiter_raw():
        yield part
