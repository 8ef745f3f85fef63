"""Makes a Unix source's socket file anew where somebody has removed it while the agent runs."""

import socket
from collections.abc import Callable

import structlog
import trio

from agent.accept.sockets import Opened, SocketError, SocketFile, ask_buffer, bind_unix
from agent.config import Unix, UnixDatagram

# A look is one lstat(2), some microseconds; a program that connects again mostly waits a second or more.
LOOK_SECONDS = 1.0

log = structlog.get_logger("accept")


async def keep(file: SocketFile, settings: Unix, serve: Callable[[Opened], None], stop: trio.Event) -> None:
    """Look until `stop` whether the file is there, and have a new socket served where it is not.

    What is no socket, and a living program's, is left as it is: that is told, and tried again.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_keep, file, settings, serve, stop)
        await stop.wait()
        nursery.cancel_scope.cancel()


async def _keep(file: SocketFile, settings: Unix, serve: Callable[[Opened], None], stop: trio.Event) -> None:
    while True:
        await trio.sleep(LOOK_SECONDS)
        if stop.is_set():
            return
        if file.leads_here():
            _tell_mended(file, settings)
            continue
        try:
            opened = _bound(file, settings)
        except SocketError as error:
            _tell_trouble(file, settings, error)
            continue
        if file.trouble:
            _tell_mended(file, settings)
        else:
            log.warning(
                "somebody removed a source's socket file; it was made anew, and clients find it again",
                source=settings.name,
                path=file.path,
                hint="what cleans that folder should leave the file; who was connected still is",
            )
        serve(opened)


def _tell_trouble(file: SocketFile, settings: Unix, error: SocketError) -> None:
    if not file.trouble:
        log.error(
            f"clients do not find a source's socket file any more: {error}",
            source=settings.name,
            path=file.path,
            hint=error.hint,
        )
    file.trouble = str(error)


def _tell_mended(file: SocketFile, settings: Unix) -> None:
    if file.trouble:
        file.trouble = ""
        text = "the source's socket file is there, and clients find it again"
        log.info(text, source=settings.name, path=file.path)


def _bound(file: SocketFile, settings: Unix) -> Opened:
    """A new socket that has the file. Raises `SocketError`."""
    kind = socket.SOCK_DGRAM if isinstance(settings, UnixDatagram) else socket.SOCK_STREAM
    file.forget_the_last()
    try:
        sock = bind_unix(file.path, kind, settings.mode, settings.group)
    except OSError as error:  # of the socket itself: no descriptor is left, or no memory
        hint = "it is tried again each second; are there many clients (LimitNOFILE=)?"
        raise SocketError(f"{file.path}: no socket can be made: {error.strerror}", hint) from error
    file.give(sock)
    granted = ask_buffer(sock, settings.receive_buffer) if isinstance(settings, UnixDatagram) else None
    return Opened(sock, granted, file)
