"""Serving an ASGI app over sockets that are already open."""

import logging
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing

from agent import httpd
from agent.httpd import Message, Receive, Send

LARGE = 50_000_000  # more than loopback's socket buffers take, so that a send must wait for its reader


class App:
    """Answers the length of the body; `/early` without reading it, `/big` at length, `/wait` when let go."""

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.go = trio.Event()
        self.whole_bodies = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.asked.set()
        path, size, more = scope["path"], 0, scope["path"] != "/early"
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        self.whole_bodies += 1
        if path == "/wait":
            await self.go.wait()
        if path == "/raise":
            raise ValueError("a mistake")
        body = b"x" * LARGE if path == "/big" else str(size).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def served(
    app: App, sockets: Sequence[socket.socket], *, grace: float = 5.0, max_body: int = 1_000_000
) -> AsyncIterator[trio.Event]:
    shutdown = trio.Event()
    serve = partial(
        httpd.serve, app, sockets, shutdown=shutdown, max_connections=50, grace=grace, max_body=max_body
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        yield shutdown
        shutdown.set()


def loopback() -> tuple[socket.socket, str]:
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_answers_on_every_kind_of_socket_at_once(tmp_path: Path) -> None:
    """One call serves IPv4, IPv6 and Unix listeners, and answers as soon as it says that it started."""
    path = str(tmp_path / "http.sock")
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    unix.listen()
    four, url = loopback()
    six = socket.create_server(("::1", 0), family=socket.AF_INET6)
    with unix, four, six:
        async with served(App(), [unix, four, six]):
            for where, transport in (
                (url, None),
                (f"http://[::1]:{six.getsockname()[1]}", None),
                ("http://agent", httpx.AsyncHTTPTransport(uds=path)),
            ):
                async with httpx.AsyncClient(transport=transport) as client:
                    assert (await client.post(where, content=b"abc")).text == "3"
        assert await trio.Path(path).exists()


async def test_the_sockets_stay_the_callers() -> None:
    """After a shutdown the caller's socket can be served again; no listener is inheritable meanwhile."""
    listener, url = loopback()
    with listener:
        for _ in range(2):
            async with served(App(), [listener]), httpx.AsyncClient() as client:
                assert (await client.get(url)).status_code == 200
                inheritable = [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_inheritable(fd)]
                assert not [fd for fd in inheritable if _is_listening(fd)]
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def _is_inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def _is_listening(fd: int) -> bool:
    if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


async def test_a_shutdown_lets_an_open_request_finish() -> None:
    """A request that is under way at the shutdown gets its answer."""
    listener, url = loopback()
    app, answers = App(), []

    async def ask(client: httpx.AsyncClient) -> None:
        answers.append((await client.get(url + "/wait")).status_code)

    with listener:
        async with (
            httpx.AsyncClient() as client,
            trio.open_nursery() as nursery,
            served(app, [listener]) as shutdown,
        ):
            nursery.start_soon(ask, client)
            await app.asked.wait()
            shutdown.set()
            await trio.testing.wait_all_tasks_blocked()
            app.go.set()
    assert answers == [200]


async def test_a_shutdown_ends_after_its_grace() -> None:
    """A request that is not done when the grace is over is cut off."""
    listener, url = loopback()
    app = App()

    async def ask(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.TransportError):
            await client.get(url + "/wait")

    with listener, trio.fail_after(5):
        async with (
            httpx.AsyncClient(timeout=60) as client,
            trio.open_nursery() as nursery,
            served(app, [listener], grace=0.1),
        ):
            nursery.start_soon(ask, client)
            await app.asked.wait()


@pytest.mark.parametrize("cancel", [False, True])
async def test_a_client_that_never_reads_holds_nothing_up(cancel: bool) -> None:
    """Neither a shutdown nor a cancellation waits for a client that does not read its answer."""
    listener, _ = loopback()
    app = App()
    with listener, socket.create_connection(listener.getsockname()) as client, trio.fail_after(5):
        client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        with trio.CancelScope() as scope:
            async with served(app, [listener], grace=60 if cancel else 0.1):
                await app.asked.wait()
                await trio.testing.wait_all_tasks_blocked()
                if cancel:
                    scope.cancel()


async def test_connections_without_a_request_are_closed_at_once() -> None:
    """An idle connection and one with half a request line do not use up the grace."""
    listener, _ = loopback()
    address = listener.getsockname()
    with (
        listener,
        socket.create_connection(address),
        socket.create_connection(address) as half,
        trio.fail_after(5),
    ):
        half.sendall(b"GET /")
        async with served(App(), [listener], grace=60):
            await trio.testing.wait_all_tasks_blocked()


async def _pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 100_000


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_a_413(chunked: bool) -> None:
    """A body that is too large, announced or not, never reaches the app whole; the next request is served."""
    listener, url = loopback()
    app = App()
    with listener:
        async with served(app, [listener]), httpx.AsyncClient() as client:
            content = _pieces(12) if chunked else b"x" * 1_000_001
            assert (await client.post(url, content=content)).status_code == 413
            assert app.whole_bodies == 0
            assert (await client.post(url, content=b"x" * 1_000_000)).text == "1000000"


async def test_an_app_may_answer_without_reading_the_body() -> None:
    """An answer that comes before a large body was read arrives, and leaves no task behind."""
    listener, url = loopback()
    with listener, trio.fail_after(5):
        async with served(App(), [listener], grace=60), httpx.AsyncClient() as client:
            assert (await client.post(url + "/early", content=b"x" * 900_000)).status_code == 200


async def test_only_errors_are_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Starting, answering and stopping say nothing anywhere; an app's exception is one error and a 500."""
    listener, url = loopback()
    caplog.set_level(logging.DEBUG)
    with listener:
        async with served(App(), [listener]), httpx.AsyncClient() as client:
            await client.get(url)
            assert not [record for record in caplog.records if not record.name.startswith("http")]
            assert (await client.get(url + "/raise")).status_code == 500
    errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in errors] == ["agent.httpd"]
    assert capfd.readouterr() == ("", "")


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
H2C = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"


@pytest.mark.parametrize(
    "text",
    [
        UPGRADE + b"\r\n",
        UPGRADE + b"Sec-WebSocket-Extensions: \xe9\r\n\r\n",
        UPGRADE + b"Sec-WebSocket-Protocol: \xe9\r\n\r\n",
        UPGRADE + b"\r\n\x81\x05hello\x88\x00",
        H2C + b"HTTP2-Settings: A\r\n\r\n",
        H2C + b"HTTP2-Settings: AAUAAAAA\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"PRI * HTTP/2.0\r\n\r\n",
        b"\xe9 / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_another_protocol_is_ignored_and_odd_bytes_end_only_their_client(text: bytes) -> None:
    """No upgrade is agreed to, whatever is asked for; the next client is answered."""
    listener, url = loopback()
    with listener, trio.fail_after(10):
        async with served(App(), [listener]), httpx.AsyncClient() as client:
            async with await trio.open_tcp_stream(*listener.getsockname()) as odd:
                await odd.send_all(text)
                await odd.send_eof()
                answer = b"".join([some async for some in odd])
            assert b"101" not in answer.partition(b"\r\n")[0]
            assert (await client.get(url)).status_code == 200


@pytest.mark.parametrize("unread", [0.2, inf])
async def test_who_never_reads_his_answer_is_left(unread: float) -> None:
    """After a while his place is another's, unless he may take his time."""
    listener, url = loopback()
    app = App()
    shutdown = trio.Event()
    with listener, socket.create_connection(listener.getsockname()) as client, trio.fail_after(20):
        client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        async with trio.open_nursery() as nursery:
            serve = partial(
                httpd.serve, app, [listener], shutdown=shutdown, max_connections=1, unread=unread, grace=0
            )
            await nursery.start(serve)
            await app.asked.wait()
            with trio.move_on_after(3 if unread == inf else 20) as patience:
                async with httpx.AsyncClient(timeout=60) as other:
                    assert (await other.get(url)).status_code == 200
            assert patience.cancelled_caught == (unread == inf)
            shutdown.set()


async def test_who_asks_on_and_on_keeps_nobody_out() -> None:
    """A client that asks before it is answered is never silent; its place is another's all the same."""
    listener, url = loopback()

    async def slow(scope: Message, receive: Receive, send: Send) -> None:
        await trio.sleep(0.1)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    shutdown = trio.Event()
    with listener, socket.create_connection(listener.getsockname()) as client, trio.fail_after(20):
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(httpd.serve, slow, [listener], shutdown=shutdown, max_connections=1, grace=0)
            )
            async with httpx.AsyncClient(timeout=60) as other:
                assert (await other.get(url)).status_code == 204
            shutdown.set()


async def test_a_length_that_is_told_twice_is_refused() -> None:
    """What follows such a request is never taken for another one."""
    listener, _ = loopback()
    app = App()
    with listener, trio.fail_after(10):
        async with served(app, [listener]), await trio.open_tcp_stream(*listener.getsockname()) as client:
            lengths = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
            await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\n" + lengths + b"0\r\n\r\n")
            answer = b"".join([some async for some in client])
            assert answer.startswith(b"HTTP/1.1 400")
            assert not app.asked.is_set()


async def test_what_nobody_foresaw_ends_one_client() -> None:
    """An exception in the server itself is no more than the end of a connection."""
    listener, url = loopback()

    class Breaking(App):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            if scope["path"] == "/break":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"a\n", b"b")]})
            await super().__call__(scope, receive, send)

    with listener, trio.fail_after(10):
        async with served(Breaking(), [listener]), httpx.AsyncClient() as client:
            for _ in range(3):
                with suppress(httpx.TransportError):
                    await client.get(url + "/break")
            assert (await client.get(url)).status_code == 200


async def test_a_client_that_has_left_gives_its_place_back_at_once() -> None:
    """As many as come, one after the other, are served by as many places as there are."""
    listener, url = loopback()
    with listener, trio.fail_after(20):
        async with served(App(), [listener]):
            for _ in range(120):  # beyond the 50 places
                async with await trio.open_tcp_stream(*listener.getsockname()):
                    pass
            async with httpx.AsyncClient() as client:
                assert (await client.get(url)).status_code == 200
