"""Sources whose socket file somebody removes: it is made anew, and who was connected goes on."""

import os
import socket
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import trio
from sources import datagram, line, stream, taking

from agent import config
from agent.accept.handed import place_of
from agent.accept.source import bound
from agent.systemd import NOT_PASSED, Passed

ASK = b'{"ack":true}\n'
ROUNDS = 4


@pytest.fixture(params=[stream, datagram])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> config.Source:
    """A source of each kind that has a file."""
    made: config.Source = request.param(tmp_path, mode=0o640)
    return made


def path_of(settings: config.Source) -> Path:
    assert isinstance(settings, config.Unix)
    return Path(settings.path)


def connected(settings: config.Source) -> socket.socket:
    """A client of the socket that has the file."""
    kind = socket.SOCK_STREAM if isinstance(settings, config.UnixStream) else socket.SOCK_DGRAM
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.connect(str(path_of(settings)))
    return sock


async def until(what: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not what():
            await trio.sleep(0.02)


async def remade(settings: config.Source) -> None:
    """Remove the file and wait until there is another one."""
    path = path_of(settings)
    path.unlink()
    await until(path.is_socket)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_the_file_is_made_anew_and_who_was_connected_goes_on(settings: config.Source) -> None:
    """With the same mode; both sockets are read, and the file is gone at the end."""
    async with taking(settings) as taken:
        with connected(settings) as before:
            await remade(settings)
            assert stat.S_IMODE(path_of(settings).stat().st_mode) == 0o640
            with connected(settings) as after:
                for number, sock in enumerate((before, after, before, after)):
                    sock.send(line(number))
            await taken.settled(4)
        assert taken.total("accepted") == 4
        assert taken.source.address == str(path_of(settings))
        assert taken.source.unreachable == ""
    assert not path_of(settings).exists()


async def test_acknowledgements_go_on(tmp_path: Path) -> None:
    """A client in the middle of a line and of its totals notices nothing."""
    settings = stream(tmp_path, ack=True)
    async with taking(settings), await trio.open_unix_socket(settings.path) as client:
        await client.send_all(line(1) + line(2)[:10])
        assert msgspec.json.decode(await client.receive_some()) == {"accepted": 1, "rejected": 0}
        await remade(settings)
        await client.send_all(line(2)[10:])
        assert msgspec.json.decode(await client.receive_some()) == {"accepted": 2, "rejected": 0}


async def test_descriptors_do_not_grow(settings: config.Source) -> None:
    """Only the last socket before stays open; what its clients sent until then is read."""
    async with taking(settings) as taken:
        await remade(settings)
        few = descriptors()
        with ExitStack() as stack:
            for number in range(ROUNDS):
                sock = stack.enter_context(connected(settings))
                await remade(settings)
                sock.send(line(number))
        await taken.settled(ROUNDS)
        assert taken.total("accepted") == ROUNDS
        await until(lambda: descriptors() == few)


async def test_who_reaches_the_old_socket_by_another_name(settings: config.Source, tmp_path: Path) -> None:
    """As a container does that has the file mounted; at a stop all that was sent there is read."""
    other = tmp_path / "mounted"
    async with taking(settings) as taken:
        os.link(path_of(settings), other)
        await remade(settings)
        by_mount = msgspec.structs.replace(settings, path=str(other))
        with connected(by_mount) as early, connected(by_mount) as late:
            early.send(line(1))
            await taken.settled(1)
            late.send(line(2))
            taken.stop.set()
            await taken.settled(2)
        assert taken.total("accepted") == 2


async def test_a_full_buffer_holds_up_no_new_file(tmp_path: Path) -> None:
    """While there is no room the file is made anew, no socket's datagrams are lost, and a stop ends."""
    settings = datagram(tmp_path)
    noise = os.urandom(50_000).hex()
    async with taking(settings, max_size=1) as taken:
        sent = 0
        with ExitStack() as stack:
            for _ in range(3):
                sock = stack.enter_context(connected(settings))
                sock.setblocking(False)
                for _ in range(200):
                    try:
                        sock.send(line(sent, noise=noise))
                    except BlockingIOError:
                        await trio.sleep(0.002)
                    else:
                        sent += 1
                await remade(settings)
        taken.buffer.close_door()
        taken.stop.set()
        await taken.settled(sent)


async def test_a_dead_socket_in_its_place_is_replaced(settings: config.Source) -> None:
    """What a program that has ended left there is no obstacle."""
    path = path_of(settings)
    async with taking(settings) as taken:
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
        theirs = path.stat().st_ino, path.stat().st_ctime_ns
        await until(lambda: path.is_socket() and (path.stat().st_ino, path.stat().st_ctime_ns) != theirs)
        with connected(settings) as sock:
            sock.send(line(1))
        await taken.settled(1)


async def test_a_living_programs_socket_is_left_alone(settings: config.Source) -> None:
    """It is told who is in the way, until the way is free; at the end theirs would stay."""
    path = path_of(settings)
    async with taking(settings) as taken:
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen(0)
            theirs = path.stat().st_ino
            await until(lambda: "another program listens here" in taken.source.unreachable)
            assert path.stat().st_ino == theirs
        await until(lambda: not taken.source.unreachable)
        with connected(settings) as sock:
            sock.send(line(1))
        await taken.settled(1)
    assert not path.exists()


async def test_a_successor_stays(settings: config.Source) -> None:
    """At the end a file that is not the source's is not removed."""
    path = path_of(settings)
    async with taking(settings):
        await remade(settings)
        path.unlink()
        path.write_text("precious")
    assert path.read_text() == "precious"


async def test_a_socket_that_was_handed_over_without_its_file(settings: config.Source) -> None:
    """A removal in the moment of a reload: what waits in the socket is read, and the file is made anew."""
    with bound(settings) as own, connected(settings) as early:
        early.send(line(1))
        path_of(settings).unlink()
        passed = Passed({}, NOT_PASSED, [(place_of(settings), own.sock.detach())])
        async with taking(settings, passed=passed) as taken:
            await until(path_of(settings).is_socket)
            with connected(settings) as late:
                late.send(line(2))
            await taken.settled(2)
    assert taken.total("accepted") == 2
