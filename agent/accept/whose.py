"""Whose a TCP client is: the user of this host who has its other end, else the address that it comes from.

The kernel tells the owner of every TCP socket of this network namespace (sock_diag(7)). It is asked so that
one who floods holds up nobody but himself, by however many connections; not for who may send what.
"""

import socket
import struct
from typing import Any, Protocol

from agent.accept.whence import Address, plain

# linux/netlink.h, linux/sock_diag.h; Python has no name for them.
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
# struct inet_diag_req_v2: family, protocol, extensions, states; then struct inet_diag_sockid: the ports and
# addresses of either end, interface, and a cookie that matches any.
_REQUEST = struct.Struct("=BBBxI")
_PORTS, _REST, _ANY_STATE, _ANY_COOKIE = struct.Struct("!HH"), struct.Struct("=III"), 0xFFFFFFFF, 0xFFFFFFFF
_ADDRESS_BYTES = 16
# struct inet_diag_msg: what is behind its first 4 bytes and the sockid of 48.
_TOLD, _TOLD_AT = struct.Struct("=IIIII"), _HEADER.size + 4 + 48
_REPLY_BYTES = 1024


class Connected(Protocol):
    """A socket that has another end."""

    def getsockname(self) -> Any: ...
    def getpeername(self) -> Any: ...


def whose(sock: Connected) -> int | str | None:
    """The uid of who has the other end of a TCP connection, or its address; None where nobody knows.

    Of an address of this host itself nobody knows who is not there any more, or in another namespace.
    """
    try:
        (host, port, *_), (peer, peers_port, *_) = sock.getsockname(), sock.getpeername()
        here, there = plain(host), plain(peer)
    except (OSError, ValueError):  # it has gone
        return None
    uid = _ask(_PORTS.pack(peers_port, port), there, here)
    if uid is not None:
        return uid
    return None if there.is_loopback or there == here else str(there)


def _ask(ports: bytes, there: Address, here: Address) -> int | None:
    """The uid of the socket from `there` to `here`; None where there is none, or it may not be asked."""
    family = socket.AF_INET if there.version == 4 else socket.AF_INET6
    ends = b"".join(end.packed.ljust(_ADDRESS_BYTES, b"\0") for end in (there, here))
    rest = _REST.pack(0, _ANY_COOKIE, _ANY_COOKIE)
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _ANY_STATE) + ports + ends + rest
    header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    try:
        with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as kernel:
            kernel.sendto(header + body, (0, 0))
            reply = kernel.recv(_REPLY_BYTES)  # it is there once `sendto` has returned
    except OSError:
        return None
    if len(reply) < _TOLD_AT + _TOLD.size or _HEADER.unpack_from(reply)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    uid, inode = _TOLD.unpack_from(reply, _TOLD_AT)[3:]
    return int(uid) if inode else None  # one that is closed already has no owner any more
