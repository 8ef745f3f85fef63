"""SIGHUP: the agent is replaced by one with the new configuration, and nobody who sends notices."""

import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import sqlite3
import termios
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from processes import Running, configure, run, running, started
from sources import line
from supervisor import Supervisor

import agent as package
from agent.sink import Reply, Sink, serving

ASK = b'{"ack":true}\n'
# A part of a line at a time, so that reloads meet lines in the middle.
PIECE = 29


def changed(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


class Flood:
    """Clients that send all the time, each its own number of events, until told to end."""

    def __init__(self, per_second: int) -> None:
        self.sent = 0
        self.stopped = False
        self._pause = 1 / per_second

    async def stream(self, connected: trio.SocketStream) -> None:
        """Lines, in pieces."""
        while not self.stopped:
            some = line(self.sent)
            for at in range(0, len(some), PIECE):
                await connected.send_all(some[at : at + PIECE])
            self.sent += 1
            await trio.sleep(self._pause)

    async def datagrams(self, sock: trio.socket.SocketType) -> None:
        """Datagrams."""
        while not self.stopped:
            await sock.send(line(self.sent))
            self.sent += 1
            await trio.sleep(self._pause)


async def read_to_its_end(connected: trio.SocketStream) -> None:
    """Wait until all that was sent was read, and the end of it too."""
    with trio.fail_after(30):
        while int.from_bytes(fcntl.ioctl(connected.socket.fileno(), termios.TIOCOUTQ, bytes(4)), "little"):
            await trio.sleep(0.02)
    await trio.sleep(0.3)


async def listen(connected: trio.SocketStream, told: list[bytes]) -> None:
    """What the agent says until it ends the connection."""
    while some := await connected.receive_some():
        told.append(bytes(some))


@pytest.mark.parametrize("activated", [False, True])
async def test_reloads_under_load_lose_nothing(tmp_path: Path, *, activated: bool) -> None:
    """Open connections, lines in the middle, totals and datagrams go on in the next agent, same process."""
    sink = Sink()
    with ExitStack() as stack, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        unit = stack.enter_context(Supervisor())
        async with serving(sink) as url:
            config = configure(tmp_path, url)
            text = config.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}")
            text += f'[[source]]\nkind = "tcp"\nlisten = "127.0.0.1:{port}"\n'
            if activated:
                unit.stream("s", tmp_path / "events.sock")
                unit.datagram("d", tmp_path / "events.dgram")
                unit.stream("admin", tmp_path / "admin.sock")
                text = text.replace(f'path = "{tmp_path}/events.sock"', 'socket = "s"')
                text = text.replace(f'path = "{tmp_path}/events.dgram"', 'socket = "d"')
            config.write_text(text)
            process = unit.running(config) if activated else running(config)
            async with process as agent:
                flood, told = [Flood(300) for _ in range(4)], list[bytes]()
                kinds = (socket.AF_UNIX, agent.datagram), (socket.AF_INET, ("127.0.0.1", port))
                acked = await trio.open_unix_socket(agent.stream)
                await acked.send_all(ASK)
                plain = await trio.open_tcp_stream("127.0.0.1", port)
                async with trio.open_nursery() as listening:
                    listening.start_soon(listen, acked, told)
                    async with trio.open_nursery() as sending:
                        sending.start_soon(flood[0].stream, acked)
                        sending.start_soon(flood[1].stream, plain)
                        for one, (family, address) in zip(flood[2:], kinds, strict=True):
                            sock = trio.socket.socket(family, socket.SOCK_DGRAM)
                            await sock.connect(address)
                            sending.start_soon(one.datagrams, sock)
                        for _ in range(3):
                            status = await agent.reloaded()
                        await trio.sleep(0.3)
                        for one in flood:
                            one.stopped = True
                    with trio.fail_after(30):
                        while json.loads(b"".join(told).splitlines()[-1])["accepted"] < flood[0].sent:
                            await trio.sleep(0.02)
                    await acked.send_eof()
                total = sum(one.sent for one in flood)
                assert status["pid"] == agent.process.pid
                status = await agent.until(delivered=total)
                assert status["books"]["balanced"]
                assert status["books"]["rejected"] == 0
                assert [source["accepted"] for source in status["sources"]] == [
                    one.sent for one in (flood[0], flood[2], flood[3], flood[1])
                ]
                totals = [json.loads(one) for one in b"".join(told).splitlines()]
                assert all("error" not in one for one in totals)
                assert [one["accepted"] for one in totals] == sorted(one["accepted"] for one in totals)
                agent.send(signal.SIGTERM)
                assert await agent.process.wait() == 0
    assert len({event.uuid for event in sink.events}) == total


async def test_a_bad_configuration_changes_nothing(tmp_path: Path) -> None:
    """It is told in the log, in the status and to systemd; events are taken and delivered as before."""
    sink = Sink()
    async with serving(sink) as url:
        config = configure(tmp_path, url)
        with Supervisor() as unit:
            said = unit.notified(str(tmp_path / "notify"))
            async with unit.running(config) as agent:
                await said.until("READY")
                changed(config, 'linger = "50 ms"', 'linger = "soon"\nlinge = 1')
                status = await agent.reloaded()
                assert "delivery.linger" in status["reload"]["error"]
                assert "delivery.linge" in status["reload"]["error"]
                assert "MONOTONIC_USEC" in await said.until("RELOADING")
                told = await said.until("STATUS", "reload refused")
                assert told["READY"] == "1"
                assert "delivery.linger" in agent.log()
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(agent.stream)
                    client.sendall(line())
                await agent.until(delivered=1)
                changed(config, 'linger = "soon"\nlinge = 1', 'linger = "10 ms"')
                assert "was refused: " in run("status", "--config", str(config)).stdout
                status = await agent.reloaded()
                assert status["reload"]["error"] is None
                await said.until("RELOADING")
                await said.until("READY")


async def test_a_key_is_mended_while_the_buffer_is_full(tmp_path: Path) -> None:
    """What was read and found no room is handed on too: it is delivered, and the client is told so."""
    refusing, sink = Sink(script=lambda _request: Reply(401, b"wrong key")), Sink()
    async with serving(refusing) as wrong, serving(sink) as right:
        config = configure(tmp_path, wrong, f'path = "{tmp_path}/buffer.db"\nmax_size = "16 MiB"')
        async with running(config) as agent:
            count, told = 30, list[bytes]()
            noise = os.urandom(400_000).hex()
            client = await trio.open_unix_socket(agent.stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen, client, told)

                async def send() -> None:
                    await client.send_all(ASK)
                    for number in range(count):
                        await client.send_all(line(properties={"n": number, "noise": noise}))
                    await client.send_eof()

                nursery.start_soon(send)
                with trio.fail_after(30):
                    while not (await agent.status())["buffer"]["waiting"]:
                        await trio.sleep(0.02)
                changed(config, wrong, right)
                await agent.reloaded()
            status = await agent.until(delivered=count)
            assert status["books"]["balanced"]
            assert status["books"]["shed"] == {}
            assert "the buffer is full; senders wait" in agent.log()
            assert json.loads(b"".join(told).splitlines()[-1]) == {"accepted": count, "rejected": 0}
    assert sorted(event.properties["n"] for event in sink.events) == list(range(count))


async def test_who_has_sent_all_is_answered_after_a_reload(tmp_path: Path) -> None:
    """A client that has ended its side, and whose events found no room yet, goes on in the next agent."""
    refusing, sink = Sink(script=lambda _request: Reply(401, b"wrong key")), Sink()
    noise = os.urandom(400_000).hex()
    async with serving(refusing) as wrong, serving(sink) as right:
        config = configure(tmp_path, wrong, f'path = "{tmp_path}/buffer.db"\nmax_size = "16 MiB"')
        more = f'[[source]]\nkind = "unix_stream"\nname = "two"\npath = "{tmp_path}/two"\n'
        config.write_text(config.read_text() + more)
        async with running(config) as agent:
            count, told = 30, list[bytes]()
            filling = await trio.open_unix_socket(agent.stream)
            client = await trio.open_unix_socket(str(tmp_path / "two"))

            async def send(number: int, connected: trio.SocketStream) -> None:
                for _ in range(number):
                    await connected.send_all(line(properties={"noise": noise}))
                await connected.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, count, filling)
                with trio.fail_after(30):
                    while not (await agent.status())["buffer"]["waiting"]:
                        await trio.sleep(0.02)
                nursery.start_soon(listen, client, told)
                await client.send_all(ASK)
                await send(2, client)
                await read_to_its_end(client)
                changed(config, wrong, right)
                await agent.reloaded()
            status = await agent.until(delivered=count + 2)
            assert status["books"]["shed"] == {}
            assert json.loads(b"".join(told).splitlines()[-1]) == {"accepted": 2, "rejected": 0}


async def test_sources_come_go_and_change(tmp_path: Path) -> None:
    """A new one is there at once, one that is gone is read to its end, one that changes its format too."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        more = f'[[source]]\nkind = "unix_stream"\npath = "{tmp_path}/old"\nname = "old"\n'
        config.write_text(config.read_text() + more)
        async with running(config) as agent:
            with socket.socket(socket.AF_UNIX) as old, socket.socket(socket.AF_UNIX) as first:
                old.connect(str(tmp_path / "old"))
                first.connect(agent.stream)
                old.sendall(line() * 10)
                first.sendall(line() * 10)
                changed(config, more, more.replace("old", "new"))
                same = f'path = "{tmp_path}/events.sock"'
                changed(config, same, f'{same}\nformat = "logfmt"')
                await agent.reloaded()
                assert (old.recv(1), first.recv(1)) == (b"", b"")
                assert not (tmp_path / "old").exists()
                with socket.socket(socket.AF_UNIX) as new, socket.socket(socket.AF_UNIX) as other:
                    new.connect(str(tmp_path / "new"))
                    other.connect(agent.stream)
                    new.sendall(line())
                    other.sendall(b"event=e distinct_id=d\n")
                    status = await agent.until(delivered=22)
                    assert status["books"]["balanced"]


async def test_a_place_that_is_taken_refuses_the_reload(tmp_path: Path) -> None:
    """New sockets are opened before the old agent stops; what was opened or changed leaves nothing behind."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            with socket.socket(socket.AF_UNIX) as other:
                other.bind(str(tmp_path / "taken"))
                other.listen()
                mode = os.stat(agent.stream).st_mode
                same = f'path = "{tmp_path}/events.sock"'
                changed(config, same, f"{same}\nmode = 0o600")
                more = '[[source]]\nkind = "unix_stream"\nname = "{0}"\npath = "{1}/{0}"\n'
                config.write_text(
                    config.read_text() + more.format("free", tmp_path) + more.format("taken", tmp_path)
                )
                status = await agent.reloaded()
                assert "another program listens here" in status["reload"]["error"]
                assert len(status["sources"]) == 3
                assert not (tmp_path / "free").exists()
                assert os.stat(agent.stream).st_mode == mode


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("/buffer.db", "/other.db", "would be left behind"),
        ("/buffer.db", "/no/buffer.db", "would be left behind"),
        ('path = "{0}/events.sock"', 'path = "{0}/events.sock"\ngroup = "nosuchgroup"', "there is no group"),
        ('path = "{0}/events.dgram"', 'socket = "nosuchname"', "wants systemd's socket"),
        ('api_key = "phc_test"', 'api_key = {{ file = "/nowhere" }}', "project.api_key"),
        ("[project]", "[project", "Expected"),
        ("", None, "No such file"),
    ],
)
async def test_what_would_fail_after_the_reload_is_refused_before(
    tmp_path: Path, old: str, new: str | None, told: str
) -> None:
    """An open connection is not even closed."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            client = await trio.open_unix_socket(agent.stream)
            await client.send_all(ASK + line()[:-5])
            if new is None:
                config.unlink()
            else:
                changed(config, old.format(tmp_path), new.format(tmp_path))
            status = await agent.reloaded()
            assert told in status["reload"]["error"]
            assert "\n  try: " not in status["reload"]["error"]
            assert told in agent.log()
            await client.send_all(line()[-5:])
            assert json.loads(await client.receive_some()) == {"accepted": 1, "rejected": 0}


async def has_checked(agent: Running) -> None:
    """SIGHUP, and wait until the process that checks the configuration has come and gone."""
    agent.send(signal.SIGHUP)
    tasks = Path(f"/proc/{agent.process.pid}/task")
    for there in (True, False):
        with trio.fail_after(20):
            while any(one.read_text() for one in tasks.glob("*/children")) is not there:
                await trio.sleep(0.005)


async def test_what_was_checked_is_what_is_used(tmp_path: Path) -> None:
    """A file that is broken while the old agent waits for its last answers does not end the new one."""
    async with serving(Sink(latency=4.0)) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            client = await trio.open_unix_socket(agent.stream)
            await client.send_all(ASK + line())
            await trio.sleep(0.3)
            await has_checked(agent)
            await trio.sleep(0.3)
            good = config.read_text()
            config.write_text("{")
            with trio.fail_after(20):
                while "event=replaced" not in agent.log():
                    await trio.sleep(0.01)
            config.write_text(good)
            status = await agent.until(delivered=1)
            assert status["reload"] is not None
            assert status["reload"]["error"] is None


async def test_signals_wait_for_the_next_agent(tmp_path: Path) -> None:
    """Reloads that come together are done one after the other, and a stop among them is a stop in order."""
    async with serving(Sink()) as url, running(configure(tmp_path, url)) as agent:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(agent.stream)
            client.sendall(line() * 100)
            for _ in range(3):
                agent.send(signal.SIGHUP)
                await trio.sleep(0.3)
            agent.send(signal.SIGTERM)
            with trio.fail_after(20):
                assert await agent.process.wait() == 0
        assert agent.log().rstrip().endswith("event=stopped")
    with sqlite3.connect(tmp_path / "buffer.db") as database:
        assert database.execute("SELECT total FROM books WHERE joint = 'received'").fetchone() == (100,)


async def test_the_lock_is_never_given_up(tmp_path: Path) -> None:
    """Whoever tries all the time to open the buffer never gets it."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        other = tmp_path / "other"
        other.mkdir()
        rival = configure(other, url, f'path = "{tmp_path}/buffer.db"')
        async with running(config) as agent, trio.open_nursery() as nursery:
            codes: list[int] = []

            async def rivals() -> None:
                while True:
                    async with started(rival) as second:
                        codes.append(await second.process.wait())

            nursery.start_soon(rivals)
            for _ in range(3):
                await agent.reloaded()
            nursery.cancel_scope.cancel()
        assert set(codes) == {75}


async def test_an_answer_that_was_written_in_part_is_written_to_its_end(tmp_path: Path) -> None:
    """A client that does not read while its refusals fill the socket reads whole lines afterwards."""
    count = 8000
    async with serving(Sink()) as url, running(configure(tmp_path, url)) as agent:
        client = await trio.open_unix_socket(agent.stream)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await client.send_all(ASK)
        for _ in range(count // 100):
            await client.send_all(b"nonsense\n" * 100)
            await trio.sleep(0.005)
        with trio.fail_after(30):
            while (await agent.status())["books"]["rejected"] < count:
                await trio.sleep(0.02)
        for _ in range(2):
            await agent.reloaded()
        await client.send_all(line())
        await client.send_eof()
        told: list[bytes] = []
        await listen(client, told)
        lines = [json.loads(one) for one in b"".join(told).splitlines()]
        assert lines[-1] == {"accepted": 1, "rejected": count}
        numbers = [one["line"] for one in lines if "error" in one]
        assert numbers == sorted(set(numbers))


async def test_a_reload_that_comes_too_late_is_for_the_next_agent(tmp_path: Path) -> None:
    """The configuration changes again when it was read, and the old agent only waits for an answer."""
    async with serving(Sink(latency=20.0)) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(agent.stream)
                client.sendall(line())
            await agent.until(accepted=1)
            await trio.sleep(0.3)
            await has_checked(agent)
            await trio.sleep(0.3)
            more = f'[[source]]\nkind = "unix_stream"\nname = "new"\npath = "{tmp_path}/new"\n'
            config.write_text(config.read_text() + more)
            assert "event=replaced" not in agent.log()
            agent.send(signal.SIGHUP)
            with trio.fail_after(30):
                while not (tmp_path / "new").exists():
                    await trio.sleep(0.02)


async def test_reloads_that_are_asked_for_meanwhile_are_one(tmp_path: Path) -> None:
    """Many who say that the configuration has changed while it is read have it read once more."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        with Supervisor() as unit:
            said = unit.notified(str(tmp_path / "notify"))
            async with unit.running(config) as agent:
                await said.until("READY")
                changed(config, 'linger = "50 ms"', 'linger = "soon"')
                agent.send(signal.SIGHUP)
                await said.until("RELOADING")
                for _ in range(10):
                    agent.send(signal.SIGHUP)
                    await trio.sleep(0.01)
                for _ in range(2):
                    await said.until("READY")
                await trio.sleep(0.3)
                assert not any("RELOADING" in one for one in said.waiting())


@pytest.mark.parametrize("endless", ["/dev/zero", "fifo"])
async def test_a_configuration_without_an_end_stops_nothing(tmp_path: Path, endless: str) -> None:
    """It takes no memory, and an agent that waits for it can still be stopped."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            config.unlink()
            if endless == "fifo":
                os.mkfifo(config)
                agent.send(signal.SIGHUP)
                with trio.fail_after(20):
                    while "event=reloading" not in agent.log():
                        await trio.sleep(0.01)
            else:
                config.symlink_to(endless)
                assert "File too large" in (await agent.reloaded())["reload"]["error"]
            agent.send(signal.SIGTERM)
            with trio.fail_after(8):
                assert await agent.process.wait() == 0


@pytest.mark.parametrize("part", ["app.py", "accept/http.py"])
async def test_a_version_that_cannot_run_replaces_nothing(tmp_path: Path, part: str) -> None:
    """An upgrade that was installed in half is refused, whichever part it is, and the agent goes on."""
    program = tmp_path / "program"
    shutil.copytree(Path(str(package.__file__)).parent, program / "agent")
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        async with running(config, ["env", "-C", str(program)]) as agent:
            whole = (program / "agent" / part).read_text()
            (program / "agent" / part).write_text(whole + "import nothing_of_that_name\n")
            status = await agent.reloaded()
            assert "cannot run: No module named 'nothing_of_that_name'" in status["reload"]["error"]
            (program / "agent" / part).write_text(whole)
            assert (await agent.reloaded())["reload"]["error"] is None


async def test_in_a_terminal_hanging_up_is_a_stop(tmp_path: Path) -> None:
    """Somebody runs it by hand and closes the window: it stops in order, and loses nothing."""
    ours, terminal = pty.openpty()
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        before = ["sh", "-c", f'exec "$@" 2>/dev/pts/{os.ttyname(terminal).rsplit("/", 1)[1]}', "sh"]
        async with running(config, before) as agent:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(agent.stream)
                client.sendall(line() * 100)
                agent.send(signal.SIGHUP)
                with trio.fail_after(20):
                    assert await agent.process.wait() == 0
    os.close(ours)
    os.close(terminal)
    with sqlite3.connect(tmp_path / "buffer.db") as database:
        assert database.execute("SELECT total FROM books WHERE joint = 'received'").fetchone() == (100,)
