"""What a source leaves to the process that replaces this one: open clients, and what was read and not put.

It travels as JSON (`agent.handover`), so everything here is plain values and descriptors.
"""

from collections.abc import Sequence

import msgspec

from agent.config import Http, Source, Stream, Tcp, Udp, UnixDatagram, UnixStream
from agent.decode.ndjson import Unfinished
from agent.events import Read
from agent.systemd import Bound


class Totals(msgspec.Struct, kw_only=True):
    """One client's acknowledgements: what became of its lines, and what of that it has not been told."""

    lines: int = 0
    accepted: int = 0
    rejected: int = 0
    refusals: bytes = b""
    told: tuple[int, int] | None = None


class HandedClient(msgspec.Struct, kw_only=True):
    """An open connection, between two reads. `unsent` is the rest of an answer that went out in part."""

    descriptor: int
    first: bool
    unfinished: Unfinished
    totals: Totals | None
    unsent: bytes
    reads: Sequence[Read]  # of a client that waits for acknowledgements


class HandedSource(msgspec.Struct, kw_only=True):
    """What one source leaves; `place` tells which one it was."""

    place: Bound
    clients: Sequence[HandedClient] = ()
    reads: Sequence[Read] = ()


def place_of(settings: Source) -> Bound:
    """Where a source takes its events: two sources of one place are the same to their clients."""
    if settings.socket:
        return Bound("systemd", settings.socket)
    match settings:
        case UnixStream(path=path):
            return Bound("unix stream", path)
        case UnixDatagram(path=path):
            return Bound("unix datagram", path)
        case Udp(listen=listen):
            return Bound("udp", listen)
        case Tcp(listen=listen) | Http(listen=listen):
            return Bound("tcp", listen)
    raise AssertionError("unreachable: these are all kinds")


def goes_on(old: Source, new: Source) -> bool:
    """Whether `new` reads on where `old` stopped, client by client; else `old` reads to the end.

    A TLS session cannot be handed on, nor can an HTTP request, nor do lines mean the same in another format.
    """
    if place_of(old) != place_of(new) or type(old) is not type(new) or old.format != new.format:
        return False
    if isinstance(old, Tcp) and isinstance(new, Tcp):
        return not (old.tls_cert or new.tls_cert)
    return isinstance(old, Stream | UnixDatagram | Udp)
