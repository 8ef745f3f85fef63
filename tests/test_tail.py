"""`tail` and what is behind it: events watched as they pass, at nobody's cost."""

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import msgspec
import trio
import trio.testing
from processes import Running, configure, run, running, watching

from agent.accept.tap import QUEUE_BYTES, QUEUE_CHUNKS, Tap, View, watched
from agent.events import Chunk
from agent.globs import Names
from agent.pack import crc32, deflate
from agent.tail import MOST_WATCHERS, OPENED_A_SECOND, SHOWN_A_SECOND, Sampling

AWAY = "http://127.0.0.1:9"  # nobody listens there, so events wait


def chunk(events: int, *, name: str = "e", first: int = 0, **more: Any) -> Chunk:
    """Events that are told by their numbers."""
    lines = [b'{"event":"%b","distinct_id":"d","n":%d}' % (name.encode(), first + n) for n in range(events)]
    data = b",".join(lines)
    fields = {"project": "default", "received_at": 1_700_000_000_000_000, "boot": "", "monotonic": 0, **more}
    return Chunk(events=events, size=len(data), crc=crc32(data), packed=deflate(data), **fields)


async def seen(view: View, names: Names, count: int) -> list[dict[str, Any]]:
    """The first lines that a watcher gets."""
    found: list[dict[str, Any]] = []
    async for part in Sampling(view, names).parts():
        found += map(json.loads, part.split())
        if len(found) >= count:
            break
    return found


async def test_every_event_is_shown_where_there_are_few() -> None:
    """With its source, its project's name and its time; a key that a client sent is not shown."""
    tap, other = Tap("app"), Tap("other")
    with watched([tap]) as view:
        other.show([chunk(1)])
        tap.show([chunk(2), chunk(1, first=2, key="phc_secret")])
        lines = await seen(view, Names(()), 3)
    assert [line["event"]["n"] for line in lines] == [0, 1, 2]
    assert [(line["source"], line["project"]) for line in lines] == [("app", "default")] * 2 + [
        ("app", "other")
    ]
    assert lines[0]["received_at"] == "2023-11-14T22:13:20.000Z"
    assert "phc_secret" not in str(lines)


async def test_names_choose() -> None:
    """Only events of the names that were asked for, globs among them; the others are not left out."""
    tap = Tap("app")
    with watched([tap]) as view:
        tap.show(
            [chunk(5, name="page view"), chunk(1, name="signup", first=7), chunk(1, name="sign", first=9)]
        )
        lines = await seen(view, Names(["sign*"]), 2)
    assert [line["event"]["n"] for line in lines] == [7, 9]


async def test_under_load_some_are_shown_and_the_others_counted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """So many a second, chosen evenly; shown, left out and missed are together what passed."""
    tap = Tap("app")
    shown = left_out = missed = passed = 0
    with watched([tap]) as view:
        parts = Sampling(view, Names(())).parts()

        async def pass_by() -> None:
            nonlocal passed
            for _ in range(10):
                for part in range(20):
                    tap.show([chunk(1000, first=1000 * part)])
                    passed += 1000
                    await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_by)
            with trio.move_on_after(12):
                async for part in parts:
                    for line in map(json.loads, part.split()):
                        shown += "event" in line
                        left_out += line.get("left_out", 0)
                        missed += line.get("missed", 0)
    assert passed == 200_000 == shown + left_out + missed
    assert 9 * SHOWN_A_SECOND <= shown <= 12 * SHOWN_A_SECOND
    assert missed == 0


async def test_a_slow_watcher_misses_and_is_told(autojump_clock: trio.testing.MockClock) -> None:
    """What waits for it is bounded in chunks and bytes; what comes beyond is counted, and nobody waits."""
    tap, tiny = Tap("app"), chunk(1)
    with watched([tap]) as view:
        for _ in range(QUEUE_CHUNKS + 5):
            tap.show([tiny])
        assert view.missed == 5
        lines = await seen(view, Names(()), SHOWN_A_SECOND + 1)
        assert lines[-1] == {"left_out": QUEUE_CHUNKS - SHOWN_A_SECOND, "missed": 5}
    with watched([tap]) as view:
        large = msgspec.structs.replace(chunk(10), packed=bytes(QUEUE_BYTES + 1))
        tap.show([large, large, tiny])
        assert view.missed == 11  # the first was taken, however large
    assert tap.views == []


async def test_a_rare_name_is_looked_for_among_many(autojump_clock: trio.testing.MockClock) -> None:
    """Where names are asked for, more is opened than could be shown, up to a bound."""
    tap = Tap("app")
    with watched([tap]) as view:
        for _ in range(OPENED_A_SECOND // 1000):
            tap.show([chunk(999), chunk(1, name="rare")])
        tap.show([chunk(1000), chunk(1, name="rare")])
        lines = await seen(view, Names(["rare"]), OPENED_A_SECOND // 1000 + 1)
    assert [line["event"]["event"] for line in lines if "event" in line] == ["rare"] * (
        OPENED_A_SECOND // 1000
    )
    assert lines[-1] == {"left_out": 1001, "missed": 0}


async def _send(agent: Running, lines: bytes) -> None:
    async with await trio.open_unix_socket(agent.stream) as stream:
        await stream.send_all(b'{"ack":true}\n' + lines)
        await stream.send_eof()
        async for _ in stream:
            pass


async def _first_lines(agent: Running, process: trio.Process, events: bytes, count: int) -> list[str]:
    """What it prints of events that are sent until it has begun to print."""
    assert process.stdout is not None
    text = b""
    with trio.fail_after(30):
        while text.count(b"\n") < count:
            await _send(agent, events)
            with trio.move_on_after(0.2):
                text += await process.stdout.receive_some()
    return text.decode().splitlines()


async def test_tail_prints_what_passes(tmp_path: Path) -> None:
    """An event a line, nothing in it that a terminal could obey; Ctrl-C ends it, and that is no error."""
    event = b'{"event":"odd\\u001b[2J","distinct_id":"d","properties":{"plan":"pro"}}\n'
    async with running(configure(tmp_path, AWAY)) as agent:
        async with watching("tail", agent.folder / "config.toml") as process:
            line = (await _first_lines(agent, process, event, 1))[0]
            assert r" unix_stream odd\x1b[2J d " in line
            assert '"plan":"pro"' in line
            process.send_signal(signal.SIGINT)
            with trio.fail_after(10):
                assert await process.wait() == 0
            assert process.stderr is not None
            assert await process.stderr.receive_some() == b""


async def test_tail_chooses_and_prints_json(tmp_path: Path) -> None:
    """Only the sources and names that were asked for; when the agent goes away it says so and exits 3."""
    events = b'{"event":"other","distinct_id":"d"}\n{"event":"signup","distinct_id":"d"}\n'
    async with running(configure(tmp_path, AWAY)) as agent:
        async with watching(
            "tail", agent.folder / "config.toml", "--source", "unix_stream", "--event", "sign*", "--json"
        ) as process:
            lines = await _first_lines(agent, process, events, 2)
            assert {json.loads(line)["event"]["event"] for line in lines} == {"signup"}
            agent.send(signal.SIGTERM)
            await agent.process.wait()
            with trio.fail_after(10):
                assert await process.wait() == 3
            assert process.stderr is not None
            assert b"went away" in await process.stderr.receive_some()


async def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    """An unknown source is a usage error that names the others; without an agent the exit code is 3."""
    config = ("--config", str(configure(tmp_path, AWAY)))
    async with running(tmp_path / "config.toml"):
        done = await trio.to_thread.run_sync(lambda: run("tail", "--source", "nope", *config))
        assert done.returncode == 2
        assert "there are: unix_stream, unix_datagram, udp" in done.stderr
    done = await trio.to_thread.run_sync(lambda: run("tail", *config))
    assert done.returncode == 3


async def test_watchers_who_do_not_read_hold_nobody_up(tmp_path: Path) -> None:
    """As many as may watch, none of whom reads: events are taken as ever, and one more is told to wait."""
    flood = b"".join(b'{"event":"e%d","distinct_id":"d"}\n' % n for n in range(20_000))
    async with running(configure(tmp_path, AWAY)) as agent, trio.open_nursery() as nursery:
        watchers = []
        for _ in range(MOST_WATCHERS):
            stream = await trio.open_unix_socket(str(tmp_path / "admin.sock"))
            await stream.send_all(b"GET /tail HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
            watchers.append(stream)
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent", timeout=10) as client:
            assert (await client.get("/tail")).status_code == 503
            with trio.fail_after(30):
                for _ in range(5):
                    await _send(agent, flood)
            assert (await agent.status())["books"]["accepted"] == 100_000
            for stream in watchers:
                await stream.aclose()
            with trio.fail_after(10):
                status = 503
                while status == 503:  # those who left are forgotten
                    async with client.stream("GET", "/tail") as answer:
                        status = answer.status_code
        nursery.cancel_scope.cancel()
