"""The agent as a real process before a sink, for tests."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import trio

COMMAND = (sys.executable, "-m", "agent")
# Without what the environment of the tests may say to an agent or a client.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("CAPTURE_AGENT_")
    and name.upper() not in {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
}


def run(
    *arguments: str, env: Mapping[str, str] | None = None, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [*COMMAND, *arguments],
        check=False,
        capture_output=True,
        text=True,
        input=text,
        timeout=60,
        env={**ENVIRONMENT, **(env or {})},
    )


class Running:
    """An agent's process and the folder in which everything of it is."""

    def __init__(self, process: trio.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.stream = str(folder / "events.sock")
        self.datagram = str(folder / "events.dgram")

    def send(self, number: signal.Signals) -> None:
        """Signal it."""
        self.process.send_signal(number)

    async def status(self) -> dict[str, Any]:
        """What it says of itself."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.folder / "admin.sock"))
        async with httpx.AsyncClient(transport=transport) as client:
            answer = await client.get("http://agent/status")
        document: dict[str, Any] = answer.json()
        return document

    async def until(self, **totals: int) -> dict[str, Any]:
        """The status once its books have these totals."""
        with trio.fail_after(30):
            while True:
                status = await self.status()
                if all(status["books"][name] == total for name, total in totals.items()):
                    return status
                await trio.sleep(0.02)

    async def reloaded(self, seconds: float = 30) -> dict[str, Any]:
        """SIGHUP; the status once the next agent tells it, or this one that it has refused."""
        status = await self.status()
        before = status["reload"]
        self.send(signal.SIGHUP)
        with trio.fail_after(seconds):
            while status["reload"] == before:
                await trio.sleep(0.02)
                try:
                    status = await self.status()
                except httpx.TransportError:
                    continue
        return status

    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "log").read_text()


def configure(folder: Path, url: str, more: str = "") -> Path:
    """A configuration whose every path is in the folder."""
    file = folder / "config.toml"
    file.write_text(
        f"""
        [project]
        host = "{url}"
        api_key = "phc_test"
        [[source]]
        kind = "unix_stream"
        path = "{folder}/events.sock"
        [[source]]
        kind = "unix_datagram"
        path = "{folder}/events.dgram"
        [[source]]
        kind = "udp"
        listen = "127.0.0.1:0"
        receive_buffer = "4 MiB"
        [admin]
        socket = "{folder}/admin.sock"
        listen = ""
        [delivery]
        linger = "50 ms"
        backoff_base = "50 ms"
        backoff_max = "200 ms"
        {"" if "[buffer]" in more else "[buffer]"}
        {more or f'path = "{folder}/buffer.db"'}
        """
    )
    return file


@asynccontextmanager
async def ended(process: trio.Process) -> AsyncIterator[None]:
    """A process for a block; what is left of it at the end is killed."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@asynccontextmanager
async def watching(command: str, config: Path, *arguments: str) -> AsyncIterator[trio.Process]:
    """A command that shows until it is stopped, beside an agent and in a pipe, for a block."""
    process = await trio.lowlevel.open_process(
        [*COMMAND, command, *arguments, "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    async with ended(process):
        yield process


@asynccontextmanager
async def started(
    config: Path,
    before: Sequence[str] = (),
    descriptors: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Running]:
    """An agent for a block; what is left of it at the end is killed. `before`: what runs it."""
    folder = config.parent
    with (folder / "log").open("ab") as log:
        process = await trio.lowlevel.open_process(
            [*before, *COMMAND, "run", "--config", str(config)],
            stdout=log,
            stderr=log,
            env={**ENVIRONMENT, **(env or {})},
            pass_fds=descriptors,
        )
    async with ended(process):
        yield Running(process, folder)


@asynccontextmanager
async def running(
    config: Path,
    before: Sequence[str] = (),
    descriptors: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Running]:
    """A ready agent for a block; what is left of it at the end is killed. `before`: what runs it."""
    async with started(config, before, descriptors, env) as agent:
        with trio.fail_after(30):
            while True:
                try:
                    await agent.status()
                    break
                except httpx.TransportError:
                    assert agent.process.poll() is None, agent.log()
                    await trio.sleep(0.02)
        yield agent


def parsed(text: str) -> list[dict[str, Any]]:
    """NDJSON as values."""
    return [json.loads(line) for line in text.splitlines()]
