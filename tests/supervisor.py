"""Starts what systemd would, exactly as it does: with sockets, credentials and a listener; for tests."""

import socket
import struct
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import trio
from processes import Running, running, started

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
own = str(os.getpid())
told = {"LISTEN_FDS": str(len(aside)), "LISTEN_PID": own, "LISTEN_FDNAMES": names} if aside else {}
if "WATCHDOG_USEC" in os.environ:
    told["WATCHDOG_PID"] = own
os.execvpe(command[0], command, {**os.environ, **told})
"""


class Told:
    """What the main process of a unit says to systemd (NOTIFY_SOCKET), a dictionary for each datagram."""

    def __init__(self, place: str) -> None:
        """`place` as the variable has it: a path, or @ and a name."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind(f"\0{place[1:]}" if place.startswith("@") else place)
        self.sock = sock
        self.pid = 0

    def waiting(self) -> list[dict[str, str]]:
        """All that was said and not yet listened to."""
        said = []
        self.sock.setblocking(False)
        while True:
            try:
                said.append(self._read())
            except BlockingIOError:
                return said

    async def until(self, name: str, part: str = "") -> dict[str, str]:
        """Listen until `name` is said, with a value that has this part."""
        with trio.fail_after(30):
            while True:
                await trio.lowlevel.wait_readable(self.sock)
                said = self._read()
                if name in said and part in said[name]:
                    return said

    def _read(self) -> dict[str, str]:
        data, ancillary, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(12))
        ((level, kind, who),) = ancillary
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        assert struct.unpack("3i", who)[0] == self.pid, "NotifyAccess=main lets nobody else through"
        return dict(line.split("=", 1) for line in data.decode().split("\n"))


class Supervisor:
    """A service and its sockets; they stay open whatever becomes of those that they are passed to."""

    def __init__(self) -> None:
        self._named: list[tuple[str, socket.socket]] = []
        self._env: dict[str, str] = {}
        self._told: Told | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for _, sock in self._named:
            sock.close()
        if self._told is not None:
            self._told.sock.close()

    def notified(self, place: str, watchdog: float = 0.0) -> Told:
        """Type=notify, and WatchdogSec= in seconds."""
        self._told = Told(place)
        self._env["NOTIFY_SOCKET"] = place
        if watchdog:
            self._env["WATCHDOG_USEC"] = str(int(watchdog * 1_000_000))
        return self._told

    def credentials(self, folder: Path, texts: Mapping[str, str]) -> None:
        """LoadCredential=: files that only the service can read, in a folder that nobody can write."""
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o400)
        folder.chmod(0o500)
        self._env["CREDENTIALS_DIRECTORY"] = str(folder)

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
    async def running(self, config: Path, **env: str) -> AsyncIterator[Running]:
        """A ready agent for a block, started by this unit; `env` is its Environment=."""
        env = {**self._env, **env}
        async with running(config, self.before(), self.descriptors, env) as agent:
            self._heard(agent)
            yield agent

    @asynccontextmanager
    async def started(self, config: Path, **env: str) -> AsyncIterator[Running]:
        """The same, without waiting until it is ready."""
        env = {**self._env, **env}
        async with started(config, self.before(), self.descriptors, env) as agent:
            self._heard(agent)
            yield agent

    def _heard(self, agent: Running) -> None:
        if self._told is not None:
            self._told.pid = agent.process.pid
