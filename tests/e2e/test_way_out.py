"""The way out of a real agent: through a real proxy and TLS, several projects, and silence when idle."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
from certificates import Papers, make_papers, server_tls
from processes import configure, run, running
from sources import line

from agent.sink import Fault, Reply, Request, Sink, serving

PROJECTS = """
    [[project]]
    name = "healthy"
    host = "{healthy}"
    api_key = "phc_healthy"
    [[project]]
    name = "wrong"
    host = "{wrong}"
    api_key = "phc_wrong"
    [[project]]
    name = "slow"
    host = "{slow}"
    api_key = "phc_slow"
    delivery = {{ timeout = "2 s", concurrency = 2 }}
"""


async def send(path: str, lines: bytes) -> None:
    """Send lines over a stream, and wait until all are acknowledged."""
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(b'{"ack":true}\n' + lines)
        await stream.send_eof()
        async for _ in stream:
            pass


@asynccontextmanager
async def behind_tls(papers: Papers, url: str) -> AsyncIterator[int]:
    """A port that demands a certificate, and passes what comes on to a plain one."""
    plain = int(url.rpartition(":")[2])

    async def pump(source: trio.abc.Stream, target: trio.abc.Stream) -> None:
        try:
            while part := await source.receive_some(65536):
                await target.send_all(part)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await source.aclose()
        await target.aclose()

    async def connected(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(
            stream, server_tls(papers, demanding=True), server_side=True, https_compatible=True
        )
        try:
            await tls.do_handshake()
        except trio.BrokenResourceError:
            return
        inner = await trio.open_tcp_stream("127.0.0.1", plain)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump, tls, inner)
            nursery.start_soon(pump, inner, tls)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, connected, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def proxy(folder: Path, target: int) -> AsyncIterator[tuple[int, Path]]:
    """A proxy that may connect to one port only: its own port, and its log."""
    if shutil.which("tinyproxy") is None:
        pytest.skip("tinyproxy is not installed")
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    file, log = folder / "tinyproxy.conf", folder / "tinyproxy.log"
    file.write_text(
        f"Port {port}\nListen 127.0.0.1\nTimeout 60\nAllow 127.0.0.1\nConnectPort {target}\n"
        f'LogFile "{log}"\nLogLevel Connect\n'
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.run_process, ["tinyproxy", "-d", "-c", str(file)], check=False))
        with trio.fail_after(10):
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.05)
        yield port, log
        nursery.cancel_scope.cancel()


async def test_through_a_proxy_and_tls(tmp_path: Path) -> None:
    """A proxy, an authority of one's own, a certificate to show, headers to add: every event arrives."""
    papers = make_papers(tmp_path)
    async with (
        serving(sink := Sink()) as url,
        behind_tls(papers, url) as tls,
        proxy(tmp_path, tls) as (port, log),
    ):
        config = configure(tmp_path, f"https://127.0.0.1:{tls}")
        config.write_text(
            config.read_text().replace(
                "[delivery]",
                f"""[delivery]
                proxy = "http://127.0.0.1:{port}"
                ca_file = "{papers.ca}"
                client_cert = "{papers.cert}"
                client_key = "{papers.key}"
                headers = {{ X-Team = "edge" }}
                historical_migration = true""",
            )
        )
        async with running(config) as agent:
            await send(agent.stream, b"".join(line(number) for number in range(200)))
            await agent.until(delivered=200)
        assert f"CONNECT 127.0.0.1:{tls}" in log.read_text()
    assert sorted(event.properties["n"] for event in sink.events) == list(range(200))
    assert {event.headers["x-team"] for event in sink.events} == {"edge"}
    assert all(event.historical_migration for event in sink.events)
    assert all(event.properties["$geoip_disable"] for event in sink.events)


@pytest.mark.parametrize("protocol", ["batch", "auto"])
async def test_projects_do_not_wait_for_each_other(tmp_path: Path, protocol: str) -> None:
    """One with a wrong key is held, one whose host never answers waits: the third is delivered at once."""
    stuck = True

    def never(_request: Request) -> Fault | None:
        return Fault.STALL if stuck else None

    def wrong_key(_request: Request) -> Reply | None:
        return Reply(401, b"API key is not valid: unknown") if stuck else None

    sinks = healthy, wrong, slow = Sink(), Sink(script=wrong_key), Sink(script=never)
    async with serving(healthy) as one, serving(wrong) as two, serving(slow) as three:
        config = configure(tmp_path, "http://127.0.0.1:9")
        text = config.read_text()
        begin, end = text.index("[project]"), text.index("[[source]]")
        kind = '[[source]]\nkind = "unix_stream"\n'
        names = ("healthy", "wrong", "slow")
        sources = "".join(f'{kind}name = "{n}"\nproject = "{n}"\npath = "{tmp_path}/{n}"\n' for n in names)
        text = text[:begin] + PROJECTS.format(healthy=one, wrong=two, slow=three) + sources + text[end:]
        config.write_text(text.replace("[delivery]", f'[delivery]\nprotocol = "{protocol}"'))
        async with running(config) as agent:
            for name in ("wrong", "slow", "healthy"):
                await send(f"{tmp_path}/{name}", b"".join(line(number) for number in range(100)))
            with trio.fail_after(5):
                await healthy.wait_for(100)
            with trio.fail_after(5):
                while True:
                    status = await agent.status()
                    if status["projects"][1]["held"] and status["projects"][0]["delivered"] == 100:
                        break
                    await trio.sleep(0.02)
            assert status["projects"][1]["held"]["reason"] == "key"
            assert status["buffer"]["events"] == 200
            assert {"phc_healthy"} == {event.api_key for event in healthy.events}
            stuck = False
            await slow.wait_for(100)
            for name in ("healthy", "healthy"):
                await send(f"{tmp_path}/{name}", line(1))
            await healthy.wait_for(102)
    assert [sink.taken for sink in sinks] == [102, 0, 100]


async def test_an_idle_agent_asks_for_nothing(tmp_path: Path) -> None:
    """Neither at the start nor between events does anything go out, by whichever protocol."""
    async with serving(sink := Sink()) as url:
        config = configure(tmp_path, url)
        config.write_text(config.read_text().replace("[delivery]", '[delivery]\nprotocol = "auto"'))
        async with running(config) as agent:
            await trio.sleep(1)
            assert sink.requests == 0
            await send(agent.stream, line(1))
            await agent.until(delivered=1)
            await trio.sleep(1)
            assert sink.requests == 1


async def test_status_says_when_it_tries_again(tmp_path: Path) -> None:
    """Who looks during a long `Retry-After` sees that the agent waits, why, and until when."""
    sink = Sink(script=lambda _request: Reply(503, b"busy", {"retry-after": "100"}))
    async with serving(sink) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            await send(agent.stream, line(1))
            with trio.fail_after(10):
                while (await agent.status())["projects"][0]["next_try_seconds"] is None:
                    await trio.sleep(0.02)
            (project,) = (await agent.status())["projects"]
            assert 90 < project["next_try_seconds"] <= 101
            assert project["held"] is None
            screen = await trio.to_thread.run_sync(lambda: run("status", "--config", str(config)))
    assert "next try in 1 min" in screen.stdout
    assert "HTTP 503: busy" in screen.stdout


async def test_the_pages_tell_the_clock(tmp_path: Path) -> None:
    """How far the host is from PostHog's time, and whether its clock was set, is in status and metrics."""
    async with serving(Sink()) as url:
        async with running(configure(tmp_path, url)) as agent:
            await send(agent.stream, line(1))
            status = await agent.until(delivered=1)
            assert status["clock"]["steps"] == 0
            assert status["clock"]["last_step"] is None
            assert abs(status["projects"][0]["clock_ahead_seconds"]) < 2
            assert status["projects"][0]["protocol"] == "batch"
            transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
            async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
                metrics = (await client.get("/metrics")).text
    assert "capture_agent_clock_steps_total 0.0" in metrics
    assert 'capture_agent_clock_ahead_seconds{project="default"}' in metrics
    assert 'capture_agent_events_warned_total{project="default"} 0.0' in metrics
