"""Accepts a listener's clients while there are places for them; those beyond wait in the kernel.

Or a place is made for them, if somebody may lose his.
"""

import errno
import socket
from collections.abc import Callable

import trio

# Out of descriptors: wait for some to be closed.
EXHAUSTED_SECONDS = 0.1
# While nobody may lose his place, it is tried again so often, where nothing else is said.
ROOM_SECONDS = 0.5


async def accept_all(
    listener: socket.socket,
    places: trio.Semaphore,
    start: Callable[[trio.socket.SocketType], None],
    make_room: Callable[[], None] | None = None,
    again: float = ROOM_SECONDS,
) -> None:
    """Take a place for each client and start it, until cancelled. Whoever serves it gives the place back.

    `make_room` is called where somebody comes and there is no place, and each `again` seconds until there is
    one: it may have one given back.
    """
    while True:
        if make_room is None:
            await places.acquire()
        else:
            await _acquire(listener, places, make_room, again)
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


async def _acquire(
    listener: socket.socket, places: trio.Semaphore, make_room: Callable[[], None], again: float
) -> None:
    while True:
        if not places.value:
            await trio.lowlevel.wait_readable(listener)
            if not places.value:
                make_room()
        with trio.move_on_after(again):
            await places.acquire()
            return
