"""The whole way of an SDK's events and flags: the unmodified package, a process, PostHog away and back."""

import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio
from processes import ENVIRONMENT, Running, configure, running

from agent import httpd
from agent.sink import Sink

FLAG = {"key": "beta", "enabled": True, "variant": None, "reason": None, "metadata": None}
FLAGS = {"flags": {"beta": FLAG}}
SDK = """
import json, sys
from posthog import Posthog
client = Posthog("phc_test", host=sys.argv[1], flush_interval=0.05, feature_flags_request_timeout_seconds=5)
uuid = client.capture("bought", distinct_id="user-1", properties={"n": 5})
flag = client.get_feature_flag("beta", "user-1", send_feature_flag_events=False)
client.shutdown()
print(json.dumps([str(uuid), flag]))
"""


@asynccontextmanager
async def posthog(sink: Sink, port: int) -> AsyncIterator[None]:
    """A stand-in for PostHog that has flags too, at this port for a block."""

    async def app(scope: httpd.Message, receive: httpd.Receive, send: httpd.Send) -> None:
        if not scope["path"].startswith("/flags"):
            await sink.app(scope, receive, send)
            return
        text = json.dumps(FLAGS).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    stop = trio.Event()
    with socket.create_server(("127.0.0.1", port)) as sock:
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(httpd.serve, app, [sock], shutdown=stop, max_connections=50, grace=0.1)
            )
            yield
            stop.set()


async def use_sdk(url: str) -> tuple[str, bool]:
    """What a program with the SDK tells: its event's uuid, and whether a flag is on."""
    done = await trio.run_process([sys.executable, "-c", SDK, url], capture_stdout=True, env=ENVIRONMENT)
    uuid, flag = json.loads(done.stdout)
    return uuid, flag


def http_address(status: dict[str, Any]) -> str:
    address: str = next(source["address"] for source in status["sources"] if source["kind"] == "http")
    return f"http://{address}"


async def test_an_sdk_notices_no_outage(tmp_path: Path) -> None:
    """Its events wait in the buffer and its flags are the last good ones; nothing of it is an error to it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = configure(tmp_path, f"http://127.0.0.1:{port}")
    text = config.read_text().replace("[admin]", '[[source]]\nkind = "http"\nlisten = "127.0.0.1:0"\n[admin]')
    config.write_text(text)
    sink = Sink()
    async with running(config) as agent:
        url = http_address(await agent.status())
        async with posthog(sink, port):
            first = await use_sdk(url)
            await agent.until(delivered=1)
        second = await use_sdk(url)
        assert (first[1], second[1]) == (True, True)
        assert await calls_of(agent) == {"passed": 1, "stale": 1, "unavailable": 0, "refused": 0}
        async with httpx.AsyncClient(base_url=url) as client:
            nobody = await client.post("/flags/?v=2", json={"token": "phc_test", "distinct_id": "user-2"})
            assert nobody.status_code == 503
            assert "retry-after" in nobody.headers
        async with posthog(sink, port):
            status = await agent.until(delivered=2)
        assert status["books"]["balanced"]
    assert [event.uuid for event in sink.events] == [first[0], second[0]]
    for event in sink.events:
        assert event.properties["$lib"] == "posthog-python"
        assert event.properties["n"] == 5


async def calls_of(agent: Running) -> dict[str, int]:
    """How the agent answered flag calls."""
    status = await agent.status()
    found: dict[str, int] = next(source["flag_calls"] for source in status["sources"] if source["flag_calls"])
    return found
