"""TCP: lines and acknowledgements as on Unix streams, in the clear or in TLS, and clients that stay away."""

import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from certificates import Papers, make_papers
from sources import line, taking, tcp

from agent.accept.peer import CertificateError
from agent.accept.source import bound

ASK = b'{"ack":true}\n'
# All that there are today: older devices have only the first.
VERSIONS = pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"]
)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """A self-signed certificate for 127.0.0.1 that is its own authority."""
    return make_papers(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def client(address: str) -> AsyncIterator[trio.SocketStream]:
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host.strip("[]"), int(port)) as connected:
        yield connected


def trusting(
    papers: Papers, *, shown: bool = False, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=papers.ca)
    context.maximum_version = version
    if shown:
        context.load_cert_chain(papers.cert, papers.key)
    return context


async def told(stream: trio.abc.ReceiveStream) -> list[dict[str, object]]:
    text = b""
    while some := await stream.receive_some(65536):
        text += some
    return [msgspec.json.decode(one) for one in text.splitlines()]


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
async def test_lines_are_acknowledged(listen: str) -> None:
    """Each line is on disk or refused by name."""
    try:
        taking_tcp = taking(tcp(listen=listen))
        async with taking_tcp as taken, client(taken.source.address) as sender:
            await sender.send_all(ASK + line(1) + b"nonsense\n" + line(2))
            await sender.send_eof()
            assert await told(sender) == [
                {"line": 2, "error": "malformed_json"},
                {"accepted": 2, "rejected": 1},
            ]
            assert [event["properties"]["n"] for event in await taken.events(2)] == [1, 2]
    except* OSError:
        pytest.skip("there is no IPv6 here")


async def test_a_client_that_was_cut_off() -> None:
    """Whole lines are taken, half a line of a reset connection is rejected as truncated."""
    async with taking(tcp()) as taken:
        async with client(taken.source.address) as sender:
            await sender.send_all(line(1) + b'{"event":"ha')
            await taken.settled(1)
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await taken.settled(2)
        assert taken.total("rejected", "truncated") == 1


async def test_a_silent_client_is_left() -> None:
    """After `idle_timeout` its place is free for another; what it sent is taken."""
    async with taking(tcp(idle_timeout=0.2, max_connections=1)) as taken:
        async with client(taken.source.address) as silent, client(taken.source.address) as other:
            await silent.send_all(line(1))
            await other.send_all(line(2))
            await taken.settled(2)
            assert await silent.receive_some(10) == b""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (b"", b""),
        (b'{"event":"ha', b""),
        (ASK, b'{"accepted":0,"rejected":0}\n'),
        (ASK + line(1), b'{"accepted":1,"rejected":0}\n'),
    ],
    ids=["nothing", "half a line", "asked", "told"],
)
async def test_who_knows_that_he_left_leaves_for_who_comes(text: bytes, answer: bytes) -> None:
    """Who has said nothing yet, and who asks for acknowledgements, if he is silent and holds most places."""
    async with taking(tcp(max_connections=2)) as taken:
        address = taken.source.address
        async with client(address) as silent, client(address) as heedless, client(address) as new:
            await heedless.send_all(line(2))
            await silent.send_all(text)
            await new.send_all(ASK + line(3))
            assert b'"accepted":1' in await new.receive_some(1000)
            assert await silent.receive_some(1000) == answer
            received = taken.total("received")
            await heedless.send_all(line(4))
            await taken.settled(received + 1)


async def test_who_would_write_into_the_void_keeps_his_place() -> None:
    """A TCP client that has said something and asks for nothing is not left, whoever waits."""
    async with taking(tcp(max_connections=1)) as taken:
        async with client(taken.source.address) as heedless, client(taken.source.address) as new:
            await heedless.send_all(line(1))
            await taken.settled(1)
            await new.send_all(ASK + line(2))
            with trio.move_on_after(2.5) as waited:
                await new.receive_some()
            assert waited.cancelled_caught
            await heedless.send_all(line(3))
            await taken.settled(2)
            await heedless.aclose()
            assert b'"accepted":1' in await new.receive_some()


async def test_dead_clients_are_found_by_the_kernel() -> None:
    """An accepted connection asks its peer from time to time whether it is there."""
    async with taking(tcp()) as taken, client(taken.source.address) as sender:
        await sender.send_all(line(1))
        await taken.settled(1)
        with bound(tcp()) as (listener, _, _):
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            with socket.create_connection(listener.getsockname()):
                listener.setblocking(True)
                accepted, _ = listener.accept()
                with accepted:
                    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


@VERSIONS
async def test_tls(papers: Papers, version: ssl.TLSVersion) -> None:
    """Lines and acknowledgements, encrypted; the end of a line of a client that says farewell is its end."""
    settings = tcp(tls_cert=papers.cert, tls_key=papers.key)
    async with taking(settings) as taken:
        async with client(taken.source.address) as plain:
            tls = trio.SSLStream(plain, trusting(papers, version=version), server_hostname="127.0.0.1")
            await tls.send_all(ASK + line(1) * 5000 + line(2))
            while True:
                text = await tls.receive_some(65536)
                if b'"accepted":5001' in text:
                    break
        assert taken.total("accepted") == 5001


async def test_a_tls_client_is_told_that_this_was_all(papers: Papers) -> None:
    """When the agent stops, what a client has sent is taken, in many records, and the answer has an end."""
    settings = tcp(tls_cert=papers.cert, tls_key=papers.key)
    async with taking(settings) as taken, client(taken.source.address) as plain:
        tls = trio.SSLStream(plain, trusting(papers), server_hostname="127.0.0.1")
        await tls.send_all(ASK + line(1) * 20_000)
        await taken.settled(1)
        taken.stop.set()
        assert (await told(tls))[-1] == {"accepted": 20_000, "rejected": 0}  # or it raises


@pytest.mark.parametrize("acked", [True, False])
async def test_half_a_line_in_tls_that_is_cut_off(papers: Papers, *, acked: bool) -> None:
    """Whole lines are taken, in one read with the end or not; half a line is rejected as truncated."""
    settings = tcp(tls_cert=papers.cert, tls_key=papers.key)
    async with taking(settings) as taken:
        async with client(taken.source.address) as plain:
            tls = trio.SSLStream(plain, trusting(papers), server_hostname="127.0.0.1")
            await tls.do_handshake()
            await tls.send_all((ASK if acked else b"") + line(1) * 1000 + b'{"event":"ha')
        await taken.settled(1001)
        assert (taken.total("accepted"), taken.total("rejected", "truncated")) == (1000, 1)


@pytest.mark.parametrize("acked", [True, False])
@pytest.mark.parametrize("secret", [True, False])
async def test_half_a_line_when_the_agent_stops(papers: Papers, *, acked: bool, secret: bool) -> None:
    """Who is told what arrived sends it again, so it is not told as refused; of others it is counted."""
    settings = tcp(tls_cert=papers.cert, tls_key=papers.key) if secret else tcp()
    async with taking(settings) as taken, client(taken.source.address) as plain:
        tls = trio.SSLStream(plain, trusting(papers), server_hostname="127.0.0.1") if secret else plain
        await tls.send_all((ASK if acked else b"") + line(1))
        await taken.settled(1)
        await tls.send_all(line(2)[:-1])
        await trio.sleep(0.1)
        taken.stop.set()
        assert (await told(tls))[-1:] == ([{"accepted": 1, "rejected": 0}] if acked else [])
        await taken.settled(1 if acked else 2)
        assert (taken.total("received"), taken.total("accepted")) == (1 if acked else 2, 1)


async def test_new_keys_again_and_again(papers: Papers) -> None:
    """A TLS client that asks for them with every event is served on, as long as it listens."""
    settings = tcp(tls_cert=papers.cert, tls_key=papers.key)
    async with taking(settings) as taken:
        command = ["openssl", "s_client", "-connect", taken.source.address, "-CAfile", papers.ca, "-tls1_3"]
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdin is not None
        assert process.stdout is not None
        async with process.stdin, process.stdout:
            said = b""
            while b"Verify return code: 0" not in said:
                said += await process.stdout.receive_some()
            await process.stdin.send_all(ASK)
            for number in range(1, 201):
                await trio.sleep(0.001)  # s_client(1) looks for an order where a read begins
                await process.stdin.send_all(line(number))
                while b'"accepted":%d,' % number not in said:
                    said += await process.stdout.receive_some()
                await process.stdin.send_all(b"K\n")  # update the keys, and have them updated
        await process.wait()
        assert taken.total("accepted") == 200


async def test_a_client_that_does_not_speak_tls_harms_nobody(papers: Papers) -> None:
    """It is left; the others go on, and nothing of it is counted as an event."""
    settings = tcp(tls_cert=papers.cert, tls_key=papers.key)
    async with taking(settings) as taken:
        async with client(taken.source.address) as stranger:
            await stranger.send_all(line(1))
            assert b"accepted" not in b"".join([some async for some in stranger])
        async with client(taken.source.address) as plain:
            tls = trio.SSLStream(plain, trusting(papers), server_hostname="127.0.0.1")
            await tls.send_all(line(2) + b'{"event":')
            await taken.settled(1)
        await taken.settled(2)
        assert (taken.total("accepted"), taken.total("rejected", "truncated")) == (1, 1)


async def test_a_client_that_never_agrees_on_tls_leaves_at_once(papers: Papers) -> None:
    """Where everybody is acknowledged there is still nobody to tell, and its place is free."""
    settings = tcp(tls_cert=papers.cert, tls_key=papers.key, ack=True, idle_timeout=0.1, max_connections=1)
    async with taking(settings) as taken:
        async with client(taken.source.address) as silent:
            assert await silent.receive_some(100) == b""
        async with client(taken.source.address) as plain:
            tls = trio.SSLStream(plain, trusting(papers), server_hostname="127.0.0.1")
            await tls.send_all(line(2))
            assert b'"accepted":1' in await tls.receive_some(1000)


@VERSIONS
async def test_clients_may_have_to_show_a_certificate(papers: Papers, version: ssl.TLSVersion) -> None:
    """Without one of the authority's nothing is taken."""
    settings = tcp(tls_cert=papers.cert, tls_key=papers.key, tls_client_ca=papers.ca)
    async with taking(settings) as taken:
        async with client(taken.source.address) as plain:
            stranger = trio.SSLStream(plain, trusting(papers, version=version), server_hostname="127.0.0.1")
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await stranger.send_all(line(1))
                    await stranger.receive_some(100)
        async with client(taken.source.address) as plain:
            context = trusting(papers, shown=True, version=version)
            known = trio.SSLStream(plain, context, server_hostname="127.0.0.1")
            await known.send_all(ASK + line(2))
            assert b'"accepted":1' in await known.receive_some(1000)
        assert taken.total("received") == 1


def test_certificates_that_cannot_be_used_are_told(papers: Papers, tmp_path: Path) -> None:
    """Before the agent is ready, with a hint."""
    for settings in (
        tcp(tls_cert=str(tmp_path / "missing.pem")),
        tcp(tls_cert=papers.cert, tls_key=papers.locked),
        tcp(tls_cert=papers.cert, tls_key=papers.key, tls_client_ca=papers.key),
    ):
        with pytest.raises(CertificateError) as caught, bound(settings):
            pass
        assert "PEM" in caught.value.hint


async def test_logfmt_lines_are_acknowledged() -> None:
    """As JSON lines are, each under its own reason where it is refused."""
    async with taking(tcp(format="logfmt", ack=True)) as taken, client(taken.source.address) as sender:
        await sender.send_all(b'event=signup distinct_id=u plan=pro n=5\nplan=pro\nevent=e distinct_id="\n')
        await sender.send_eof()
        assert await told(sender) == [
            {"line": 2, "error": "missing_event"},
            {"line": 3, "error": "malformed_logfmt"},
            {"accepted": 1, "rejected": 2},
        ]
        [event] = await taken.events(1)
        assert event["event"] == "signup"
        assert {"plan": "pro", "n": 5, "$lib": "capture-agent"}.items() <= event["properties"].items()
