"""Takes over the sockets that systemd opened for the agent: by name, once each, of the kind that is wanted.

As sd_listen_fds(3) has it: the descriptors begin at 3, LISTEN_FDS says how many there are, LISTEN_FDNAMES
what each is called (FileDescriptorName= of its .socket unit; several may have one name) and LISTEN_PID whose
they are. Socket files, addresses and modes stay systemd's own: nothing here changes them.
"""

import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from agent import AgentError

FIRST = 3  # SD_LISTEN_FDS_START
# What a descriptor is called that nobody has named (sd_listen_fds_with_names).
UNNAMED = "unknown"
# LISTEN_PIDFDID says the same as LISTEN_PID, where processes are told by more than their number.
VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
NOT_STARTED = "start the agent by its .socket unit (systemctl start NAME.socket), or set `path` or `listen`"


class ActivationError(AgentError):
    """What systemd passed is not what the configuration wants."""


class Kind(NamedTuple):
    """What a socket is: for the kernel, for people, and in a .socket unit."""

    unix: bool
    type: socket.SocketKind
    said: str
    unit: str


UNIX_STREAM = Kind(True, socket.SOCK_STREAM, "a Unix stream socket", "ListenStream=/PATH")
UNIX_DATAGRAM = Kind(True, socket.SOCK_DGRAM, "a Unix datagram socket", "ListenDatagram=/PATH")
TCP = Kind(False, socket.SOCK_STREAM, "a TCP socket", "ListenStream=ADDRESS:PORT")
UDP = Kind(False, socket.SOCK_DGRAM, "a UDP socket", "ListenDatagram=ADDRESS:PORT")

# No more than what these kinds are: ListenStream= and ListenDatagram= make others with SocketProtocol=.
_PROTOCOLS = {
    socket.AF_UNIX: (0,),
    socket.AF_INET: (socket.IPPROTO_TCP, socket.IPPROTO_UDP),
    socket.AF_INET6: (socket.IPPROTO_TCP, socket.IPPROTO_UDP),
}


class Bound(NamedTuple):
    """What a socket of the agent's own is: of which kind, and bound to what, as the configuration says."""

    kind: str
    place: str


class Passed:
    """The descriptors that came with the start, by name, until they are taken; `why_none` where none came.

    `own` are sockets that the process which this one replaces had bound itself.
    """

    def __init__(
        self,
        descriptors: Mapping[str, Sequence[int]],
        why_none: str = "",
        own: Sequence[tuple[Bound, int]] = (),
    ) -> None:
        self._all = descriptors
        self._left = dict(descriptors)
        self._why_none = why_none
        self._own = list(own)

    def take_own(self, bound: Bound) -> socket.socket | None:
        """The socket that the process before this one had there; None where it had none."""
        found = next((pair for pair in self._own if pair[0] == bound), None)
        if found is None:
            return None
        self._own.remove(found)
        sock = socket.socket(fileno=found[1])
        sock.setblocking(False)
        return sock

    def close_own(self) -> None:
        """Close what nobody took."""
        for _, descriptor in self._own:
            os.close(descriptor)
        self._own.clear()

    def knows(self, name: str) -> bool:
        """Whether sockets of that name came, taken or not."""
        return name in self._all

    def expect(self, name: str, wanted: Sequence[Kind], who: str) -> None:
        """Raises `ActivationError` where no socket of that name and kind came for `who`, taken or not."""
        if name not in self._all:
            raise self._missing(name, who)
        for descriptor in self._all[name]:
            with socket.socket(fileno=os.dup(descriptor)) as sock:
                _examine(sock, name, wanted, who)

    def rest(self) -> dict[str, Sequence[int]]:
        """The descriptors that nobody took, by name."""
        return dict(self._left)

    @property
    def left(self) -> tuple[str, ...]:
        """The names of those that nobody took."""
        return tuple(self._left)

    def take(self, name: str, wanted: Sequence[Kind], who: str) -> list[socket.socket]:
        """All sockets of that name, for `who`, which closes them. Raises `ActivationError`."""
        if name not in self._left:
            raise self._missing(name, who)
        sockets: list[socket.socket] = []
        try:
            for descriptor in self._left.pop(name):
                sockets.append(_opened(descriptor, name))
                _examine(sockets[-1], name, wanted, who)
        except ActivationError:
            for sock in sockets:
                sock.close()
            raise
        return sockets

    def _missing(self, name: str, who: str) -> ActivationError:
        if not self._all:
            return ActivationError(f"{who} wants systemd's socket {name!r}: {self._why_none}", NOT_STARTED)
        close = get_close_matches(name, self._all, 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        return ActivationError(
            f"{who}: systemd passed no socket {name!r}{meant}; it passed {', '.join(self._all)}",
            f"set FileDescriptorName={name} in the .socket unit, and see that the unit is started",
        )


NOT_PASSED = "it passed none to this process"
NOTHING = Passed({}, NOT_PASSED)


def passed(env: MutableMapping[str, str]) -> Passed:
    """What systemd passed to this process. It is taken out of the environment: it is not for our children."""
    said = {name: env.pop(name, "") for name in VARIABLES}
    if not said["LISTEN_FDS"] or not said["LISTEN_PID"]:
        return NOTHING
    try:
        count, owner = int(said["LISTEN_FDS"]), int(said["LISTEN_PID"])
    except ValueError:
        raise _garbled(said) from None
    if owner != os.getpid():
        return Passed({}, f"it passed some to process {owner}, and this is {os.getpid()}; a script must exec")
    descriptors = range(FIRST, FIRST + count)
    try:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
    except OSError as error:
        raise _garbled(said) from error
    names = said["LISTEN_FDNAMES"].split(":") if said["LISTEN_FDNAMES"] else [UNNAMED] * len(descriptors)
    if len(names) != len(descriptors):
        raise _garbled(said)
    named = tuple(zip(descriptors, names, strict=True))
    return Passed({name: [descriptor for descriptor, its in named if its == name] for name in names})


def _garbled(said: Mapping[str, str]) -> ActivationError:
    told = " ".join(f"{name}={value}" for name, value in said.items() if value)
    return ActivationError(
        f"the sockets that were passed are not as the environment says: {told}",
        "whatever starts the agent must pass them as systemd does: see sd_listen_fds(3)",
    )


def _opened(descriptor: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ActivationError(
            f"what systemd passed as {name!r} is no socket: {error.strerror or error}",
            "ListenStream= and ListenDatagram= in the .socket unit make sockets",
        ) from error
    sock.setblocking(False)
    return sock


def _kind(sock: socket.socket) -> Kind | None:
    """What it is; None where no source could read it."""
    if sock.proto not in _PROTOCOLS.get(sock.family, ()):
        return None
    kinds = (UNIX_STREAM, UNIX_DATAGRAM, TCP, UDP)
    unix = sock.family == socket.AF_UNIX
    return next((kind for kind in kinds if (kind.unix, kind.type) == (unix, sock.type)), None)


def _examine(sock: socket.socket, name: str, wanted: Sequence[Kind], who: str) -> None:
    """Refuse what is not wanted."""
    kind = _kind(sock)
    if kind not in wanted:
        found = kind.said if kind else "of another kind"
        takes = " or ".join(kind.said for kind in wanted)
        units = " or ".join(kind.unit for kind in wanted)
        raise ActivationError(
            f"{who} takes {takes}, and systemd's {name!r} is {found}",
            f"in the .socket unit say {units}, or set another `kind`",
        )
    if sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ActivationError(
            f"{who}: systemd's {name!r} does not listen; it is one client's connection",
            "set Accept=no in the .socket unit: the agent serves all clients itself",
        )
