"""Events with keys of their own in a real agent: what people are told of them, and what never is."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path

import httpx
import msgspec
import trio
from processes import configure, run, running
from sources import line
from test_worker import DOOR
from test_worker_keys import Keyed

from agent import config
from agent.buffer.sqlite import open_sqlite
from agent.clock import Clock
from agent.events import Read
from agent.metrics import Metrics
from agent.sink import Reply, Sink, serving

WRONG, POOR, RIGHT = "phc_wrong_0123456789", "an-old-poor-key-0123456789", "phc_right_0123456789"


async def fill(folder: Path, keys: Mapping[str | None, int]) -> None:
    """Put as many events of each key into the buffer of an agent that does not run."""
    async with open_sqlite(config.Buffer(path=str(folder / "buffer.db")), Metrics()) as buffer:
        for key, events in keys.items():
            decoded = DOOR.vouch([Read(line(1) * events, Clock().now())], events)
            chunks = [msgspec.structs.replace(chunk, key=key) for chunk in decoded.chunks]
            await buffer.put(chunks, decoded.tally)


async def scrape(folder: Path) -> str:
    transport = httpx.AsyncHTTPTransport(uds=str(folder / "admin.sock"))
    async with httpx.AsyncClient(transport=transport) as client:
        return (await client.get("http://agent/metrics")).text


async def test_held_keys_are_told_by_number_and_reason(tmp_path: Path) -> None:
    """Status, screen, metrics and log say how many and why, and none says which; a stop keeps what waits."""
    keyed = Keyed({WRONG: Reply(401, f"{WRONG} is not valid".encode()), POOR: Reply(402, POOR.encode())})
    async with serving(keyed.sink) as url:
        file = configure(tmp_path, url)
        await fill(tmp_path, {WRONG: 10, POOR: 20, RIGHT: 30, None: 40})
        async with running(file) as agent:
            await agent.until(delivered=70)
            with trio.fail_after(10):
                while len((status := await agent.status())["projects"][0]["held_keys"]) < 2:
                    await trio.sleep(0.02)
            (project,) = status["projects"]
            assert project["held"] is None
            assert project["delivered"] == 40
            assert project["requests"] == {"200": 1}
            assert [(held["reason"], held["keys"]) for held in project["held_keys"]] == [
                ("billing", 1),
                ("key", 1),
            ]
            for held in project["held_keys"]:
                assert 0 <= held["since_seconds"] < 10
                assert 30 < held["next_probe_seconds"] <= 75
            assert status["other"] == {
                "delivered": 30,
                "dead": {},
                "requests": {"200": 1, "401": 1, "402": 1},
            }
            assert status["books"]["balanced"]
            assert status["buffer"]["events"] == 30
            screen = await trio.to_thread.run_sync(lambda: run("status", "--config", str(file)).stdout)
            assert "1 key of clients held (key) for" in screen
            assert "keys of clients: 30 delivered, 0 dead; answers 200: 1, 401: 1, 402: 1" in screen
            metrics = await scrape(tmp_path)
            for sample in (
                'events_delivered_total{project="other"} 30.0',
                'requests_total{project="other",status="401"} 1.0',
                'delivery_held{project="other",reason="key"} 1.0',
                'delivery_held{project="other",reason="billing"} 1.0',
                'delivery_held{project="other",reason="rejected"} 0.0',
                'delivery_held{project="default",reason="key"} 0.0',
            ):
                assert f"capture_agent_{sample}" in metrics
            assert 'delivery_concurrency{project="other"}' not in metrics
            agent.send(signal.SIGTERM)
            with trio.fail_after(5):
                assert await agent.process.wait() == 0
            told = json.dumps(status) + screen + metrics + agent.log()
            assert not any(key[:12] in told for key in (WRONG, POOR, RIGHT))
        keyed.answers.clear()
        async with running(file) as agent:
            await agent.until(buffered=0)
    assert keyed.arrived() == {WRONG: 10, POOR: 20, RIGHT: 30, "phc_test": 40}


async def test_without_such_events_nothing_is_said_of_them(tmp_path: Path) -> None:
    """Who has no source that keeps keys sees no series and no line of them."""
    async with serving(Sink()) as url:
        file = configure(tmp_path, url)
        await fill(tmp_path, {None: 10})
        async with running(file) as agent:
            status = await agent.until(delivered=10)
            assert status["other"] is None
            assert "other" not in await scrape(tmp_path)
            assert "keys of clients" not in run("status", "--config", str(file)).stdout


async def test_keys_of_a_project_that_is_gone_wait_for_it(tmp_path: Path) -> None:
    """Its host is unknown, so they are held as unconfigured like its other events."""
    async with serving(Sink()) as url:
        file = configure(tmp_path, url)
        await fill(tmp_path, {RIGHT: 10})
        text = file.read_text()
        file.write_text(text.replace("[project]", '[project]\nname = "new"'))
        async with running(file) as agent:
            status = await agent.status()
            assert [(one["name"], one["held"] and one["held"]["reason"]) for one in status["projects"]] == [
                ("new", None),
                ("default", "unconfigured"),
            ]
        file.write_text(text)
        async with running(file) as agent:
            await agent.until(delivered=10)
