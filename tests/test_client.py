"""`agent.deliver.client`: against real sockets, every failure is a value, soon, and tells no secret."""

import gc
import gzip
import logging
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import pytest
import trio
import trio.testing
from certificates import Papers, make_papers, server_tls

from agent.config import Secret
from agent.deliver.client import BODY_START, Client, Reply
from agent.deliver.verdict import Refused, Retry

SECRET = "phc_secret-of-this-test"


class Settings(NamedTuple):
    """The delivery settings that a client reads."""

    timeout: float = 5.0
    concurrency: int = 4
    proxy: Secret = Secret("")
    ca_file: str = ""
    client_cert: str = ""
    client_key: str = ""


Serve = Callable[[trio.abc.Stream], Awaitable[None]]


class Server(NamedTuple):
    """A loopback server: its address, and what arrived, one entry per connection."""

    url: str
    port: int
    connections: list[bytearray]


@asynccontextmanager
async def serving(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Each connection is served by `serve`, once per request, until it closes the stream."""
    connections: list[bytearray] = []

    async def connected(stream: trio.SocketStream) -> None:
        wrapped = (
            stream if tls is None else trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
        )
        got = bytearray()
        connections.append(got)
        try:
            while await request(wrapped, got):
                await serve(wrapped)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with trio.open_nursery() as nursery:
        port = await listening(nursery, connected)
        scheme = "http" if tls is None else "https"
        yield Server(f"{scheme}://127.0.0.1:{port}/batch/", port, connections)
        nursery.cancel_scope.cancel()


async def listening(nursery: trio.Nursery, connected: Callable[[trio.SocketStream], Awaitable[None]]) -> int:
    """The port at which each connection of this machine's is served."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, connected, [listener])
    port: int = listener.socket.getsockname()[1]
    return port


async def request(stream: trio.abc.Stream, got: bytearray) -> bool:
    """Read one request with its body; False where the client has closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = await stream.receive_some(65536)
        if not part:
            return False
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
    while len(body) < length:
        body += await stream.receive_some(65536)
    got += head + b"\r\n\r\n" + body
    return True


def answering(reply: bytes) -> Serve:
    async def serve(stream: trio.abc.Stream) -> None:
        await stream.send_all(reply)

    return serve


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


OK = answer("200 OK", b'{"status": "Ok"}', "Content-Type: application/json")


async def post(url: str, settings: Settings | None = None, body: bytes = b"{}") -> Reply | Retry | Refused:
    async with Client(settings or Settings()) as client:
        return await client.post(url, (body,), {"Content-Type": "application/json", "X-Key": SECRET})


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


async def test_a_post_arrives_and_its_reply_comes_back() -> None:
    """Headers and body as given; status, lower-case headers and body back."""
    async with serving(answering(OK)) as server:
        reply = await post(server.url, body=b"x" * 300_000)
    assert isinstance(reply, Reply)
    assert (reply.status, reply.body_start) == (200, b'{"status": "Ok"}')
    assert reply.headers["content-type"] == "application/json"
    (got,) = server.connections
    head, _, body = bytes(got).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /batch/ HTTP/1.1\r\n")
    assert head.lower().count(b"\r\nx-key: ") == head.lower().count(b"\r\nhost: ") == 1
    assert body == b"x" * 300_000


async def test_an_answer_before_the_body_is_no_acceptance() -> None:
    """A server that says 200 to what it never read has taken nothing; a refusal it may give at once."""

    async def hasty(stream: trio.SocketStream) -> None:
        await stream.receive_some(100)
        await stream.send_all(OK)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        url = f"http://127.0.0.1:{await listening(nursery, hasty)}/batch/"
        reply = await post(url, body=b"x" * 20_000_000)
        assert isinstance(reply, Retry)
        nursery.cancel_scope.cancel()


async def test_a_redirect_to_no_address_is_a_redirect() -> None:
    """httpx trips over it; for us the host is wrong, and nothing is tried again at once."""
    reply = answer("302 Found", b"", "Location: http://[::1/")
    async with serving(answering(reply)) as server:
        refused = await post(server.url)
    assert isinstance(refused, Refused)
    assert refused.hold == "host"


async def test_a_connection_serves_many_posts() -> None:
    """One after the other they share a connection, and no cookie binds them to a server."""
    async with serving(answering(answer("200 OK", b"ok", "Set-Cookie: pod=7; Path=/"))) as server:
        async with Client(Settings()) as client:
            for _ in range(3):
                assert isinstance(await client.post(server.url, (b"{}",), {}), Reply)
        assert len(server.connections) == 1
        assert b"pod=7" not in server.connections[0]


async def test_a_body_is_not_kept() -> None:
    """Whatever becomes of a request, its body is free at once, not when the collector comes by."""
    body = bytes(200_000)
    before = sys.getrefcount(body)
    gc.disable()
    try:
        for serve in (answering(OK), reset, hang_up, answering(b"nonsense")):
            async with serving(serve) as server, Client(Settings()) as client:
                await client.post(server.url, (body[:1], body), {})
                assert sys.getrefcount(body) == before
                with trio.move_on_after(0):
                    await client.post(server.url, (body,), {})
                assert sys.getrefcount(body) == before
    finally:
        gc.enable()


async def test_redirects_are_not_followed() -> None:
    """Events go to the configured host or nowhere."""
    async with serving(answering(answer("307 Go", b"", "Location: /elsewhere"))) as server:
        reply = await post(server.url)
    assert isinstance(reply, Reply)
    assert (reply.status, reply.headers["location"]) == (307, "/elsewhere")
    assert len(server.connections) == 1


async def test_an_idle_connection_that_the_server_closed_is_no_outage() -> None:
    """The next post notices it and opens another."""

    async def once(stream: trio.abc.Stream) -> None:
        await stream.send_all(OK)
        await stream.aclose()

    async with serving(once) as server, Client(Settings()) as client:
        for _ in range(3):
            assert isinstance(await client.post(server.url, (b"{}",), {}), Reply)
            await trio.testing.wait_all_tasks_blocked(0.02)
        assert len(server.connections) == 3


async def test_a_name_that_moves_is_followed() -> None:
    """Each new connection asks for the name's addresses anew: a host that moves is found where it went.

    Where this machine's name has one address only, it goes away and comes back.
    """
    named = socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in named))
    reached: list[str] = []

    def at(address: str) -> Callable[[trio.SocketStream], Awaitable[None]]:
        async def connected(stream: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):
                while await request(stream, bytearray()):
                    reached.append(address)
                    await stream.send_all(OK)

        return connected

    async with Client(Settings()) as client:
        port = 0
        for address in addresses * 2:
            async with trio.open_nursery() as nursery:
                (listener,) = await trio.open_tcp_listeners(port, host=address)
                port = listener.socket.getsockname()[1]
                nursery.start_soon(trio.serve_listeners, at(address), [listener])
                reply = await client.post(f"http://localhost:{port}/batch/", (b"{}",), {})
                nursery.cancel_scope.cancel()
            assert isinstance(reply, Reply)
    assert reached == addresses * 2


async def test_a_long_body_is_read_only_to_its_bound() -> None:
    """A portal's endless page costs 64 KiB and no time."""

    async def endless(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
        while True:
            await stream.send_all(b"<html>" * 10_000)

    async with serving(endless) as server:
        reply = await post(server.url)
    assert isinstance(reply, Reply)
    assert len(reply.body_start) == BODY_START


@pytest.mark.parametrize("coding", ["gzip", "x-gzip"])
async def test_a_packed_body_is_opened_only_to_its_bound(coding: str) -> None:
    """A server that packs although not asked is understood, and a bomb is not."""
    bomb = gzip.compress(b"<html>" + b" " * 10_000_000)
    async with serving(answering(answer("200 OK", bomb, f"Content-Encoding: {coding}"))) as server:
        reply = await post(server.url)
    assert isinstance(reply, Reply)
    assert reply.body_start.startswith(b"<html> ")
    assert len(reply.body_start) == BODY_START


async def test_an_unreadable_coding_is_left_as_it_is() -> None:
    """A status is a verdict also where the body says nothing."""
    async with serving(answering(answer("400 Bad", b"not gzip", "Content-Encoding: gzip"))) as server:
        reply = await post(server.url)
    assert isinstance(reply, Reply)
    assert (reply.status, reply.body_start) == (400, b"not gzip")


async def test_a_body_that_breaks_off_leaves_the_status() -> None:
    """What was refused early, with a reset behind the answer, is still known as refused."""

    async def cut(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 99\r\n\r\nlength lim")
        await stream.aclose()

    async with serving(cut) as server:
        reply = await post(server.url)
    assert isinstance(reply, Reply)
    assert (reply.status, reply.body_start) == (413, b"length lim")


async def test_an_answer_before_the_body_was_read_is_heard() -> None:
    """A server that answers 413 and closes without reading the rest."""

    async def early(stream: trio.SocketStream) -> None:
        await stream.receive_some(100)
        await stream.send_all(answer("413 Too Large", b"too large", "Connection: close"))
        await stream.send_eof()
        with trio.move_on_after(2):
            while await stream.receive_some(65536):
                pass

    async with trio.open_nursery() as nursery:
        port = await listening(nursery, early)
        reply = await post(f"http://127.0.0.1:{port}/batch/", body=b"x" * 3_000_000)
        nursery.cancel_scope.cancel()
    assert isinstance(reply, Reply)
    assert reply.status == 413


async def never(stream: trio.abc.Stream) -> None:
    await trio.sleep_forever()


async def drip(stream: trio.abc.Stream) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\n")
    while True:
        await stream.send_all(b"X-Slow: 1\r\n")
        await trio.sleep(0.05)


async def reset(stream: trio.abc.Stream) -> None:
    assert isinstance(stream, trio.SocketStream)
    stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    await stream.aclose()


async def hang_up(stream: trio.abc.Stream) -> None:
    await stream.aclose()


FAILURES: dict[str, tuple[Serve, str, bool]] = {
    "no answer": (never, "no answer within 0.4 s", True),
    "an answer a byte at a time": (drip, "no answer within 0.4 s", True),
    "closed": (hang_up, "connection closed without an answer", True),
    "reset": (reset, "connection broken: Connection reset by peer", True),
    "not HTTP": (answering(b"220 smtp.example ESMTP\r\n\r\n"), "the answer was not HTTP", False),
    "half a head": (answering(b"HTTP/1.1 200 OK\r\nContent-"), "no answer within 0.4 s", True),
    "two lengths": (
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
        "the answer was not HTTP",
        False,
    ),
    "endless headers": (
        answering(b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * 200_000),
        "the answer was not HTTP",
        False,
    ),
}


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
async def test_every_failure_is_a_retry_with_a_reason(case: tuple[Serve, str, bool]) -> None:
    """No exception of httpx, h11 or the system comes out, and the timeout is for all of it."""
    serve, reason, cut = case
    async with serving(serve) as server:
        with trio.fail_after(3):
            verdict = await post(server.url, Settings(timeout=0.4))
    assert verdict == Retry(None, reason, cut=cut)


async def test_a_server_that_never_reads_is_left_in_time() -> None:
    """A body that the other side does not take is given up within the timeout."""
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    with listener:
        port = listener.getsockname()[1]
        verdict = await post(f"http://127.0.0.1:{port}/", Settings(timeout=0.4), body=b"x" * 20_000_000)
    assert verdict == Retry(None, "no answer within 0.4 s", cut=True)


async def test_nobody_listens() -> None:
    """A refused connection says so."""
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert await post(f"http://127.0.0.1:{port}/") == Retry(None, "cannot connect: Connection refused")


async def test_an_unknown_name_is_a_retry() -> None:
    """DNS may know it a moment later."""
    verdict = await post("http://no-such-host.invalid/")
    assert isinstance(verdict, Retry)
    assert verdict.reason.startswith("cannot connect")


@pytest.mark.parametrize("url", ["localhost/batch/", "ftp://127.0.0.1/", "http://[::1", "http://a..b/"])
async def test_an_address_that_is_none_holds_the_project(url: str) -> None:
    """Trying again would not help: somebody must mend the configuration."""
    verdict = await post(url)
    assert isinstance(verdict, Refused)
    assert verdict.hold == "host"


@pytest.mark.parametrize("value", [f"{SECRET}\n", f"{SECRET}é", f"{SECRET}\x00"])
async def test_a_header_that_cannot_be_sent_holds_and_tells_nothing(value: str) -> None:
    """The reason says that a header is wrong, not what it holds."""
    async with serving(answering(OK)) as server, Client(Settings()) as client:
        verdict = await client.post(server.url, (b"{}",), {"X-Key": value})
    assert isinstance(verdict, Refused)
    assert SECRET not in verdict.why


async def test_cancellation_passes() -> None:
    """A shutdown ends a post at once, and not as a verdict."""
    async with serving(never) as server, Client(Settings(timeout=60)) as client:
        with trio.move_on_after(0.1) as scope:
            await client.post(server.url, (b"{}",), {})
        assert scope.cancelled_caught


async def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a line for each request nor, at debug, its headers."""
    caplog.set_level(logging.DEBUG)
    async with serving(answering(OK)) as server:
        await post(server.url)
    assert SECRET not in caplog.text
    assert "127.0.0.1" not in caplog.text


# ---- the way out


async def test_a_proxy_is_used_where_one_is_configured() -> None:
    """A plain host is asked for through it, by its whole address."""
    async with serving(answering(OK)) as proxy:
        reply = await post(
            "http://posthog.example/batch/", Settings(proxy=Secret(f"http://127.0.0.1:{proxy.port}"))
        )
    assert isinstance(reply, Reply)
    assert proxy.connections[0].startswith(b"POST http://posthog.example/batch/ HTTP/1.1\r\n")


async def test_the_environments_proxy_and_its_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY is asked, and NO_PROXY's hosts are reached without it."""
    async with serving(answering(OK)) as proxy, serving(answering(OK)) as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        await post("http://posthog.example/batch/")
        await post(server.url)
    assert (len(proxy.connections), len(server.connections)) == (1, 1)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("407 Proxy Authentication Required", Refused("host", "the proxy would not connect: HTTP 407")),
        ("403 Forbidden", Refused("host", "the proxy would not connect: HTTP 403")),
        ("502 Bad Gateway", Retry(None, "the proxy could not connect: HTTP 502")),
        ("429 Slow Down", Retry(None, "the proxy could not connect: HTTP 429")),
    ],
)
async def test_what_a_proxy_says_is_not_what_posthog_says(status: str, expected: Retry | Refused) -> None:
    """Its 403 is not about the key, and its 502 passes."""
    async with serving(answering(answer(status))) as proxy:
        settings = Settings(proxy=Secret(f"http://user:{SECRET}@127.0.0.1:{proxy.port}"))
        assert await post("https://posthog.example/batch/", settings) == expected


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """A self-signed certificate for 127.0.0.1 that is its own authority."""
    return make_papers(tmp_path_factory.mktemp("tls"))


async def test_tls_is_trusted_by_the_configured_authority(papers: Papers) -> None:
    """With `ca_file` the server is known, without it it is not, and the reason says why."""
    async with serving(answering(OK), server_tls(papers)) as server:
        assert isinstance(await post(server.url, Settings(ca_file=papers.ca)), Reply)
        refused = await post(server.url)
    assert isinstance(refused, Retry)
    assert refused.reason.startswith("cannot connect: certificate verify failed: self")


async def test_a_client_certificate_is_shown(papers: Papers) -> None:
    """A server that demands one gets it."""
    tls = server_tls(papers)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(papers.ca)
    async with serving(answering(OK), tls) as server:
        with_cert = Settings(ca_file=papers.ca, client_cert=papers.cert, client_key=papers.key)
        assert isinstance(await post(server.url, with_cert), Reply)
        assert isinstance(await post(server.url, Settings(ca_file=papers.ca)), Retry)


async def test_plain_http_at_a_tls_port_is_a_retry(papers: Papers) -> None:
    """The wrong scheme is named in OpenSSL's words."""
    async with serving(answering(OK)) as server:
        verdict = await post(server.url.replace("http:", "https:"), Settings(timeout=1))
    assert isinstance(verdict, Retry)
