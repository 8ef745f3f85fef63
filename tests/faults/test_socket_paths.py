"""What others put in the place of a socket: it is told, and neither followed, removed nor changed."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import configure, run

from agent.accept.sockets import SocketError, bind_unix, dress, dressed

STREAM = socket.SOCK_STREAM
NO_SOCKET = "there is something here that is not a socket"

as_root = pytest.mark.skipif(os.getuid() != 0, reason="acts as other users, which takes root")


def _listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


def _link(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def _dangling(place: Path, victim: Path) -> None:
    place.symlink_to(f"{victim}.gone")


def _to_a_socket(place: Path, victim: Path) -> None:
    _listening(victim.with_suffix(".sock")).close()
    place.symlink_to(victim.with_suffix(".sock"))


def _file(place: Path, victim: Path) -> None:
    place.write_text("precious")


def _folder(place: Path, victim: Path) -> None:
    place.mkdir()


def _fifo(place: Path, victim: Path) -> None:
    os.mkfifo(place)


def _state(*paths: Path) -> list[tuple[object, ...]]:
    found = [(path, os.lstat(path)) for folder in paths for path in sorted(folder.rglob("*"))]
    return [(path, one.st_ino, one.st_mode, one.st_uid, one.st_gid, one.st_size) for path, one in found]


@pytest.mark.parametrize("put", [_link, _dangling, _to_a_socket, _file, _folder, _fifo])
def test_what_is_no_socket_is_left_as_it_is(tmp_path: Path, put: Callable[[Path, Path], None]) -> None:
    """The start is refused with the place and what to do; it and what a link leads to are as before."""
    sockets, others = tmp_path / "sockets", tmp_path / "others"
    sockets.mkdir()
    others.mkdir()
    place, victim = sockets / "events.sock", others / "precious"
    victim.write_text("precious")
    put(place, victim)
    before = _state(sockets, others)
    with pytest.raises(SocketError, match=NO_SOCKET):
        bind_unix(str(place), STREAM, 0o666, "root")
    for change in (dress, lambda *its: dressed(*its).__enter__()):
        with pytest.raises(SocketError):
            change(str(place), 0o666, "root")
    assert _state(sockets, others) == before


@pytest.mark.parametrize("put", [_link, _to_a_socket])
def test_an_agent_says_so(folder: Path, put: Callable[[Path, Path], None]) -> None:
    """A whole agent too: the place and what to do, and nothing is changed."""
    put(folder / "events.sock", folder / "precious")
    done = run("run", "--config", str(configure(folder, "http://127.0.0.1:9")))
    assert done.returncode == 1
    assert f"{folder}/events.sock: {NO_SOCKET}" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "events.sock").is_symlink()


@as_root
@pytest.mark.parametrize("mode", [0o600, 0o777], ids=["not for all", "for all"])
def test_another_users_socket(folder: Path, mode: int) -> None:
    """In a folder that all may write to, what another user left is neither removed nor taken for ours."""
    folder.chmod(0o1777)
    place = folder / "events.sock"
    _listening(place).close()
    place.chmod(mode)
    before = _state(folder)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            bind_unix(str(place), STREAM, 0o660)
        except SocketError as error:
            os._exit(42 if str(error) == f"{place}: no permission" else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert _state(folder) == before


def test_a_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    """The kernel has room for 107 bytes (unix(7))."""
    with pytest.raises(SocketError, match="too long"):
        bind_unix(str(tmp_path / ("x" * 108)), STREAM, 0o660)
