"""Whose a TCP client is, asked of the kernel by real connections."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from agent.accept.whose import whose

ROOT = os.geteuid() == 0
NOBODY = 65534
# Connects as another user, and stays until told to end.
CLIENT = """
import encodings.idna, os, socket, sys
if (uid := int(sys.argv[3])) != os.geteuid():
    os.setuid(uid)
with socket.create_connection((sys.argv[1], int(sys.argv[2]))):
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def accepted(host: str, uid: int, listen: str | None = None) -> Iterator[socket.socket]:
    """The agent's end of a user's connection."""
    family = socket.AF_INET6 if ":" in (listen or host) else socket.AF_INET
    with socket.create_server((listen or host, 0), family=family, dualstack_ipv6=listen == "::") as listener:
        command = [sys.executable, "-Sc", CLIENT, host, str(listener.getsockname()[1]), str(uid)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline()
            with listener.accept()[0] as sock:
                yield sock
            client.communicate()


def own_address() -> str | None:
    """This host's address, if it has one beside loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # for documentation (RFC 5737); nothing is sent
        except OSError:
            return None
        address: str = sock.getsockname()[0]
        return address


@pytest.mark.parametrize(
    "uid",
    [
        os.geteuid(),
        pytest.param(NOBODY, marks=pytest.mark.skipif(not ROOT, reason="only root can be another user")),
    ],
)
@pytest.mark.parametrize(("host", "listen"), [("127.0.0.1", None), ("::1", None), ("127.0.0.1", "::")])
def test_a_client_of_this_host_is_its_users(host: str, listen: str | None, uid: int) -> None:
    """By IPv4, by IPv6, and by IPv4 at a socket for both."""
    with accepted(host, uid, listen) as sock:
        assert whose(sock) == uid


def test_so_it_is_by_any_address_of_the_host() -> None:
    """Not only by loopback."""
    address = own_address()
    if address is None:
        pytest.skip("this host has no address beside loopback")
    with accepted(address, os.geteuid()) as sock:
        assert whose(sock) == os.geteuid()


def test_nobody_knows_whose_a_client_was_that_has_gone() -> None:
    """Its connection is nobody's any more, not root's; with bytes that it has left, and when it was reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        with listener.accept()[0] as sock:
            client.sendall(b"x")
            client.close()
            assert whose(sock) is None
            assert sock.recv(1) == b"x"
            assert sock.recv(1) == b""
            assert whose(sock) is None
        client = socket.create_connection(listener.getsockname())
        with listener.accept()[0] as sock:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            assert whose(sock) is None


class Elsewhere:
    """A connection of which this host's kernel knows nothing, as of another host's client."""

    def __init__(self, host: str) -> None:
        self._host = host

    def getsockname(self) -> tuple[str, int]:
        return "192.0.2.1", 6514

    def getpeername(self) -> tuple[str, int]:
        return self._host, 40000


def test_a_client_from_elsewhere_is_its_hosts() -> None:
    """All connections of a host together are one user's."""
    assert whose(Elsewhere("192.0.2.7")) == "192.0.2.7"
    assert whose(Elsewhere("::ffff:192.0.2.7")) == "192.0.2.7"
    assert whose(Elsewhere("2001:db8::7")) == "2001:db8::7"
    assert whose(Elsewhere("192.0.2.1")) is None
    assert whose(Elsewhere("127.0.0.1")) is None
    assert whose(Elsewhere("fe80::7%lo")) == "fe80::7%lo"
