"""Who sends: the kernel's word on a Unix socket's peer, and on request its systemd unit or container."""

import re
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio
from msgspec import Raw

from agent.events import CONTAINER, GID, PID, UID, UNIT, Origin

# unix(7): struct ucred.
_UCRED = struct.Struct("=iII")
# For each datagram of a drain its sender's word.
CREDENTIALS_BYTES = socket.CMSG_SPACE(_UCRED.size)

# What the kernel says of a datagram from before it was asked: no process, and the user and group that stand
# for those which have no number (user_namespaces(7), overflowuid).
UNSAID = (0, 65534, 65534)

# How many senders are remembered: more than a host has processes that log at the same time.
REMEMBERED = 4096
# A process id is used again after a while, at the earliest when 32,768 others have been (proc(5), pid_max).
KNOWN_SECONDS = 10.0
# /proc answers in microseconds; where it does not, an event goes on without its unit.
LOOK_UP_SECONDS = 0.1

_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")

_encode = msgspec.json.Encoder().encode


class Sender(NamedTuple):
    """The process at the other end as the kernel knows it; its id is 0 where another namespace has it."""

    pid: int
    uid: int
    gid: int


def peer_of(getsockopt: Callable[[int, int, int], bytes]) -> Sender:
    """Who connected a Unix stream socket, asked by its `getsockopt`."""
    return Sender(*_UCRED.unpack(getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def ask_credentials(sock: socket.socket) -> None:
    """Have the kernel say of each datagram from now on who sent it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


def sender_of(ancillary: list[tuple[int, int, bytes]]) -> Sender | None:
    """Who sent a datagram; None where it was sent before the kernel was asked to say so."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(data) == _UCRED.size:
            sender = Sender(*_UCRED.unpack(data))
            return None if sender == UNSAID else sender
    return None


class Place(NamedTuple):
    """In which unit and container a process runs; None where in none, or unknown."""

    unit: str | None
    container: str | None


def place_in(cgroup: str) -> Place:
    """What the text of `/proc/PID/cgroup` says (cgroups(7)), by the names that systemd and engines give."""
    path = max((line.split(":", 2)[-1] for line in cgroup.splitlines()), key=len, default="")
    units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
    containers = _CONTAINER_ID.findall(path)
    return Place(units[-1] if units else None, containers[-1] if containers else None)


def read_place(pid: int) -> Place:
    """Where a process runs, if its /proc can be seen: `ProtectProc=default` in the agent's unit."""
    try:
        return place_in(Path(f"/proc/{pid}/cgroup").read_text())
    except (OSError, UnicodeDecodeError):  # it has ended, or is hidden from us
        return Place(None, None)


class Senders:
    """What a source tells of its senders; `units` where it looks up units and containers too."""

    def __init__(self, *, told: bool, units: bool) -> None:
        self._told = told
        self._units = units
        self._blind_until = 0.0
        self._known: OrderedDict[Sender | None, tuple[float, Origin]] = OrderedDict()

    async def origin(self, sender: Sender | None) -> Origin:
        """The origin of this sender's reads."""
        now = trio.current_time()
        since, origin = self._known.get(sender, (-KNOWN_SECONDS, None))
        if origin is None or (self._units and now - since >= KNOWN_SECONDS):
            origin = await self._look_up(sender)
            self._known[sender] = now, origin
            self._known.move_to_end(sender)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return origin

    async def _look_up(self, sender: Sender | None) -> Origin:
        pid, uid, gid = sender or (None, None, None)
        if not self._told:
            return Origin(uid=uid)
        pid = pid or None
        words: dict[str, str | int | None] = {UID: uid, GID: gid, PID: pid}
        if self._units:
            place = Place(None, None)
            if pid is not None and trio.current_time() >= self._blind_until:
                with trio.move_on_after(LOOK_UP_SECONDS) as patience:
                    place = await trio.to_thread.run_sync(read_place, pid, abandon_on_cancel=True)
                if patience.cancelled_caught:  # a /proc that hangs is not asked for every sender
                    self._blind_until = trio.current_time() + KNOWN_SECONDS
            words |= {UNIT: place.unit, CONTAINER: place.container}
        # What is not known is null, so that no payload can say it instead.
        return Origin(forced={name: Raw(_encode(word)) for name, word in words.items()}, uid=uid)
