"""Accepts a listener's clients while there are places for them; those beyond wait in the kernel."""

import errno
import socket
from collections.abc import Callable

import trio

# Out of descriptors: wait for some to be closed.
EXHAUSTED_SECONDS = 0.1


async def accept_all(
    listener: socket.socket, places: trio.Semaphore, start: Callable[[trio.socket.SocketType], None]
) -> None:
    """Take a place for each client and start it, until cancelled. Whoever serves it gives the place back."""
    while True:
        await places.acquire()
        try:
            sock, _ = listener.accept()
        except OSError as error:
            places.release()  # while nobody comes here, the other listeners may need it
            if error.errno == errno.EAGAIN:
                await trio.lowlevel.wait_readable(listener)
            elif error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                await trio.sleep(EXHAUSTED_SECONDS)
            continue
        start(trio.socket.from_stdlib_socket(sock))
