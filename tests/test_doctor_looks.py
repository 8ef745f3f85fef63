"""What the doctor makes of answers, names, limits and modes: each look by itself."""

import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from certificates import make_papers, server_tls

from agent.config import Admin, Buffer, Config, Delivery, Project, Secret, Udp, UnixDatagram
from agent.doctor import access, kernel, reach, room, store
from agent.doctor.finding import Finding
from agent.doctor.replies import clock
from agent.sink import Fault, Reply, Sink, serving

KEY = "phc_secret_of_this_test"
FLAGS = b'{"flags":{}}'
HTML = {"content-type": "text/html"}


def project(host: str, **delivery: Any) -> Project:
    """A project of that host."""
    return Project(host=host, api_key=Secret(KEY), delivery=Delivery(**delivery))


async def asked(it: Project, *, delivers: bool = False) -> dict[str, Finding]:
    """What was found, by check; no text of it holds the key."""
    found = await reach.ask(it, key=True, delivers=delivers)
    assert KEY not in str(found)
    return {finding.check: finding for finding in found}


@pytest.mark.parametrize(
    ("reply", "check", "level", "said"),
    [
        (Reply(200, FLAGS, {}), "key", "ok", "knows the key"),
        (
            Reply(200, b'{"flags":{},"quotaLimited":["feature_flags"]}', {}),
            "billing",
            "warning",
            "over a limit",
        ),
        (Reply(200, b'{"status":1}', {}), "host", "error", "not as PostHog does"),
        (Reply(200, b"<html>log in", HTML), "host", "error", "a portal or proxy"),
        (Reply(401, b"who is " + KEY.encode(), {}), "key", "error", "does not know this key"),
        (Reply(403, b"no", {}), "key", "error", "HTTP 403"),
        (Reply(402, b"pay", {}), "billing", "error", "HTTP 402: pay"),
        (Reply(404, b"not found", {}), "host", "error", "is not PostHog: HTTP 404"),
        (Reply(400, b"what?", {}), "host", "error", "did not understand"),
        (Reply(301, b"", {"location": "https://other.example/x"}), "host", "error", "https://other.example"),
        (Reply(429, b"slow down", {}), "key", "warning", "asked too often"),
        (Reply(503, b"down", {}), "host", "error", "does not work now: HTTP 503"),
        (Reply(511, b"log in", {}), "host", "error", "wants a person to log in"),
        (Fault.HANG_UP, "network", "error", "closed without an answer"),
    ],
)
async def test_answers(reply: Reply | Fault, check: str, level: str, said: str) -> None:
    """Each kind of answer is told as what it means."""
    async with serving(Sink(script=lambda _: reply)) as url:
        found = await asked(project(url))
    assert (found[check].level, said in found[check].what) == (level, True), found


async def test_an_installation_without_flags_is_no_wrong_host() -> None:
    """Where the agent's events are taken, a 404 says only that the key cannot be checked."""
    async with serving(Sink(script=lambda _: Reply(404, b"", {}))) as url:
        found = await asked(project(url), delivers=True)
    assert found["key"].level == "warning"


async def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that takes the question and says nothing holds nobody up."""
    monkeypatch.setattr(reach, "ASK_SECONDS", 0.2)
    async with serving(Sink(script=lambda _: Fault.STALL)) as url:
        found = await asked(project(url))
    assert found["network"].what.endswith("no answer within 0.2 s")


async def test_nobody_listens() -> None:
    """A closed port is told as the system says it."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    found = await asked(project(f"http://127.0.0.1:{port}"))
    assert found["network"].what.endswith("cannot connect: Connection refused")


async def test_names_that_lead_nowhere() -> None:
    """A name that nobody has (RFC 2606), and one that a filter answers with no address."""
    found = await asked(project("http://posthog.invalid"))
    assert found["dns"].level == "error"
    assert list(found) == ["dns"]
    found = await asked(project("http://0.0.0.0:1"))
    assert "a DNS filter blocks it" in found["dns"].what


@asynccontextmanager
async def answering(text: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server of 127.0.0.1 that says the same to everybody."""

    async def answer(plain: trio.SocketStream) -> None:
        stream: Any = plain if tls is None else trio.SSLStream(plain, tls, server_side=True)
        try:
            await stream.receive_some()
            await stream.send_all(text)
        except (trio.BrokenResourceError, OSError):
            return
        finally:
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, answer, 0, host="127.0.0.1")
        )
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def http(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """An answer as it is sent."""
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers])
    return head.encode() + b"\r\n\r\n" + body


async def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    """It is named, with what to do; with its authority configured all is well."""
    papers = make_papers(tmp_path)
    async with answering(http(FLAGS), server_tls(papers)) as port:
        found = await asked(project(f"https://127.0.0.1:{port}"))
        assert "certificate verify failed: self-signed certificate" in found["tls"].what
        assert "delivery.ca_file" in found["tls"].hint
        found = await asked(project(f"https://127.0.0.1:{port}", ca_file=papers.ca))
        assert found["key"].level == "ok"
        found = await asked(project(f"https://localhost:{port}", ca_file=papers.ca))
        assert "mismatch" in found["tls"].what
        assert "another name's" in found["tls"].hint


async def test_certificates_of_ours_that_cannot_be_used(tmp_path: Path) -> None:
    """A file that is not there is told before anything is sent."""
    found = await asked(project("http://127.0.0.1:1", ca_file=str(tmp_path / "none.pem")))
    assert found["delivery"].level == "error"


async def test_a_port_without_tls() -> None:
    """https to a port that speaks HTTP is told as that."""
    async with serving(Sink()) as url:
        found = await asked(project(url.replace("http:", "https:")))
    assert found["tls"].level == "error"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (http(b"", status="407 Proxy Authentication Required"), "HTTP 407"),
        (http(b"<html>blocked", "Content-Type: text/html"), "a page of HTML"),
    ],
)
async def test_a_proxy_in_the_way(text: bytes, said: str) -> None:
    """It is named, and its password is not."""
    async with answering(text) as port:
        way = Secret(f"http://user:proxy-password@127.0.0.1:{port}")
        found = await asked(project("http://posthog.invalid", proxy=way))
    assert found["host"].level == "error"
    assert said in found["host"].what
    assert f"by the proxy 127.0.0.1:{port} (of delivery.proxy)" in found["host"].what
    assert "proxy-password" not in str(found)


async def test_a_wrong_clock_is_told() -> None:
    """By PostHog's own, in the header `Date` of its answer."""
    async with answering(http(FLAGS, "Date: Tue, 01 Jan 2019 00:00:00 GMT")) as port:
        found = await asked(project(f"http://127.0.0.1:{port}"))
    assert found["clock"].level == "warning"
    assert "s ahead of PostHog's" in found["clock"].what


@pytest.mark.parametrize(
    ("seconds", "level"), [(0, "ok"), (59, "ok"), (-59, "ok"), (61, "warning"), (-61, "warning")]
)
def test_a_minute_is_odd(seconds: int, level: str) -> None:
    """Up to a minute a clock is right enough."""
    (found,) = clock(1_000_000_000, 1_000_000_000 + seconds * 1_000_000, "here")
    assert found.level == level


@pytest.mark.parametrize(
    ("version", "level", "said"),
    [((3, 23, 1), "error", "too old"), ((3, 24, 0), "ok", "only user"), ((3, 51, 3), "ok", "SQLite 3.51.3")],
)
def test_sqlite_versions(version: tuple[int, ...], level: str, said: str) -> None:
    """Too old to work; old enough to be used by one program only; good."""
    found = store.sqlite_version(version)
    assert (found.level, said in found.what) == (level, True)


def status(uptime: float, received: int, dropped: int, granted: int) -> dict[str, Any]:
    """What of a status the limits are held against."""
    source = {"name": "in", "received": received, "dropped": dropped, "receive_buffer": granted}
    return {"uptime_seconds": uptime, "sources": [source]}


def config(tmp_path: Path, *sources: Udp | UnixDatagram, max_size: int = 2**30) -> Config:
    """A configuration of these sources."""
    return Config(
        projects=(project("http://127.0.0.1:1"),),
        sources=sources,
        buffer=Buffer(path=str(tmp_path / "buffer.db"), max_size=max_size),
        admin=Admin(socket=str(tmp_path / "admin.sock")),
    )


MIB = 2**20
UDP = Udp(name="in", project="default", receive_buffer=4 * MIB)
DATAGRAM = UnixDatagram(name="in", project="default", path="/x")


@pytest.mark.parametrize(
    ("source", "limits", "before", "after", "level", "said"),
    [
        (UDP, (4 * MIB, None), None, None, "ok", "4.0 MiB will be granted"),
        (UDP, (MIB, None), None, None, "warning", "the kernel gives 1.0 MiB of the 4.0 MiB"),
        (UDP, (MIB, None), status(1, 0, 0, 4 * MIB), status(2, 0, 0, 4 * MIB), "ok", "3,251 datagrams"),
        (UDP, (MIB, None), status(1, 0, 0, MIB), status(2, 0, 0, MIB), "warning", "were asked for"),
        (
            UDP,
            (MIB, None),
            status(1, 0, 0, 4 * MIB),
            status(2, 5000, 0, 4 * MIB),
            "warning",
            "5,000 come in a second",
        ),
        (UDP, (MIB, None), status(1, 0, 3, 4 * MIB), status(2, 0, 7, 4 * MIB), "warning", "dropped 4 while"),
        (
            UDP,
            (MIB, None),
            status(1, 0, 3, 4 * MIB),
            status(2, 0, 3, 4 * MIB),
            "ok",
            "3 were dropped in the past",
        ),
        (DATAGRAM, (None, 512), None, None, "ok", "512 datagrams"),
        (DATAGRAM, (None, 10), None, None, "warning", "only 10 datagrams"),
        (
            DATAGRAM,
            (None, 512),
            status(1, 0, 0, MIB),
            status(2, 30000, 0, MIB),
            "warning",
            "30,000 come in a second",
        ),
    ],
)
def test_kernel_limits(
    tmp_path: Path, source: Any, limits: tuple[Any, Any], before: Any, after: Any, level: str, said: str
) -> None:
    """The kernel's limits against what is configured, and against what comes in."""
    (found,) = kernel.look(config(tmp_path, source), *limits, before, after)
    assert (found.level, said in found.what) == (level, True), found


def test_room_on_disk(tmp_path: Path) -> None:
    """A buffer that may grow larger than the disk is told."""
    assert next(room.look(config(tmp_path))).level == "ok"
    assert next(room.look(config(tmp_path, max_size=2**60))).level == "warning"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, as pytest's own are not."""
    with TemporaryDirectory(prefix="doctor-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
@pytest.mark.parametrize(
    ("mode", "uid", "gid", "folder", "may"),
    [
        (0o602, 0, 0, 0o711, True),
        (0o660, 0, 0, 0o711, False),
        (0o660, 0, 4244, 0o711, True),
        (0o606, 0, 4244, 0o711, False),
        (0o200, 4242, 0, 0o711, True),
        (0o466, 4242, 0, 0o711, False),
        (0o666, 0, 0, 0o700, False),
    ],
)
def test_the_way_is_followed_as_the_kernel_does(
    open_folder: Path, mode: int, uid: int, gid: int, folder: int, may: bool
) -> None:
    """Owner, group and others in this order, in each folder, also by a link; nothing keeps root away."""
    who = access.Person("somebody", 4242, 4243, frozenset({4243, 4244}))
    inner = open_folder / "inner"
    inner.mkdir(folder)
    file = inner / "file"
    file.touch()
    file.chmod(mode)
    os.chown(file, uid, gid)
    link = open_folder / "link"
    link.symlink_to("inner/../inner/file")
    assert (access.obstacle(str(file), who) == "") is may
    assert access.obstacle(str(link), who) == access.obstacle(str(file), who)
    assert access.obstacle(str(file), access.person("root")) == ""


def test_acls_are_read() -> None:
    """Named users and groups have what their entry and the mask allow."""
    entries = [(1, 6, 0), (2, 6, 4242), (4, 4, 0), (8, 6, 4244), (16, 6, 0), (32, 0, 0)]

    def acl(mask: int) -> bytes:
        packed = [
            struct.pack("<HHI", tag, mask if tag == 16 else bits, ident) for tag, bits, ident in entries
        ]
        return struct.pack("<I", 2) + b"".join(packed)

    by: Callable[[int, int, int], int] = lambda mask, uid, gid: access._by_acl(  # noqa: E731
        acl(mask), 0, access.Person("x", uid, gid, frozenset({gid}))
    )
    assert by(6, 4242, 1) == 6
    assert by(4, 4242, 1) == 4
    assert by(6, 1, 4244) == 6
    assert by(6, 1, 0) == 4
    assert by(6, 1, 1) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_dynamic_user_has_a_way_of_its_own(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd mounts a service's folder for it: that only root may enter the one around it is no obstacle."""
    private = open_folder / "private"
    state = private / "capture-agent"
    state.mkdir(parents=True)
    private.chmod(0o700)
    os.chown(state, 61234, 61234)
    who = access.person("61234")
    assert f"may not enter {private}" in access.obstacle(str(state), who)
    monkeypatch.setattr(access, "PRIVATE", str(private))
    assert access.obstacle(str(state), who) == ""
