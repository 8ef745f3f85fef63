"""An agent whose socket files somebody removes: it needs nobody's help, and loses nothing."""

import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import trio
from processes import Running, configure, running
from sources import line

from agent.sink import Sink, serving

ROUNDS = 10
ASK = b'{"ack":true}\n'
ACCEPTED = b'{"accepted":%d,"rejected":0}\n'
REMOVED = "somebody removed a source's socket file"
LOST = "clients do not find a source's socket file any more"
MENDED = "the source's socket file is there"


async def until(what: Callable[[], bool]) -> None:
    with trio.fail_after(15):
        while not what():
            await trio.sleep(0.02)


async def ready(agent: Running) -> tuple[int, str]:
    """What /readyz says."""
    transport = httpx.AsyncHTTPTransport(uds=str(agent.folder / "admin.sock"))
    async with httpx.AsyncClient(transport=transport) as client:
        answer = await client.get("http://agent/readyz")
    return answer.status_code, answer.text


def there(agent: Running) -> bool:
    return Path(agent.stream).is_socket() and Path(agent.datagram).is_socket()


async def remade(agent: Running) -> None:
    """Remove both files and wait for others."""
    os.unlink(agent.stream)
    os.unlink(agent.datagram)
    await until(lambda: there(agent))


async def send(agent: Running, number: int) -> None:
    """An event by each socket that has the file now, the stream's acknowledged."""
    async with await trio.open_unix_socket(agent.stream) as client:
        await client.send_all(ASK + line(number))
        with trio.fail_after(10):
            assert await client.receive_some() == ACCEPTED % 1
    with datagrams(agent) as sock:
        sock.send(line(number))


def datagrams(agent: Running) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.connect(agent.datagram)
    return sock


def descriptors(agent: Running) -> int:
    return len(os.listdir(f"/proc/{agent.process.pid}/fd"))


async def test_removed_files_are_made_anew(folder: Path) -> None:
    """Events come again, a client from before goes on, each file is told once, and a stop removes the new."""
    sink = Sink()
    async with serving(sink) as url, running(configure(folder, url)) as agent:
        stays = await trio.open_unix_socket(agent.stream)
        await stays.send_all(ASK + line(1))
        assert await stays.receive_some() == ACCEPTED % 1
        with datagrams(agent) as connected:
            await remade(agent)
            await send(agent, 2)
            connected.send(line(3))
        await stays.send_all(line(4))
        assert await stays.receive_some() == ACCEPTED % 2
        status = await agent.until(delivered=5)
        assert status["books"]["balanced"]
        assert (await ready(agent))[0] == 200
        assert agent.log().count(REMOVED) == 2
        agent.send(signal.SIGTERM)
        assert await agent.process.wait() == 0
        assert not os.path.exists(agent.stream)
        assert not os.path.exists(agent.datagram)
    assert len({event.uuid for event in sink.events}) == 5


async def test_many_removals_take_no_descriptors(folder: Path) -> None:
    """Ten times, and all that was sent is delivered."""
    async with serving(Sink()) as url, running(configure(folder, url)) as agent:
        await remade(agent)
        await send(agent, 0)
        await agent.until(delivered=2)
        few = descriptors(agent)
        for number in range(ROUNDS):
            await remade(agent)
            await send(agent, number)
        status = await agent.until(delivered=2 * ROUNDS + 2)
        assert status["books"]["balanced"]
        # An answer to this test, and a connection to the sink, come and go.
        await until(lambda: descriptors(agent) <= few + 2)


async def test_a_folder_that_is_removed_and_made_again(folder: Path) -> None:
    """It is told once for each source, /readyz says which one, and all is mended with the folder."""
    async with serving(Sink()) as url:
        config = configure(folder, url)
        sockets = folder / "sockets"
        sockets.mkdir()
        config.write_text(config.read_text().replace(f"{folder}/events", f"{sockets}/events"))
        async with running(config) as agent:
            agent.stream, agent.datagram = str(sockets / "events.sock"), str(sockets / "events.dgram")
            shutil.rmtree(sockets)
            await until(lambda: agent.log().count(LOST) == 2)
            code, why = await ready(agent)
            assert code == 503
            assert "cannot be reached" in why
            assert f"the folder {sockets} does not exist" in why
            status = await agent.reloaded()
            assert f"the folder {sockets} does not exist" in status["reload"]["error"]
            sockets.mkdir()
            await until(lambda: there(agent) and agent.log().count(MENDED) == 2)
            await send(agent, 1)
            await agent.until(delivered=2)
            assert (await ready(agent))[0] == 200
            assert agent.log().count(LOST) == 2
            assert REMOVED not in agent.log()


async def test_a_file_in_its_place(folder: Path) -> None:
    """It is left as it is and told once; when it is moved away the agent goes on by itself."""
    async with serving(Sink()) as url, running(configure(folder, url)) as agent:
        place = Path(agent.stream)
        place.unlink()
        place.write_text("precious")
        await until(lambda: LOST in agent.log())
        await trio.sleep(2.5)  # two more looks
        assert agent.log().count(LOST) == 1
        code, why = await ready(agent)
        assert code == 503
        assert f"{place}: there is something here that is not a socket" in why
        assert place.read_text() == "precious"
        place.rename(folder / "moved")
        await until(lambda: MENDED in agent.log())
        await send(agent, 1)
        await agent.until(delivered=2)
        assert (await ready(agent))[0] == 200


async def test_a_reload_beside_another_programs_socket(folder: Path) -> None:
    """It is refused, and the other program's file keeps its mode."""
    async with serving(Sink()) as url, running(configure(folder, url)) as agent:
        with socket.socket(socket.AF_UNIX) as other:
            os.unlink(agent.stream)
            other.bind(agent.stream)
            other.listen()
            os.chmod(agent.stream, 0o600)
            before = os.stat(agent.stream)
            await until(lambda: LOST in agent.log())
            status = await agent.reloaded()
            assert "another program listens here" in status["reload"]["error"]
            agent.send(signal.SIGTERM)
            assert await agent.process.wait() == 0
            assert os.stat(agent.stream).st_mode == before.st_mode
            assert os.stat(agent.stream).st_ino == before.st_ino


async def test_a_reload_after_a_removal(folder: Path) -> None:
    """The next agent has the newest sockets, and who was connected to the stream goes on."""
    async with serving(Sink()) as url, running(configure(folder, url)) as agent:
        stays = await trio.open_unix_socket(agent.stream)
        await stays.send_all(ASK + line(1))
        assert await stays.receive_some() == ACCEPTED % 1
        with datagrams(agent) as connected:
            await remade(agent)
            connected.send(line(2))
            status = await agent.reloaded()
        assert not status["reload"]["refused"]
        await send(agent, 3)
        await stays.send_all(line(4))
        assert await stays.receive_some() == ACCEPTED % 2
        os.unlink(agent.stream)
        os.unlink(agent.datagram)
        with trio.fail_after(10):
            while (await agent.reloaded())["reload"]["refused"]:  # it came within the second
                await trio.sleep(0.2)
        await until(lambda: there(agent))
        await send(agent, 5)
        await stays.send_all(line(6))
        assert await stays.receive_some() == ACCEPTED % 3
        status = await agent.until(delivered=8)
        assert status["books"]["balanced"]
        agent.send(signal.SIGTERM)
        assert await agent.process.wait() == 0
        assert not os.path.exists(agent.stream)
        assert not os.path.exists(agent.datagram)


async def test_a_file_that_is_moved_away_and_back(folder: Path) -> None:
    """It is that of the socket before: no other program's, and not in the way."""
    async with serving(Sink()) as url, running(configure(folder, url)) as agent:
        aside = f"{agent.stream}.aside"
        os.rename(agent.stream, aside)
        await until(lambda: os.path.exists(agent.stream))
        os.rename(aside, agent.stream)
        old = os.stat(agent.stream).st_ino
        await until(lambda: os.path.exists(agent.stream) and os.stat(agent.stream).st_ino != old)
        await send(agent, 1)
        await agent.until(delivered=1)
        assert (await ready(agent))[0] == 200
        assert LOST not in agent.log()
