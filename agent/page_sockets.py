"""Opens the sockets of the pages, and tells which of systemd's sockets nobody uses."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import structlog

from agent.accept.sockets import address_of, bind_address, removed_at_the_end, take_unix
from agent.config import Admin, Config
from agent.source_checks import ADMIN_SOCKET
from agent.systemd import NOTHING, UNIX_STREAM, Bound, Passed

log = structlog.get_logger("agent")

UNIX, TCP = "unix stream", "tcp"
ADMIN_MODE = 0o660


class Page(NamedTuple):
    """A socket of the pages, where it is, and whether what is asked there is private."""

    sock: socket.socket
    place: Bound
    private: bool


def admin_places(admin: Admin) -> list[Bound]:
    """Where the pages are, but for sockets of systemd's."""
    places = [Bound(UNIX, admin.socket)] if admin.socket else []
    return [*places, Bound(TCP, admin.listen)] if admin.listen else places


@contextmanager
def page_socket(place: Bound, passed: Passed = NOTHING) -> Iterator[socket.socket]:
    """A socket of the pages' own for a block, the one that was there before where the agent is replaced."""
    sock = passed.take_own(place)
    if place.kind == TCP:
        with sock or bind_address(place.place, socket.SOCK_STREAM) as own:
            yield own
    else:
        if sock is not None and not os.path.lexists(place.place):  # nobody would find it any more
            sock.close()
            sock = None
        sock = take_unix(sock, place.place, socket.SOCK_STREAM, ADMIN_MODE)
        with removed_at_the_end(sock, place.place) as own:
            yield own


@contextmanager
def page_sockets(admin: Admin, passed: Passed) -> Iterator[list[Page]]:
    """The sockets of the pages for a block.

    The admin socket is systemd's where it passed one of that name: the commands look for it at `admin.socket`
    either way.
    """
    pages: list[Page] = []
    places = admin_places(admin)
    with ExitStack() as stack:
        if admin.socket and ADMIN_SOCKET in passed.left:
            sockets = passed.take(ADMIN_SOCKET, (UNIX_STREAM,), "the admin socket")
            named = Bound("systemd", ADMIN_SOCKET)
            pages += [Page(stack.enter_context(sock), named, private=True) for sock in sockets]
            if not any(_same_place(address_of(sock), admin.socket) for sock in sockets):
                log.warning(
                    "the admin socket that systemd passed is not where the commands look for it",
                    passed=", ".join(map(address_of, sockets)),
                    configured=admin.socket,
                    hint="set admin.socket to its ListenStream=",
                )
            places = [place for place in places if place.kind != UNIX]
        for place in places:
            sock = stack.enter_context(page_socket(place, passed))
            pages.append(Page(sock, place, private=place.kind == UNIX))
        yield pages


def tell_unused(config: Config, passed: Passed) -> None:
    """One line where systemd holds sockets for nobody; what is wrong with a name shows here."""
    used = {ADMIN_SOCKET} if config.admin.socket else set()
    used |= {source.socket for source in config.sources}
    if unused := [name for name in passed.left if name not in used]:
        log.warning(
            "nobody uses some of the sockets that systemd passed; who sends to them waits",
            sockets=", ".join(unused),
            hint='give a source socket = "NAME", or take them out of the .socket unit',
        )


def _same_place(path: str, other: str) -> bool:
    """Whether two paths are one, as /run and /var/run are."""
    return os.path.realpath(path) == os.path.realpath(other)
