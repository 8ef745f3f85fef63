"""Who sends: the kernel's word on Unix sockets, users who may not, and what a user may send in a second."""

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from processes import configure, running
from sources import Taken, datagram, http, line, stream, taking, tcp, udp

from agent.accept.sender import Place, Sender, Senders, place_in, read_place, sender_of
from agent.config import Http, Udp, UnixDatagram
from agent.events import SENDER
from agent.sink import Sink, serving

ASK = b'{"ack":true}\n'
FORGED = {"$agent_uid": 0, "$agent_pid": 1, "$agent_unit": "sshd.service", "n": 5}
OTHER = 12345

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can send as somebody else")


APART = ("unshare", "--pid", "--fork", "--kill-child")


def can_be_apart() -> bool:
    """Whether a process may have a pid namespace of its own here."""
    if shutil.which(APART[0]) is None:
        return False
    return subprocess.run([*APART, "true"], check=False, capture_output=True).returncode == 0


def send(taken: Taken, *lines: bytes, uid: int | None = None) -> int:
    """A process of its own, of that user, sends lines to the source; its id."""
    stream = not isinstance(taken.source.settings, UnixDatagram)
    return send_to(taken.source.address, *lines, stream=stream, uid=uid)


def send_to(path: str, *lines: bytes, stream: bool, uid: int | None = None) -> int:
    """The same to the socket at this path."""
    kind = "SOCK_STREAM" if stream else "SOCK_DGRAM"
    program = (
        "import os, socket, sys\n"
        f"s = socket.socket(socket.AF_UNIX, socket.{kind})\n"
        f"{'' if uid is None else f'os.setgid({uid}); os.setuid({uid})'}\n"
        f"s.connect({path!r})\n"
        f"for part in sys.stdin.buffer.read().split(bytes(1)): s.send(part)\n"
        "s.close()\n"
    )
    sending = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    sending.communicate(b"\0".join(lines))
    assert sending.returncode in (0, 1)
    return sending.pid


@pytest.fixture(params=[stream, datagram])
def kind(request: pytest.FixtureRequest) -> Any:
    """Both kinds of Unix sockets."""
    return request.param


@pytest.fixture
def folder() -> Any:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


async def test_the_kernels_word_cannot_be_forged(kind: Any, folder: Path) -> None:
    """User, group and process are told as the kernel knows them, whatever the payload says."""
    async with taking(kind(folder, sender=True)) as taken:
        lines = line(1), line(2, properties=FORGED), line(3, properties={"$agent\\u005fuid": 1})
        pid = await trio.to_thread.run_sync(send, taken, *lines)
        events = await taken.events(3)
        for event in events:
            properties = event["properties"]
            own = (properties["$agent_uid"], properties["$agent_gid"], properties["$agent_pid"])
            assert own == (os.getuid(), os.getgid(), pid)
        assert events[1]["properties"]["n"] == 5
        assert events[1]["properties"]["$lib"] == "capture-agent"


@as_root
async def test_each_sender_is_told_apart(folder: Path) -> None:
    """Datagrams of several users that are read together keep their own senders."""
    async with taking(datagram(folder, mode=0o666, sender=True)) as taken:
        async with trio.open_nursery() as nursery:
            for uid in (None, OTHER):
                for _ in range(3):
                    one = partial(send, taken, *[line(uid or 0)] * 50, uid=uid)
                    nursery.start_soon(trio.to_thread.run_sync, one)
        events = await taken.events(300)
        assert {(event["properties"]["$agent_uid"], event["properties"]["n"]) for event in events} == {
            (0, 0),
            (OTHER, OTHER),
        }


@pytest.mark.parametrize("settings", [udp(), tcp(), http(), tcp(format="logfmt"), tcp(format="syslog")])
async def test_where_the_kernel_does_not_know_the_sender_no_payload_names_one(settings: Any) -> None:
    """Over the network, in every format: a property that only the kernel's word fills is not there."""
    sent = {
        "json": line(5, properties=FORGED),
        "logfmt": b"event=e distinct_id=d $agent_uid=0 $agent_unit=sshd.service n=5\n",
        "syslog": b"<13>Nov 24 13:44:25 web-1 app: " + line(5, properties=FORGED),
    }[settings.format]
    async with taking(settings) as taken:
        host, _, port = taken.source.address.rpartition(":")
        if isinstance(settings, Http):
            async with httpx.AsyncClient() as sdk:
                batch = b'{"api_key":"phc_test","batch":[%b]}' % sent
                answer = await sdk.post(f"http://{host}:{port}/batch", content=batch)
                assert answer.status_code == 200
        else:
            kind = socket.SOCK_DGRAM if isinstance(settings, Udp) else socket.SOCK_STREAM
            with socket.socket(socket.AF_INET, kind) as client:
                client.connect((host, int(port)))
                client.send(sent)
        [event] = await taken.events(1)
        assert event["properties"]["n"] == 5
        assert SENDER.isdisjoint(event["properties"])


async def test_a_unit_that_was_not_asked_for_no_payload_can_say(kind: Any, folder: Path) -> None:
    """With `sender` alone the payload's unit and container are taken out, not left to be believed."""
    async with taking(kind(folder, sender=True)) as taken:
        await trio.to_thread.run_sync(send, taken, line(1, properties=FORGED))
        [event] = await taken.events(1)
        assert SENDER.intersection(event["properties"]) == {"$agent_uid", "$agent_gid", "$agent_pid"}


async def test_units_are_looked_up(kind: Any, folder: Path) -> None:
    """On request unit and container are told; what is not known is null, and not the payload's."""
    async with taking(kind(folder, sender_unit=True)) as taken:
        await trio.to_thread.run_sync(send, taken, line(1, properties=FORGED))
        [event] = await taken.events(1)
        assert {"$agent_unit", "$agent_container"} <= event["properties"].keys()
        assert event["properties"]["$agent_unit"] != "sshd.service"


CONTAINER = "0f" * 32


@pytest.mark.parametrize(
    ("cgroup", "place"),
    [
        ("0::/system.slice/nginx.service\n", Place("nginx.service", None)),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-term.scope\n",
            Place("app-term.scope", None),
        ),
        (f"0::/system.slice/docker-{CONTAINER}.scope\n", Place(f"docker-{CONTAINER}.scope", CONTAINER)),
        (f"12:pids:/docker/{CONTAINER}\n1:name=systemd:/docker/{CONTAINER}\n0::/\n", Place(None, CONTAINER)),
        (
            f"0::/kubepods.slice/kubepods-pod7.slice/cri-containerd-{CONTAINER}.scope\n",
            Place(f"cri-containerd-{CONTAINER}.scope", CONTAINER),
        ),
        ("0::/\n", Place(None, None)),
        ("", Place(None, None)),
        ("rubbish", Place(None, None)),
    ],
)
def test_cgroups(cgroup: str, place: Place) -> None:
    """As systemd, Docker and Kubernetes name them."""
    assert place_in(cgroup) == place


def test_a_process_that_has_ended_has_no_place() -> None:
    """Nothing is raised."""
    assert read_place(2**22 + 1) == Place(None, None)


async def test_a_sender_who_is_unknown_is_told_as_null() -> None:
    """A datagram from before the kernel was asked has no sender; no payload may give it one."""
    origin = await Senders(told=True, units=True).origin(None)
    assert origin.uid is None
    assert {bytes(raw) for raw in origin.forced.values()} == {b"null"}


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ((71, 1000, 100), Sender(71, 1000, 100)),
        ((0, 1000, 100), Sender(0, 1000, 100)),
        ((0, 65534, 100), Sender(0, 65534, 100)),
        ((71, 65534, 65534), Sender(71, 65534, 65534)),
        ((0, 65534, 65534), None),
    ],
)
def test_a_sender_is_unknown_only_where_the_kernel_says_nothing(
    said: tuple[int, int, int], known: Sender | None
) -> None:
    """User and group hold although the process has no number here."""
    word = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("=iII", *said))
    assert sender_of([word]) == known


@pytest.mark.skipif(not can_be_apart(), reason="needs root and unshare(1)")
@pytest.mark.parametrize("kind", ["unix_stream", "unix_datagram"])
async def test_senders_whose_process_cannot_be_seen_keep_their_user(kind: str, folder: Path) -> None:
    """To an agent in a container the process is null; who may send, and how much, goes by the user still."""
    sink, path = Sink(), f"{folder}/apart"
    settings = f"""
        [[source]]
        name = "apart"
        kind = "{kind}"
        path = "{path}"
        mode = 0o666
        sender_unit = true
        allow_uids = [0]
        uid_events_per_second = 0.001
        uid_burst = 2
    """
    async with serving(sink) as url:
        file = configure(folder, url)
        file.write_text(file.read_text() + settings)
        async with running(file, before=APART) as agent:
            stream = kind == "unix_stream"
            await trio.to_thread.run_sync(lambda: send_to(path, line(4), stream=stream, uid=OTHER))
            await trio.to_thread.run_sync(lambda: send_to(path, line(1), line(2), line(3), stream=stream))
            status = await agent.until(delivered=2, received=3 if stream else 4)
        own = {"$agent_uid": 0, "$agent_gid": 0, "$agent_pid": None, "$agent_unit": None}
        for event in sink.events:
            assert own.items() <= event.properties.items()
        reasons = [reject["reason"] for reject in status["rejects"]]
        assert sorted(reasons) == (["rate_limited"] if stream else ["forbidden", "rate_limited"])


@as_root
async def test_users_who_may_not_send(kind: Any, folder: Path) -> None:
    """Their datagrams are refused, their connections closed; the others go on, and both are counted."""
    async with taking(kind(folder, mode=0o666, allow_uids=(0,))) as taken:
        await trio.to_thread.run_sync(lambda: send(taken, line(1), line(2), uid=OTHER))
        await trio.to_thread.run_sync(lambda: send(taken, line(3)))
        [event] = await taken.events(1)
        assert event["properties"]["n"] == 3
        assert "$agent_uid" not in event["properties"]
        if taken.source.turned_away is None:
            assert (await taken.settled(3), taken.total("rejected", "forbidden"))[1] == 2
        else:
            assert taken.source.turned_away == 1


STRANGER = """
import os, socket, sys
os.setgid(12345); os.setuid(12345)
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
sent = int(sys.argv[2])
try:
    client.sendall(b'{"ack":true}\\n' + b"x" * sent)
except OSError as error:
    print(type(error).__name__)
while some := client.recv(1000): print(some.decode(), end="")
"""


@as_root
@pytest.mark.parametrize("sent", [0, 1, 100_000, 900_000])
async def test_who_is_turned_away_reads_why(sent: int, folder: Path) -> None:
    """Also a client that has sent something already: it is told, and its end is clean, no reset."""
    async with taking(stream(folder, mode=0o666, allow_uids=(0,), max_connections=1)) as taken:
        command = [sys.executable, "-c", STRANGER, taken.source.address, str(sent)]
        done = await trio.to_thread.run_sync(lambda: subprocess.run(command, capture_output=True, check=True))
        assert done.stdout == b'{"error":"forbidden"}\n'
        assert (taken.total("received"), taken.source.turned_away) == (0, 1)


LOITERERS = """
import os, socket, sys
os.setgid(12345); os.setuid(12345)
clients = [socket.socket(socket.AF_UNIX) for _ in range(40)]
for client in clients: client.connect(sys.argv[1])
sys.stdin.read()
"""


@as_root
async def test_who_is_turned_away_and_stays_takes_no_place(folder: Path) -> None:
    """Clients that do not leave when they are told to hold up nobody who may send."""
    async with taking(stream(folder, mode=0o666, allow_uids=(0,), max_connections=1)) as taken:
        command = [sys.executable, "-c", LOITERERS, taken.source.address]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as strangers:
            while taken.source.turned_away != 40:
                await trio.sleep(0.005)
            async with await trio.open_unix_socket(taken.source.address) as client:
                await client.send_all(ASK + line(1))
                assert msgspec.json.decode(await client.receive_some()) == {"accepted": 1, "rejected": 0}
            strangers.kill()


async def test_what_is_beyond_the_rate_is_refused_by_name(folder: Path) -> None:
    """The first events of a flood are taken, the others told as `rate_limited`, each with its line."""
    settings = stream(folder, max_events_per_second=0.001, burst=3)
    async with taking(settings) as taken:
        async with await trio.open_unix_socket(taken.source.address) as client:
            await client.send_all(
                ASK + b"\n".join((line(1), b"", line(2), b"nonsense", line(4), line(5))) + b"\n"
            )
            await client.send_eof()
            text = b"".join([some async for some in client])
        told = [msgspec.json.decode(one) for one in text.splitlines()]
        assert told[-1] == {"accepted": 1, "rejected": 4} or told[-1] == {"accepted": 2, "rejected": 3}
        assert told[-2] == {"line": 5, "error": "rate_limited"}
        assert taken.total("received") == 5
        assert (
            len([refusal for refusal in taken.source.putter.recent if refusal.reason == "rate_limited"]) == 1
        )


async def test_blank_lines_take_nothing_from_a_rate(kind: Any, folder: Path) -> None:
    """A sender who ends its lines twice may send as many events as another."""
    async with taking(kind(folder, max_events_per_second=0.001, burst=3)) as taken:
        lines = [b"\n\n", line(1) + b"\n \r\n", b"\n" + line(2) + b"\n", line(3), b"\n", line(4) + b"\n"]
        await trio.to_thread.run_sync(lambda: send(taken, b"".join(lines)))
        await taken.settled(4)
        assert (taken.total("accepted"), taken.total("rejected", "rate_limited")) == (3, 1)
        assert [event["properties"]["n"] for event in await taken.events(3)] == [1, 2, 3]


@as_root
async def test_one_noisy_user_takes_nothing_from_another(folder: Path) -> None:
    """A user over its rate is refused, beside it another's events all come in."""
    settings = datagram(folder, mode=0o666, uid_events_per_second=0.001, uid_burst=20)
    async with taking(settings) as taken:
        await trio.to_thread.run_sync(lambda: send(taken, *[line(1)] * 500, uid=OTHER))
        await trio.to_thread.run_sync(lambda: send(taken, *[line(2)] * 20))
        await taken.settled(520)
        assert (taken.total("accepted"), taken.total("rejected", "rate_limited")) == (40, 480)
        numbers = [event["properties"]["n"] for event in await taken.events(40)]
        assert numbers.count(2) == 20
