"""The status page in a real browser: its script runs within its policy, draws, and outlives its agent."""

import re
import shutil
import socket
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry
from test_page import HELD, document, text_of

from agent import config, httpd
from agent.admin import View, make_app
from agent.buffer.memory import open_memory
from agent.page.history import EVERY_SECONDS, History, Sample

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
# The page's own clock, which runs ahead while it waits for nothing: its first look and one more.
TWO_LOOKS_MS = 7000


class Served:
    """The pages at an address; `before` may answer in their place, by the path, and each path is noted."""

    def __init__(self, app: httpd.App) -> None:
        self.asked: list[str] = []
        self.before: Callable[[str], tuple[int, bytes] | None] = lambda _path: None
        self.address = ""
        self._app = app

    async def __call__(self, scope: httpd.Message, receive: httpd.Receive, send: httpd.Send) -> None:
        self.asked.append(scope["path"])
        if (answer := self.before(scope["path"])) is None:
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": answer[0], "headers": []})
        await send({"type": "http.response.body", "body": answer[1]})


@asynccontextmanager
async def serving(shown: dict[str, Any], history: History) -> AsyncIterator[Served]:
    """The pages of an agent whose status is `shown`."""
    async with open_memory(config.Buffer(path="/memory", kind="memory")) as buffer:
        last_at = 3600 * 1_000_000
        view = View(
            lambda _private: shown, lambda: "", CollectorRegistry(), buffer, lambda: history.document(last_at)
        )
        served = Served(make_app(view, private=False))
        with socket.create_server(("127.0.0.1", 0)) as sock:
            served.address = f"http://127.0.0.1:{sock.getsockname()[1]}/"
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    lambda task_status: httpd.serve(
                        served, [sock], max_connections=50, shutdown=stop, grace=0.1, task_status=task_status
                    )
                )
                yield served
                stop.set()


async def browse(served: Served, folder: Path, *flags: str) -> tuple[str, str]:
    """The document as the browser has it in the end, and what its console said."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", *flags, served.address]
    with trio.fail_after(60):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
    log = done.stderr.decode(errors="replace")
    return done.stdout.decode(), "\n".join(line for line in log.splitlines() if ":CONSOLE" in line)


def an_hour() -> History:
    """Ten events a second came in and eight went out; the agent slept for five minutes."""
    history = History()
    for number in range(3600 // EVERY_SECONDS + 1):
        seconds = number * EVERY_SECONDS
        if not 1500 < seconds < 1800:
            history.add(Sample(seconds * 1_000_000, 10 * seconds, 8 * seconds, 2 * seconds, float(seconds)))
    return history


def inside(dom: str, ident: str, tag: str) -> str:
    """What is in an element that holds none of its kind."""
    found = re.search(rf'<{tag}[^>]* ?id="{ident}"[^>]*>(.*?)</{tag}>', dom, re.DOTALL)
    assert found is not None, ident
    return found[1]


async def test_the_script_draws(tmp_path: Path) -> None:
    """Within its policy the script shows the hour as pictures, each with the same in words."""
    async with serving(document(project__held=HELD), an_hour()) as served:
        dom, console = await browse(served, tmp_path, "--dump-dom", f"--virtual-time-budget={TWO_LOOKS_MS}")
    assert console == ""
    assert served.asked.count("/figures") >= 2
    assert set(served.asked) == {"/", "/figures", "/history"}
    assert inside(dom, "rates-text", "p") == (
        "In: now 10, on average 10, at most 10 per second. Out: now 8, on average 8, at most 8 per second."
    )
    assert inside(dom, "depth-text", "p").startswith("Now 7,200, on average ")
    assert inside(dom, "age-text", "p").endswith("at most 60 min.")
    rates = inside(dom, "rates", "figure")
    # Both curves are lifted where the agent slept.
    assert re.findall(r'class="(curve[^"]*)"', rates) == ["curve in"] * 2 + ["curve out"] * 2
    assert "15 min" in rates
    assert "NaN" not in dom
    assert "Project default is held (key)" in text_of(inside(dom, "verdict", "p"))
    assert inside(dom, "connection", "p") == ""
    assert "<title>capture-agent: 1 to look at</title>" in dom


async def test_nothing_to_draw_yet(tmp_path: Path) -> None:
    """An agent that has just begun is shown without an error."""
    async with serving(document(), History()) as served:
        dom, console = await browse(served, tmp_path, "--dump-dom", "--virtual-time-budget=1000")
    assert console == ""
    assert inside(dom, "age-text", "p") == "The first interval is not over yet."
    assert "NaN" not in dom


async def test_an_agent_that_does_not_answer(tmp_path: Path) -> None:
    """The page says since when, keeps its figures, and asks on; of the agent that is back it says so."""
    async with serving(document(), an_hour()) as served:
        served.before = lambda path: (503, b"") if path == "/figures" else None
        dom, _ = await browse(served, tmp_path, "--dump-dom", f"--virtual-time-budget={TWO_LOOKS_MS}")
        assert re.search(r"The agent does not answer since \d\d:\d\d:\d\d\.", inside(dom, "connection", "p"))
        assert 'class="stale"' in dom
        assert "12,345" in inside(dom, "sources", "div")
        assert served.asked.count("/figures") >= 2
        served.before = lambda path: (503, b"") if served.asked.count(path) == 1 else None
        served.asked = ["/"]
        dom, _ = await browse(served, tmp_path, "--dump-dom", f"--virtual-time-budget={TWO_LOOKS_MS}")
        assert "The agent answers again" in inside(dom, "connection", "p")
        assert 'class="stale"' not in dom


async def test_a_page_of_another_version(tmp_path: Path) -> None:
    """A page that is open while the agent is replaced by another version asks for that one's page."""
    async with serving(document(), an_hour()) as served:
        served.before = lambda path: (
            (200, b'{"edition":"another","parts":{}}')
            if path == "/figures" and served.asked.count(path) == 1
            else None
        )
        dom, console = await browse(served, tmp_path, "--dump-dom", "--virtual-time-budget=2000")
    assert console == ""
    assert served.asked.count("/") == 2
    assert inside(dom, "rates-text", "p").startswith("In: now 10")


@pytest.mark.parametrize(("theme", "paper"), [(1, "f6f7f9"), (0, "0d1117")])
async def test_both_themes_at_the_width_of_a_phone(tmp_path: Path, theme: int, paper: str) -> None:
    """Who prefers a dark page gets one."""
    picture = tmp_path / "page.png"
    async with serving(document(), an_hour()) as served:
        flags = (f"--screenshot={picture}", "--window-size=390,2000", "--virtual-time-budget=1000")
        await browse(served, tmp_path, *flags, f"--blink-settings=preferredColorScheme={theme}")
    assert corner(picture.read_bytes()) == paper


def corner(png: bytes) -> str:
    """The colour of a picture's first pixel, which every filter of PNG leaves as it is."""
    data, at = b"", 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    return zlib.decompress(data)[1:4].hex()
