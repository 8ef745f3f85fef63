"""Opening sockets: whose they become, what is in the way, and what the kernel is asked."""

import grp
import os
import socket
import stat
from pathlib import Path

import pytest

from agent import AgentError
from agent.accept.sockets import (
    address_of,
    ask_buffer,
    bind_address,
    bind_unix,
    read_drops,
    removed_at_the_end,
)

STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
def test_a_socket_file_has_its_mode_whatever_the_umask(tmp_path: Path, kind: socket.SocketKind) -> None:
    """The configured mode is the file's, also under a strict umask, and it is gone at the end."""
    path = tmp_path / "s"
    before = os.umask(0o077)
    try:
        sock = bind_unix(str(path), kind, 0o666)
    finally:
        os.umask(before)
    with removed_at_the_end(sock, str(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert not path.exists()


def test_a_socket_file_has_its_group(tmp_path: Path) -> None:
    """The configured group owns it."""
    groups = [entry for entry in grp.getgrall() if os.getuid() == 0 or entry.gr_gid in os.getgroups()]
    path = tmp_path / "s"
    with bind_unix(str(path), STREAM, 0o660, groups[-1].gr_name):
        assert path.stat().st_gid == groups[-1].gr_gid
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_an_unknown_group_is_told(tmp_path: Path) -> None:
    """A group that this host does not have is an error that says how to make it."""
    with pytest.raises(AgentError, match="no group 'nobody-has-it'") as caught:
        bind_unix(str(tmp_path / "s"), STREAM, 0o660, "nobody-has-it")
    assert "groupadd" in caught.value.hint


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
def test_a_dead_agents_socket_is_replaced(tmp_path: Path, kind: socket.SocketKind) -> None:
    """What a killed agent left behind is no obstacle."""
    path = str(tmp_path / "s")
    bind_unix(path, kind, 0o660).close()
    bind_unix(path, kind, 0o660).close()


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
@pytest.mark.parametrize("living", [STREAM, DATAGRAM])
def test_a_living_agents_socket_is_left_alone(
    tmp_path: Path, living: socket.SocketKind, kind: socket.SocketKind
) -> None:
    """Where somebody listens nothing is taken away, whatever kind of socket it is."""
    path = str(tmp_path / "s")
    with bind_unix(path, living, 0o660):
        with pytest.raises(AgentError, match="another program listens here"):
            bind_unix(path, kind, 0o660)
        assert Path(path).is_socket()


def test_a_living_agent_with_a_full_backlog_is_left_alone(tmp_path: Path) -> None:
    """An agent that is too busy to accept is not a dead one."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            with pytest.raises(AgentError, match="another program listens here"):
                bind_unix(path, STREAM, 0o660)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """Somebody's file at the path is never removed."""
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(AgentError, match="not a socket"):
        bind_unix(str(path), STREAM, 0o660)
    assert path.read_text() == "precious"


def test_a_successors_socket_is_not_removed(tmp_path: Path) -> None:
    """An agent that ends late does not take away what a new one has put in its place."""
    path = str(tmp_path / "s")
    with removed_at_the_end(bind_unix(path, STREAM, 0o660), path):
        Path(path).unlink()
        successor = bind_unix(path, STREAM, 0o660)
    assert Path(path).is_socket()
    successor.close()


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    """The error says which folder to make."""
    with pytest.raises(AgentError, match="does not exist") as caught:
        bind_unix(str(tmp_path / "no" / "s"), STREAM, 0o660)
    assert caught.value.hint == f"make it: mkdir -p {tmp_path / 'no'}"


def test_an_address_in_use_is_told() -> None:
    """Another program's port is an error that names it."""
    with bind_address("127.0.0.1:0", STREAM) as sock:
        with pytest.raises(AgentError, match=r"127\.0\.0\.1:\d+: this address is in use"):
            bind_address(address_of(sock), STREAM)


def test_an_address_that_is_not_this_hosts_is_told() -> None:
    """An address of somebody else's (RFC 5737) cannot be bound, and the error says which."""
    with pytest.raises(AgentError, match=r"192\.0\.2\.1:80"):
        bind_address("192.0.2.1:80", DATAGRAM)


def test_ipv6_addresses_have_brackets() -> None:
    """`[::1]:0` is bound and told the same way."""
    try:
        sock = bind_address("[::1]:0", DATAGRAM)
    except AgentError:
        pytest.skip("no IPv6 on this host")
    with sock:
        assert address_of(sock).startswith("[::1]:")


def test_an_abstract_address_is_told_as_systemd_writes_it() -> None:
    """ListenStream=@NAME makes one without a file."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0capture-agent-{os.getpid()}")
        assert address_of(sock) == f"@capture-agent-{os.getpid()}"


def test_the_kernel_tells_what_it_granted() -> None:
    """Without privileges it is at most what net.core.rmem_max allows; with them what was asked."""
    with bind_address("127.0.0.1:0", DATAGRAM) as sock:
        assert 0 < ask_buffer(sock, 32 * 2**20) <= 32 * 2**20


def test_the_kernels_drops_are_read() -> None:
    """Datagrams for which the buffer had no room are counted, to the last one."""
    with bind_address("127.0.0.1:0", DATAGRAM) as sock, socket.socket(socket.AF_INET, DATAGRAM) as client:
        ask_buffer(sock, 4096)
        assert read_drops(sock) == 0
        for _ in range(200):
            client.sendto(b"x" * 1000, sock.getsockname())
        received = 0
        with pytest.raises(BlockingIOError):
            while sock.recv(2000):
                received += 1
        assert read_drops(sock) == 200 - received > 0
