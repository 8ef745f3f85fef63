"""A source's sockets where systemd opened them: of the right kind, sized, and otherwise left as they are."""

import socket
from collections.abc import Mapping, Sequence

from agent.accept.sockets import Opened, ask_buffer, granted_buffer
from agent.config import Http, Tcp, Udp, UnixDatagram, UnixStream
from agent.config import Source as Settings
from agent.systemd import TCP, UDP, UNIX_DATAGRAM, UNIX_STREAM, Kind, Passed

WANTED: Mapping[type[Settings], Sequence[Kind]] = {
    UnixStream: (UNIX_STREAM,),
    UnixDatagram: (UNIX_DATAGRAM,),
    Udp: (UDP,),
    Tcp: (TCP,),
    Http: (TCP,),
}


def inherit(settings: Settings, passed: Passed) -> list[Opened]:
    """All sockets of the name that the source says. Raises `ActivationError`."""
    sockets = passed.take(settings.socket, WANTED[type(settings)], f"source {settings.name}")
    if isinstance(settings, UnixDatagram | Udp):
        return [Opened(sock, _enlarged(sock, settings.receive_buffer)) for sock in sockets]
    return [Opened(sock, None) for sock in sockets]


def _enlarged(sock: socket.socket, size: int) -> int:
    """Ask for a receive buffer of `size` bytes, unless it has more; what it has then.

    systemd may give more (ReceiveBuffer=) than the kernel lets us ask for, and asking would take that away:
    so it is first tried on a socket that nobody needs (of any family: the bound is the same for all).
    """
    has = granted_buffer(sock)
    if has >= size:
        return has
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trial:
        if ask_buffer(trial, size) <= has:
            return has
    return ask_buffer(sock, size)
