"""`top`: rates from one status document to the next, on a screen, in a pipe and as JSON."""

import json
import os
import pty
import signal
from pathlib import Path
from typing import Any

import trio
from processes import COMMAND, ENVIRONMENT, configure, run, running, watching

from agent.cli.pulse import KEPT, Pulse, sparkline
from agent.sink import Sink, serving


def document(received: int, delivered: int, *, held: str = "", other: int | None = None) -> dict[str, Any]:
    """What of a status document counts here."""
    return {
        "state": "running",
        "clock": {"now": "2026-11-24T10:00:00.000Z"},
        "buffer": {"events": received - delivered},
        "sources": [
            {
                "name": "app",
                "received": received,
                "accepted": received,
                "rejected": {"bad_uuid": 1, "missing_event": received // 10},
                "dropped": None,
            }
        ],
        "projects": [
            {
                "name": "eu",
                "delivered": delivered,
                "dead": {},
                "held": {"reason": held} if held else None,
            }
        ],
        "other": None if other is None else {"delivered": other, "dead": {}},
        "books": {
            "received": received,
            "accepted": received,
            "rejected": 0,
            "shed": {"expired": 2},
            "delivered": delivered,
            "dead": 0,
        },
    }


def test_rates_are_by_the_time_that_passed() -> None:
    """What was added, divided by the seconds between two documents; what is not known stays so."""
    pulse = Pulse()
    assert pulse.feel(document(1000, 0), 10.0) is None
    rates = pulse.feel(document(1200, 100, held="key", other=30), 12.0)
    assert rates is not None
    assert rates["seconds"] == 2.0
    assert rates["rates"] == {
        "received": 100.0, "accepted": 100.0, "rejected": 0.0, "shed": 0.0, "delivered": 50.0, "dead": 0.0
    }  # fmt: skip
    assert rates["sources"] == [
        {"name": "app", "received": 100.0, "accepted": 100.0, "rejected": 10.0, "dropped": None}
    ]
    assert rates["projects"] == [
        {"name": "eu", "delivered": 50.0, "dead": 0.0},
        {"name": "other", "delivered": 0.0, "dead": 0.0},  # its total is new, and says nothing yet
    ]
    assert rates["held"] == {"eu": "key"}


def test_totals_that_went_back_are_no_rate() -> None:
    """Another buffer's books begin anew: nothing is negative, and the next second is right again."""
    pulse = Pulse()
    pulse.feel(document(1000, 900), 0.0)
    fell = pulse.feel(document(10, 0), 1.0)
    assert fell is not None
    assert set(fell["rates"].values()) == {0.0}
    again = pulse.feel(document(20, 0), 2.0)
    assert again is not None
    assert again["rates"]["received"] == 10.0


def test_a_sparkline_is_as_high_as_its_highest() -> None:
    """The newest at the right, nothing where there was none, as wide as asked for."""
    assert sparkline([], 3) == "   "
    assert sparkline([0, 0], 3) == "   "
    assert sparkline([1, 4, 8], 3) == "▂▅█"
    assert sparkline([8, 0, 1, 4], 3) == " ▃█"
    assert sparkline([5], 0) == ""
    pulse = Pulse()
    for second in range(KEPT + 10):
        pulse.feel(document(second * second, 0), float(second))
    assert len(pulse.picture("source app received", 1000).strip()) == KEPT


async def _lines(process: trio.Process, count: int) -> list[str]:
    assert process.stdout is not None
    text = b""
    with trio.fail_after(30):
        while text.count(b"\n") < count:
            part = await process.stdout.receive_some()
            assert part, await process.stderr.receive_some() if process.stderr else b""
            text += part
    return text.decode().splitlines()


async def test_top_in_a_pipe(tmp_path: Path) -> None:
    """A line a second, or a JSON document; Ctrl-C is no error, and an agent that goes away is told."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            async with watching("top", config) as process:
                line, _ = await _lines(process, 2)
                assert "; in 0/s; out 0/s; " in line
                assert "unix_datagram 0/s" in line
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 0
            async with watching("top", config, "--json") as process:
                first, second = map(json.loads, await _lines(process, 2))
                assert [source["name"] for source in first["sources"]] == [
                    "unix_stream",
                    "unix_datagram",
                    "udp",
                ]
                assert second["at"] > first["at"]
                agent.send(signal.SIGTERM)
                assert await process.wait() == 3
                assert process.stderr is not None
                assert b"no agent is running" in await process.stderr.receive_some()
        done = await trio.to_thread.run_sync(lambda: run("top", "--config", str(config)))
        assert done.returncode == 3


async def test_top_on_a_dumb_terminal(tmp_path: Path) -> None:
    """A line a second, as it cannot be drawn on."""
    config = configure(tmp_path, "http://127.0.0.1:9")
    ours, theirs = pty.openpty()
    async with running(config):
        process = await trio.lowlevel.open_process(
            [*COMMAND, "top", "--config", str(config)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**ENVIRONMENT, "TERM": "dumb"},
        )
        os.close(theirs)
        said = b""
        with trio.fail_after(30):
            while said.count(b"\n") < 2:
                await trio.lowlevel.wait_readable(ours)
                said += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    os.close(ours)
    assert b"\x1b" not in said
    assert said.count(b"; buffer 0 events") >= 2


async def test_top_on_a_terminal(tmp_path: Path) -> None:
    """The screen has sources, projects, buffer and books, sits a restart out, and gives the terminal back."""
    config = configure(tmp_path, "http://127.0.0.1:9")
    ours, theirs = pty.openpty()
    screen = b""

    async def until(text: bytes) -> None:
        nonlocal screen
        screen = b""
        with trio.fail_after(30):
            while text not in screen:
                await trio.lowlevel.wait_readable(ours)
                screen += os.read(ours, 65536)

    async with running(config) as agent:
        process = await trio.lowlevel.open_process(
            [*COMMAND, "top", "--config", str(config)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "200", "LINES": "40"},
        )
        os.close(theirs)
        await until(b"the books balance")
        for part in (b"unix_datagram", b"the last minute", b"buffer", b"project"):
            assert part in screen
        agent.send(signal.SIGTERM)
        await agent.process.wait()
        await until(b"no answer at")
    async with running(config):
        await until(b"the books balance")
        process.send_signal(signal.SIGINT)
        await until(b"\x1b[?1049l")
        assert await process.wait() == 0
    os.close(ours)
