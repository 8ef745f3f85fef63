"""Opens sockets and passes them to what it starts, exactly as systemd does for a .socket unit; for tests."""

import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

from processes import Running, running

# What systemd does between fork and exec: the sockets become 3 and up, blocking and inherited, and LISTEN_PID
# is the new process's. They are first moved out of each other's way.
BETWEEN_FORK_AND_EXEC = """
import fcntl, os, sys
names, numbers, command = sys.argv[1], sys.argv[2], sys.argv[3:]
aside = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 100) for number in numbers.split()]
os.closerange(3, 100)
for place, number in enumerate(aside, 3):
    os.dup2(number, place)
    os.set_blocking(place, True)
told = {"LISTEN_FDS": str(len(aside)), "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": names}
os.execvpe(command[0], command, {**os.environ, **told})
"""


class Supervisor:
    """The sockets of one .socket unit; they stay open whatever becomes of those that they are passed to."""

    def __init__(self) -> None:
        self._named: list[tuple[str, socket.socket]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _, sock in self._named:
            sock.close()

    def pass_on(self, name: str, sock: socket.socket) -> socket.socket:
        """Pass this one too, as FileDescriptorName=`name`."""
        self._named.append((name, sock))
        return sock

    def stream(self, name: str, place: Path | tuple[str, int]) -> socket.socket:
        """ListenStream=, on a path or on an address."""
        sock = self._bound(name, place, socket.SOCK_STREAM)
        sock.listen(4096)  # Backlog='s default in systemd
        return sock

    def datagram(self, name: str, place: Path | tuple[str, int]) -> socket.socket:
        """ListenDatagram=, on a path or on an address."""
        return self._bound(name, place, socket.SOCK_DGRAM)

    def _bound(self, name: str, place: Path | tuple[str, int], kind: socket.SocketKind) -> socket.socket:
        if isinstance(place, Path):
            sock = socket.socket(socket.AF_UNIX, kind)
            sock.bind(str(place))
        else:
            sock = socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET, kind)
            sock.bind(place)
        return self.pass_on(name, sock)

    @property
    def descriptors(self) -> Sequence[int]:
        """What a child must be given."""
        return [sock.fileno() for _, sock in self._named]

    def before(self, *, pid_of_parent: bool = False) -> list[str]:
        """What runs a command with the sockets passed to it; `pid_of_parent`: through a script that forks."""
        names = ":".join(name for name, _ in self._named)
        numbers = " ".join(map(str, self.descriptors))
        shell = ["sh", "-c", '"$@"; exit $?', "sh"] if pid_of_parent else []
        return [sys.executable, "-I", "-S", "-c", BETWEEN_FORK_AND_EXEC, names, numbers, *shell]

    @asynccontextmanager
    async def running(self, config: Path) -> AsyncIterator[Running]:
        """A ready agent for a block, started by this unit."""
        async with running(config, before=self.before(), descriptors=self.descriptors) as agent:
            yield agent
