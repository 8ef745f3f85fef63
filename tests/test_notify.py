"""What systemd is told of an agent: when it takes events, how it is, that it lives, and that it ends."""

import ctypes
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import trio
from processes import Running, configure, run
from sources import line
from supervisor import Supervisor, Told

from agent.notify import Notices, notices

# Where nobody takes events, so that they stay.
NOWHERE = "http://127.0.0.1:9"

# linux/ptrace.h
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207


@pytest.fixture
def unit() -> Iterator[Supervisor]:
    """A service of Type=notify."""
    with Supervisor() as supervisor:
        yield supervisor


def place(kind: str, folder: Path) -> str:
    """A NOTIFY_SOCKET of either kind."""
    return f"{folder}/notify" if kind == "path" else f"@capture-agent-{uuid4()}"


@contextmanager
def listening(where: str) -> Iterator[Told]:
    """A listener to this process."""
    told = Told(where)
    told.pid = os.getpid()
    with told.sock:
        yield told


def ptrace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(request, thread, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


@contextmanager
def frozen(agent: Running) -> Iterator[None]:
    """The agent with all threads but the loop's standing still, as they do when a disk hangs."""
    with ExitStack() as stack:
        for name in os.listdir(f"/proc/{agent.process.pid}/task"):
            if (thread := int(name)) != agent.process.pid:
                ptrace(PTRACE_SEIZE, thread)
                stack.callback(ptrace, PTRACE_DETACH, thread)
                ptrace(PTRACE_INTERRUPT, thread)
                while "(tracing stop)" not in Path(f"/proc/{thread}/status").read_text():
                    time.sleep(0.001)
        yield


async def logged(agent: Running, text: str) -> None:
    with trio.fail_after(30):
        while text not in agent.log():
            await trio.sleep(0.01)


@pytest.mark.parametrize("kind", ["path", "abstract"])
async def test_it_is_ready_when_it_takes_events(unit: Supervisor, tmp_path: Path, kind: str) -> None:
    """An agent that waits for its key says nothing; once it is told ready, what is sent is on disk."""
    told = unit.notified(place(kind, tmp_path))
    unit.credentials(tmp_path / "credentials", {})
    (tmp_path / "credentials").chmod(0o700)
    os.mkfifo(tmp_path / "credentials/posthog")
    file = configure(tmp_path, NOWHERE)
    file.write_text(file.read_text().replace('"phc_test"', '{ credential = "posthog" }'))
    async with unit.started(file) as agent:
        with trio.fail_after(30):  # opening it to write waits for who opens it to read
            key = await trio.to_thread.run_sync(os.open, tmp_path / "credentials/posthog", os.O_WRONLY)
        assert told.waiting() == []
        os.write(key, b"phc_test")
        os.close(key)
        assert await told.until("READY", "1") == {"READY": "1", "STATUS": "0 events buffered"}
        async with await trio.open_unix_socket(agent.stream) as client:
            await client.send_all(b'{"ack":true}\n' + line())
            with trio.fail_after(30):
                assert await client.receive_some() == b'{"accepted":1,"rejected":0}\n'


async def test_who_cannot_start_is_never_ready(unit: Supervisor, tmp_path: Path) -> None:
    """A buffer that another agent has ends it, and nothing was said."""
    file = configure(tmp_path, NOWHERE)
    async with unit.running(file) as owner:
        told = unit.notified(place("path", tmp_path))
        for name in ("events.sock", "events.dgram", "admin.sock"):
            (tmp_path / name).unlink()
        async with unit.started(file) as agent:
            with trio.fail_after(30):
                assert await agent.process.wait() == 75
            assert told.waiting() == []
        assert owner.process.poll() is None


async def test_people_are_told_how_it_is_and_that_it_ends(unit: Supervisor, tmp_path: Path) -> None:
    """The line has what waits and what keeps it; at the end comes the word that a stop is no failure."""
    told = unit.notified(place("path", tmp_path))
    async with unit.running(configure(tmp_path, NOWHERE)) as agent:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(line(1) + line(2), agent.datagram)
        await told.until("STATUS", "2 events buffered, waiting to try again")
        agent.send(signal.SIGTERM)
        said = await told.until("STOPPING")
        assert said == {"STOPPING": "1", "STATUS": "stopping, 2 events buffered"}
        assert await agent.process.wait() == 0
        assert told.waiting() == []


async def test_a_writer_that_hangs_gives_no_sign_of_life(unit: Supervisor, tmp_path: Path) -> None:
    """The loop turns and answers; but the watchdog hears nothing until the writer goes on."""
    told = unit.notified(place("path", tmp_path), watchdog=0.4)
    async with unit.running(configure(tmp_path, NOWHERE)) as agent:
        for _ in range(3):
            assert await told.until("WATCHDOG") == {"WATCHDOG": "1"}
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(frozen(agent))
                except OSError as error:
                    pytest.skip(f"a thread cannot be stopped here: {error}")
                with trio.move_on_after(5):
                    await agent.status()
                    break
                stack.close()  # one of them was stopped with the interpreter's lock
            told.waiting()
            await logged(agent, "the buffer's writer does not answer")
            # The answer before the threads stood still may have been told after we listened.
            assert len([said for said in told.waiting() if "WATCHDOG" in said]) <= 1
            assert (await agent.status())["books"]["balanced"]
        await told.until("WATCHDOG")
        await logged(agent, "the buffer's writer answers again")


async def test_who_is_not_watched_gives_no_sign_of_life(tmp_path: Path) -> None:
    """Without WATCHDOG_USEC, or with another's WATCHDOG_PID, nobody waits for one."""
    where = {"NOTIFY_SOCKET": f"{tmp_path}/notify"}
    for more, seconds in (
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ):
        assert notices(where | more).watchdog == seconds


@pytest.mark.parametrize("where", ["", "/", "@", "vsock:2:1234", "relative"])
def test_who_has_no_listener_tells_nobody(where: str) -> None:
    """Also where its address is of a kind that there is not on this host."""
    assert not notices({"NOTIFY_SOCKET": where}).heard


async def test_a_reload_is_told_with_its_time(tmp_path: Path) -> None:
    """systemd wants the monotonic clock's microseconds, to tell the word from an older one."""
    with listening(f"{tmp_path}/notify") as told:
        before = time.monotonic_ns() // 1000
        await Notices(f"{tmp_path}/notify").reloading()
        (said,) = told.waiting()
        assert said.keys() == {"RELOADING", "MONOTONIC_USEC"}
        assert before <= int(said["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000


async def test_a_status_is_one_line(tmp_path: Path) -> None:
    """What an error says over several lines is no further word to systemd."""
    with listening(f"{tmp_path}/notify") as told:
        await Notices(f"{tmp_path}/notify").status("disk\nSTOPPING=1")
        assert told.waiting() == [{"STATUS": "disk STOPPING=1"}]


async def test_a_listener_that_is_gone_harms_nobody(tmp_path: Path) -> None:
    """What cannot be told is not; the next one at the same place hears again."""
    speaker = Notices(f"{tmp_path}/notify")
    await speaker.status("a")
    with listening(f"{tmp_path}/notify") as told:
        await speaker.status("b")
        assert told.waiting() == [{"STATUS": "b"}]


def test_a_command_tells_systemd_nothing(tmp_path: Path) -> None:
    """Only `run` is a service."""
    with listening(f"{tmp_path}/notify") as told:
        run(
            "check",
            "--config",
            str(configure(tmp_path, NOWHERE)),
            env={"NOTIFY_SOCKET": f"{tmp_path}/notify"},
        )
        assert told.waiting() == []
