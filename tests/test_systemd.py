"""Sockets that systemd opens: taken by name, served like the agent's own, and left to whoever comes next."""

import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import trio
from processes import COMMAND, ENVIRONMENT, Running, run
from sources import datagram, line, stream, taking, tcp, udp
from supervisor import Supervisor

from agent.accept.inherit import inherit
from agent.accept.sockets import SO_RCVBUFFORCE, granted_buffer, read_drops
from agent.accept.source import opened
from agent.systemd import TCP, UDP, UNIX_DATAGRAM, UNIX_STREAM, ActivationError, Kind, Passed, passed

LOOPBACK = ("127.0.0.1", 0)


@pytest.fixture
def unit() -> Iterator[Supervisor]:
    """A .socket unit without a socket yet."""
    with Supervisor() as supervisor:
        yield supervisor


def configure(folder: Path, sources: str, admin: str = "admin.sock") -> Path:
    """A configuration with these sources whose events stay in the buffer, as nobody takes them."""
    file = folder / "config.toml"
    file.write_text(
        f"""
        [project]
        host = "http://127.0.0.1:9"
        api_key = "phc_test"
        [buffer]
        path = "{folder}/buffer.db"
        [admin]
        socket = "{folder}/{admin}"
        listen = ""
        {sources}
        """
    )
    return file


def source(kind: str, name: str, more: str = "") -> str:
    return f'[[source]]\nkind = "{kind}"\nsocket = "{name}"\n{more}\n'


def given(name: str, *sockets: socket.socket) -> Passed:
    """These sockets as if they had come from systemd under that name."""
    return Passed({name: [os.dup(sock.fileno()) for sock in sockets]})


async def ended(agent: Running, how: signal.Signals) -> None:
    agent.send(how)
    await agent.process.wait()


# --- what an agent does with them ---------------------------------------------------------------------


async def test_every_kind_of_source_may_have_its_sockets_from_systemd(
    unit: Supervisor, tmp_path: Path
) -> None:
    """Events come through each, several of one name are one source, and the files outlive the agent."""
    paths = [tmp_path / name for name in ("events.sock", "dev-log", "admin.sock")]
    unit.stream("events", paths[0])
    unit.datagram("devlog", paths[1])
    unit.stream("admin", paths[2])
    addresses = [unit.datagram("udp", LOOPBACK), unit.datagram("udp", LOOPBACK), unit.stream("tcp", LOOPBACK)]
    page = unit.stream("sdk", LOOPBACK)
    for path in paths:
        path.chmod(0o620)
    before = [(path.stat().st_ino, path.stat().st_mode) for path in paths]
    kinds = {"unix_stream": "events", "unix_datagram": "devlog", "udp": "udp", "tcp": "tcp", "http": "sdk"}
    file = configure(tmp_path, "".join(source(kind, name) for kind, name in kinds.items()))
    async with unit.running(file) as agent:
        for sock, place in (
            (socket.socket(socket.AF_UNIX), str(paths[0])),
            (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), str(paths[1])),
            (socket.socket(socket.AF_INET, socket.SOCK_DGRAM), addresses[0].getsockname()),
            (socket.socket(socket.AF_INET, socket.SOCK_DGRAM), addresses[1].getsockname()),
            (socket.socket(), addresses[2].getsockname()),
        ):
            with sock:
                sock.connect(place)
                sock.send(line())
        event = {"api_key": "phc_test", "event": "e", "distinct_id": "d"}
        async with httpx.AsyncClient() as client:
            answer = await client.post("http://{}:{}/e/".format(*page.getsockname()), json=event)
        assert answer.status_code == 200
        # The place of the stream is not in the configuration: the usual one is tried.
        usual = {"RUNTIME_DIRECTORY": str(tmp_path)}
        done = await trio.to_thread.run_sync(lambda: run("send", "e", "--config", str(file), env=usual))
        assert done.returncode == 0, done.stderr
        status = await agent.until(received=7, accepted=7)
        counts = {made["kind"]: (made["accepted"], made["address"]) for made in status["sources"]}
        first, second, third = ("{}:{}".format(*sock.getsockname()) for sock in addresses)
        assert counts == {
            "unix_stream": (2, str(paths[0])),
            "unix_datagram": (1, str(paths[1])),
            "udp": (2, f"{first}, {second}"),
            "tcp": (1, third),
            "http": (1, "{}:{}".format(*page.getsockname())),
        }
        agent.send(signal.SIGTERM)
        assert await agent.process.wait() == 0, agent.log()
        assert "nobody uses" not in agent.log()
    assert [(path.stat().st_ino, path.stat().st_mode) for path in paths] == before
    assert all(stat.S_ISSOCK(mode) for _, mode in before)


async def test_what_is_sent_while_no_agent_runs_is_for_the_next(unit: Supervisor, tmp_path: Path) -> None:
    """Datagrams wait in the kernel, clients in the backlog, and it makes no odds how the last one ended."""
    unit.stream("admin", tmp_path / "admin.sock")
    unit.stream("events", tmp_path / "events.sock")
    unit.datagram("datagrams", tmp_path / "events.dgram")
    address = unit.datagram("udp", LOOPBACK).getsockname()
    sources = (("unix_stream", "events"), ("unix_datagram", "datagrams"), ("udp", "udp"))
    file = configure(tmp_path, "".join(source(*words) for words in sources))
    expected = 0
    for ending in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(str(tmp_path / "events.dgram"))
            sender.send(line(1) + line(2))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(line(3), address)
        client = await trio.open_unix_socket(tmp_path / "events.sock")
        await client.send_all(b'{"ack":true}\n' + line(4))
        expected += 4
        async with client, unit.running(file) as agent:
            with trio.fail_after(20):
                assert json.loads(await client.receive_some()) == {"accepted": 1, "rejected": 0}
            await agent.until(received=expected, accepted=expected)
            await ended(agent, ending)


async def test_drops_are_counted_over_restarts(unit: Supervisor, tmp_path: Path) -> None:
    """What the kernel dropped while no agent ran is counted, what an earlier one counted is not again."""
    sock = unit.datagram("udp", LOOPBACK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    file = configure(tmp_path, source("udp", "udp", 'receive_buffer = "4 KiB"'))
    sent, counts = 0, []
    for new in (100, 100, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for number in range(new):
                sender.sendto(line(number), sock.getsockname())
        sent += new
        async with unit.running(file) as agent:
            dropped = read_drops(sock)
            assert dropped is not None
            status = await agent.until(received=sent - dropped)
            with trio.fail_after(20):
                while status["sources"][0]["dropped"] != dropped:
                    await trio.sleep(0.02)
                    status = await agent.status()
            await ended(agent, signal.SIGKILL)
        counts.append(dropped)
    assert 0 < counts[0] < counts[1] == counts[2]


async def test_what_was_passed_stays_with_the_agent(unit: Supervisor, tmp_path: Path) -> None:
    """Its children get no descriptor; a socket that nobody uses, or would look for elsewhere, is told."""
    unit.datagram("udp", LOOPBACK)
    unit.datagram("idle", LOOPBACK)
    unit.stream("admin", tmp_path / "admin.sock")
    file = configure(tmp_path, source("udp", "udp"), admin="other.sock")
    async with unit.running(file) as agent:
        for number in range(3, 6):
            info = Path(f"/proc/{agent.process.pid}/fdinfo/{number}").read_text()
            flags = int(info.split("flags:")[1].split()[0], 8)
            assert flags & os.O_CLOEXEC
        log = agent.log()
    assert "nobody uses some of the sockets that systemd passed" in log
    assert "sockets=idle" in log
    assert "not where the commands look for it" in log
    assert not (tmp_path / "other.sock").exists()


def test_an_agent_that_systemd_did_not_start_says_so(unit: Supervisor, tmp_path: Path) -> None:
    """Neither with no socket, nor with those of a script that does not `exec` it."""
    unit.datagram("udp", LOOPBACK)
    file = configure(tmp_path, source("udp", "udp"))
    for before, why in (([], "it passed none"), (unit.before(pid_of_parent=True), "a script must exec")):
        done = subprocess.run(
            [*before, *COMMAND, "run", "--config", str(file)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=ENVIRONMENT,
            pass_fds=unit.descriptors,
        )
        assert done.returncode == 1
        assert "source udp wants systemd's socket 'udp': it passed" in done.stderr
        assert why in done.stderr
        assert "start the agent by its .socket unit" in done.stderr


async def test_a_client_is_served_at_whichever_listener_it_comes(unit: Supervisor, tmp_path: Path) -> None:
    """The places for clients are the source's: a listener that nobody uses keeps none."""
    listeners = unit.stream("x", tmp_path / "a"), unit.stream("x", tmp_path / "b")
    settings = stream(tmp_path, socket="x", max_connections=1)
    async with taking(settings, passed=given("x", *listeners)) as taken:
        for number, name in enumerate("aabbab", 1):
            async with await trio.open_unix_socket(tmp_path / name) as client:
                await client.send_all(line(number))
                await taken.settled(number)
        assert taken.source.connections is not None
        assert taken.total("accepted") == 6


def test_a_receive_buffer_is_never_made_smaller(unit: Supervisor) -> None:
    """What ReceiveBuffer= gave stays, where less is configured."""
    sock = unit.datagram("x", LOOPBACK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
    [(own, granted, _)] = inherit(udp(socket="x", receive_buffer=50_000), given("x", sock))
    with own:
        assert granted == granted_buffer(sock) == 100_000
    [(own, granted, _)] = inherit(udp(socket="x", receive_buffer=120_000), given("x", sock))
    with own:
        assert granted == granted_buffer(sock) == 120_000


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may exceed rmem_max, as systemd does")
def test_a_receive_buffer_beyond_the_kernels_bound_is_kept(unit: Supervisor) -> None:
    """Asking without privileges for more than rmem_max would cut to it what systemd gave."""
    bound = int(Path("/proc/sys/net/core/rmem_max").read_text())
    sock = unit.datagram("x", LOOPBACK)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2 * bound)
    os.seteuid(65534)
    try:
        [(own, granted, _)] = inherit(udp(socket="x", receive_buffer=3 * bound), given("x", sock))
    finally:
        os.seteuid(0)
    with own:
        assert granted == granted_buffer(sock) == 2 * bound


def test_what_a_tcp_listener_needs_is_set_on_an_inherited_one(unit: Supervisor) -> None:
    """Dead clients are found there too."""
    sock = unit.stream("x", LOOPBACK)
    with opened(tcp(socket="x"), given("x", sock)) as [(own, _, _)]:
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


# --- what is refused ----------------------------------------------------------------------------------


@contextmanager
def refused(said: str, hint: str) -> Iterator[None]:
    """The block ends with an error that says this, and what to do."""
    with pytest.raises(ActivationError) as caught:
        yield
    assert said in str(caught.value)
    assert hint in caught.value.hint


MADE = {"stream": UNIX_STREAM, "dgram": UNIX_DATAGRAM, "tcp": TCP, "udp": UDP}


@pytest.mark.parametrize("wanted", [UNIX_STREAM, UNIX_DATAGRAM, TCP, UDP])
@pytest.mark.parametrize("made", MADE)
def test_a_socket_of_another_kind_is_refused(
    unit: Supervisor, tmp_path: Path, made: str, wanted: Kind
) -> None:
    """The error says what it is, what is wanted, and what to write in the unit."""
    place = tmp_path / "s" if MADE[made].unix else LOOPBACK
    listens = MADE[made].type == socket.SOCK_STREAM
    sock = unit.stream("x", place) if listens else unit.datagram("x", place)
    if MADE[made] == wanted:
        [own] = given("x", sock).take("x", [wanted], "source app")
        own.close()
        return
    with refused(f"source app takes {wanted.said}, and systemd's 'x' is {MADE[made].said}", wanted.unit):
        given("x", sock).take("x", [wanted], "source app")


def test_every_source_refuses_what_it_cannot_read(unit: Supervisor, tmp_path: Path) -> None:
    """ListenSequentialPacket= makes sockets that are for none of them."""
    odd = unit.pass_on("x", socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    for settings in (
        stream(tmp_path, socket="x"),
        datagram(tmp_path, socket="x"),
        udp(socket="x"),
        tcp(socket="x"),
    ):
        with refused("source app takes", "in the .socket unit say Listen"):
            inherit(settings, given("x", odd))


def test_one_of_another_kind_among_several_is_refused(unit: Supervisor) -> None:
    """Every socket of the name is looked at, and none of them is kept open."""
    both = given("x", unit.datagram("x", LOOPBACK), unit.stream("x", LOOPBACK))
    with refused("systemd's 'x' is a TCP socket", "ListenDatagram="):
        both.take("x", [UDP], "source app")


def test_a_clients_connection_is_no_listener(unit: Supervisor) -> None:
    """Accept=yes would pass one client only."""
    listener = unit.stream("x", LOOPBACK)
    with socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted, refused("systemd's 'x' does not listen", "Accept=no"):
            given("x", accepted).take("x", [TCP], "source app")


def test_what_is_no_socket_is_refused() -> None:
    """ListenFIFO= and the like make none."""
    reading, writing = os.pipe()
    os.close(writing)
    with refused("what systemd passed as 'x' is no socket", "ListenStream="):
        Passed({"x": [reading]}).take("x", [TCP], "source app")
    os.close(reading)


def test_a_name_that_was_not_passed_is_told_with_those_that_were(unit: Supervisor) -> None:
    """The likeliest one is suggested, and each is given once."""
    two = Passed({"events": [os.dup(unit.datagram("events", LOOPBACK).fileno())], "tcp": []})
    with refused(
        "source app: systemd passed no socket 'evnts' (did you mean events?); it passed events, tcp",
        "FileDescriptorName=evnts",
    ):
        two.take("evnts", [UDP], "source app")
    [own] = two.take("events", [UDP], "source app")
    with own, refused("systemd passed no socket 'events'", ""):
        two.take("events", [UDP], "source app")
    assert two.left == ("tcp",)


@pytest.mark.parametrize(
    "said",
    [
        {"LISTEN_FDS": "one"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "me"},
        {"LISTEN_FDS": "1000000"},
        {"LISTEN_FDS": "0", "LISTEN_FDNAMES": "a:b"},
    ],
)
def test_an_environment_that_contradicts_itself_is_told(said: dict[str, str]) -> None:
    """The error quotes it; nothing of it is left for children."""
    env = {"LISTEN_PID": str(os.getpid()), "HOME": "/", **said}
    with refused(f"LISTEN_FDS={said['LISTEN_FDS']}", "sd_listen_fds(3)"):
        passed(env)
    assert env == {"HOME": "/"}


@pytest.mark.parametrize(
    "said", [{}, {"LISTEN_FDS": "2", "LISTEN_PID": "1", "LISTEN_FDNAMES": "a:b", "LISTEN_PIDFDID": "7"}]
)
def test_what_is_another_process_s_is_not_touched(said: dict[str, str]) -> None:
    """Nothing was passed, and the environment says so afterwards."""
    env = {"HOME": "/", **said}
    assert passed(env).left == ()
    assert env == {"HOME": "/"}
