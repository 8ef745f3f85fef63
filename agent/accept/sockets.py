"""Opens local sockets: bound, sized and given to the right group; and asks the kernel what it dropped."""

import errno
import grp
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from agent import AgentError

# Linux's socket options that Python does not name (asm-generic/socket.h).
SO_RCVBUFFORCE = 33
SO_MEMINFO = 55
SO_COOKIE = 57
_MEMINFO = struct.Struct("=9I")  # linux/sock_diag.h: SK_MEMINFO_VARS; the ninth counts drops
_DROPS = 8
_COOKIE = struct.Struct("=Q")

# Connections that may wait to be accepted; the kernel cuts it at somaxconn.
BACKLOG = 4096


class SocketError(AgentError):
    """A source's socket cannot be opened."""


class FileGone(SocketError):
    """A socket is there, but not the file by which clients find it."""


class SocketFile:
    """A Unix socket and the file by which clients find it; where that is lost, another socket's: see `give`.

    `trouble` says why there is none now; empty where all is well.
    """

    def __init__(self, sock: socket.socket, path: str) -> None:
        self.path = path
        self.trouble = ""
        self._made: tuple[int, int] | None = None
        self.give(sock)

    def give(self, sock: socket.socket) -> None:
        """The file is this socket's, which was bound there a moment ago; the one before is not closed."""
        self._sock = sock
        self._before, self._made = self._made, _inode(self.path)

    def forget_the_last(self) -> None:
        """Where somebody has put the file before this one there again, which is open still, remove it."""
        if self._before is not None and _inode(self.path) == self._before:
            with suppress(OSError):
                os.unlink(self.path)

    @property
    def lost(self) -> str:
        """Why clients do not find it now, as far as is known; where nobody has anything there, nothing."""
        if self.trouble or self.leads_here() or not os.path.lexists(self.path):
            return self.trouble
        return f"{self.path}: something else has the name of this socket's file"

    def leads_here(self) -> bool:
        """Whether it is still the file that the socket was bound to, under its name."""
        # The kernel keeps a bound socket's inode, so that no other file can have its number meanwhile.
        return self._made is not None and _inode(self.path) == self._made

    def close(self) -> None:
        """Close the socket and remove its file, if it is still the same one.

        One that was detached meanwhile is somebody else's, and so is its file.
        """
        if self._sock.fileno() < 0:
            return
        ours = self.leads_here()
        self._sock.close()
        if ours:
            # Somebody else may have removed it, or its folder is no longer ours: nothing to tidy.
            with suppress(OSError):
                os.unlink(self.path)


def _inode(path: str) -> tuple[int, int] | None:
    """What a name leads to, links not followed; None where nothing can be seen."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Opened(NamedTuple):
    """A socket that is ready to be read, and the receive buffer that the kernel granted (datagrams only).

    `file` is its own file's, where it has one that is the agent's to make.
    """

    sock: socket.socket
    granted: int | None
    file: SocketFile | None = None


def bind_unix(path: str, kind: socket.SocketKind, mode: int, group: str = "") -> socket.socket:
    """A bound Unix socket with that file mode and group; listening if it is a stream.

    The socket file of a dead program is replaced, one of a living program never.
    """
    _clear_the_way(path, kind)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        # The file must never be open to more than it should be, not even for a moment, nor to another group.
        umask = os.umask(0o777 & ~(mode & 0o700 if group else mode))
        try:
            sock.bind(path)
        finally:
            os.umask(umask)
        try:
            if group:
                dress(path, mode, group)
            if kind is socket.SOCK_STREAM:
                sock.listen(BACKLOG)
        except BaseException:
            os.unlink(path)
            raise
    except OSError as error:
        sock.close()
        raise _cannot_bind(path, error) from error
    except AgentError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def take_unix(
    found: socket.socket | None, path: str, kind: socket.SocketKind, mode: int, group: str = ""
) -> socket.socket:
    """The socket that is bound there already, with that file mode and group; else a new one.

    One whose file was removed is taken too: what waits in it is read, and the file is made anew.
    """
    if found is None:
        return bind_unix(path, kind, mode, group)
    try:
        with suppress(FileGone):
            dress(path, mode, group)
    except SocketError:
        found.close()
        raise
    return found


def dress(path: str, mode: int, group: str) -> None:
    """Give a socket file its mode and group, and never what a link leads to. Raises `SocketError`."""
    try:
        with _file_of(path) as name:
            if group:
                os.chown(name, -1, _group_id(path, group))
            os.chmod(name, mode)
    except FileNotFoundError as error:
        raise FileGone(
            f"{path}: somebody removed this socket's file, and nobody can connect now",
            "the agent makes it anew within a second, or logs why it cannot: reload again then",
        ) from error
    except OSError as error:
        raise _cannot_bind(path, error) from error


@contextmanager
def dressed(path: str, mode: int, group: str) -> Iterator[None]:
    """`dress` a socket file, and undo it where the block fails."""
    before = os.lstat(path) if os.path.lexists(path) else None
    try:
        dress(path, mode, group)
        yield
    except BaseException:
        if before is not None:
            with suppress(OSError, SocketError), _file_of(path) as name:
                os.chown(name, -1, before.st_gid)
                os.chmod(name, stat.S_IMODE(before.st_mode))
        raise


@contextmanager
def _file_of(path: str) -> Iterator[str]:
    """A name of the socket file itself, which nobody who may write to its folder can lead elsewhere."""
    # By its descriptor, as proc(5) has it; chmod(2) knows no way not to follow a link.
    number = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            raise _no_socket(path)
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def _no_socket(path: str) -> SocketError:
    return SocketError(f"{path}: there is something here that is not a socket", "move it away")


def _clear_the_way(path: str, kind: socket.SocketKind) -> None:
    """Remove a socket file that nobody serves any more; refuse to remove anything else."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_bind(path, error) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise _no_socket(path)
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        outcome = probe.connect_ex(path)
    if outcome == errno.EACCES:  # another user's, and not for us
        raise _cannot_bind(path, PermissionError(outcome, os.strerror(outcome)))
    # A full backlog or another socket type means that somebody lives there.
    if outcome not in (errno.ECONNREFUSED, errno.ENOENT):
        reason = "another program listens here" if outcome in _ALIVE else os.strerror(outcome)
        raise SocketError(
            f"{path}: {reason}",
            "stop it (another capture-agent?), or give this source another path",
        )
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_bind(path, error) from error


_ALIVE = (0, errno.EAGAIN, errno.EPROTOTYPE, errno.EINPROGRESS)


def _group_id(path: str, group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise SocketError(
            f"{path}: there is no group {group!r} on this host",
            f"make it (groupadd --system {group}), or take `group` out of the source",
        ) from None


def bind_address(listen: str, kind: socket.SocketKind) -> socket.socket:
    """A bound UDP or TCP socket for `HOST:PORT` or `[IPv6]:PORT`; listening if it is a stream."""
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        family, _, protocol, _, address = socket.getaddrinfo(
            host, int(port), type=kind, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_bind(listen, error) from error
    try:
        if kind is socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if kind is socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _cannot_bind(listen, error) from error
    sock.setblocking(False)
    return sock


def _cannot_bind(where: str, error: OSError) -> SocketError:
    if error.errno == errno.EADDRINUSE:
        return SocketError(
            f"{where}: this address is in use",
            "another program (or another capture-agent) has it: stop it, or choose another address",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return SocketError(
            f"{where}: no permission", "run as a user that may write there, or choose another place"
        )
    if isinstance(error, FileNotFoundError):
        folder = Path(where).parent
        return SocketError(f"{where}: the folder {folder} does not exist", f"make it: mkdir -p {folder}")
    return SocketError(f"{where}: {error.strerror or error}", "check the address in the configuration")


@contextmanager
def removed_at_the_end(sock: socket.socket, path: str) -> Iterator[socket.socket]:
    """A Unix socket for a block; see `SocketFile.close`."""
    with closing(SocketFile(sock, path)):
        yield sock


def ask_buffer(sock: socket.socket, size: int) -> int:
    """Ask for a receive buffer of `size` bytes; what the kernel granted."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:  # needs CAP_NET_ADMIN; without it rmem_max is the bound
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    return granted_buffer(sock)


def granted_buffer(sock: socket.socket) -> int:
    """The size of the socket's receive buffer, as it would be asked for."""
    # The kernel doubles what is asked, for its own bookkeeping, and tells the doubled figure (socket(7)).
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2


def read_drops(sock: socket.socket) -> int | None:
    """How many datagrams the kernel dropped since the socket was made, modulo 2^32; None where unknown."""
    try:
        told = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMINFO.size)
        words: tuple[int, ...] = _MEMINFO.unpack(told)
    except (OSError, struct.error):
        return None
    return words[_DROPS]


def read_cookie(sock: socket.socket) -> int | None:
    """The kernel's number for the socket, given to no other one of this boot; None where unknown."""
    try:
        told = sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, _COOKIE.size)
        number: int = _COOKIE.unpack(told)[0]
    except (OSError, struct.error):
        return None
    return number


def address_of(sock: socket.socket) -> str:
    """Where a bound socket is, as a configuration would say it."""
    name = sock.getsockname()
    if isinstance(name, tuple):
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"{host}:{name[1]}"
    if isinstance(name, bytes):  # an abstract one (unix(7)), which has no file
        return f"@{name[1:].decode(errors='replace')}"
    return str(name)
