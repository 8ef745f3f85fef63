"""`dead-letter`, before a running agent and on the file of one that does not run."""

import gzip
import json
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import httpx
import pytest
import trio
from processes import Running, configure, parsed, run, running
from prometheus_client import CollectorRegistry

from agent import config as settings
from agent.admin import View, make_app
from agent.buffer.memory import open_memory
from agent.cli.dead_letter import WIDTH, _line
from agent.cli.letters import Letter
from agent.sink import Reply, Request, Sink, serving

UUID = "00000000-0000-4000-8000-000000000001"
POISON = b'{"event":"odd\\u001b[2J","distinct_id":"d","uuid":"%b","properties":{"n":1e999}}\n' % UUID.encode()


async def dead_letter(config: Path, *arguments: str, text: str = "") -> CompletedProcess[str]:
    """A sub-command of `dead-letter`."""
    whole = ("dead-letter", *arguments, "--config", str(config))
    return await trio.to_thread.run_sync(lambda: run(*whole, text=text))


class Refusing(NamedTuple):
    """An agent before a sink that refuses what holds `1e999`, until told otherwise."""

    agent: Running
    sink: Sink
    config: Path

    async def verb(self, *arguments: str, text: str = "") -> CompletedProcess[str]:
        """A sub-command of `dead-letter`."""
        return await dead_letter(self.config, *arguments, text=text)

    async def listed(self) -> list[dict[str, Any]]:
        """What `list --json` says."""
        done = await self.verb("list", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found


@asynccontextmanager
async def refusing(folder: Path) -> AsyncIterator[Refusing]:
    """With one dead letter and nine events delivered."""
    async with serving(sink := Sink()) as url:
        config = configure(folder, url)
        async with running(config) as agent:
            with trio.fail_after(60):
                await _send(agent, b'{"event":"e","distinct_id":"d"}\n' * 9 + POISON)
                await agent.until(delivered=9, dead=1)
                yield Refusing(agent, sink, config)


async def _send(agent: Running, lines: bytes) -> None:
    async with await trio.open_unix_socket(agent.stream) as stream:
        await stream.send_all(b'{"ack":true}\n' + lines)
        await stream.send_eof()
        async for _ in stream:
            pass


async def test_what_was_refused_can_be_looked_at(tmp_path: Path) -> None:
    """`list` and `show` tell which event, why and when; what a terminal could obey is escaped."""
    async with refusing(tmp_path) as at:
        (letter,) = await at.listed()
        assert (letter["uuid"], letter["event"], letter["project"]) == (UUID, "odd\x1b[2J", "default")
        assert letter["reason"] == "rejected"
        assert letter["other_key"] is False
        assert letter["attempts"] >= 2
        assert letter["at"].endswith("Z")
        assert "body" not in letter
        plain = await at.verb("list")
        assert "\x1b" not in plain.stdout
        assert "failed to parse request" in plain.stdout
        shown = await at.verb("show", str(letter["id"]))
        assert shown.returncode == 0
        assert UUID in shown.stdout
        assert '"n": 1e999' in shown.stdout
        whole = json.loads((await at.verb("show", str(letter["id"]), "--json")).stdout, parse_float=str)
        assert whole["body"]["properties"]["n"] == "1e999"
        missing = await at.verb("show", "4711")
        assert missing.returncode == 1
        assert "4711" in missing.stderr


def test_long_names_leave_the_reason_its_room() -> None:
    """A line of the list says why, whatever the event is called."""
    at = "2026-11-24T10:00:00.000Z"
    letter = Letter(
        id=1, project="p", event="e" * 200, distinct_id="d" * 200, reason="rejected", detail="its words",
        attempts=1, other_key=False, at=at, received_at=at, uuid=UUID,
    )  # fmt: skip
    line = _line(letter)
    assert line.endswith("…: rejected: its words")
    assert len(line) <= WIDTH


async def test_a_replay_keeps_the_uuid_and_the_history(tmp_path: Path) -> None:
    """Refused again it is a dead letter again, with what went before; taken it is delivered, and counted."""
    async with refusing(tmp_path) as at:
        (before,) = await at.listed()
        assert (await at.verb("replay")).stdout == "replayed 1 of 1\n"
        status = await at.agent.until(delivered=9, dead=2)
        assert (status["books"]["replayed"], status["books"]["balanced"]) == (1, True)
        (after,) = await at.listed()
        assert after["uuid"] == UUID
        assert after["id"] > before["id"]
        assert after["attempts"] > before["attempts"]
        shown = json.loads((await at.verb("show", str(after["id"]), "--json")).stdout)
        assert [earlier["at"] for earlier in shown["earlier"]] == [before["at"]]

        taken: list[bytes] = []

        def take(request: Request) -> Reply:
            taken.append(request.body)
            return Reply(200, b'{"status":"Ok"}')

        at.sink._script = take
        twice = await at.verb("replay", str(after["id"]), str(after["id"]), "--json")
        assert (twice.stdout, twice.returncode) == ('{"replayed":1}\n', 0)
        status = await at.agent.until(delivered=10)
        assert (status["books"]["replayed"], status["books"]["balanced"]) == (2, True)
        assert status["buffer"]["dead_letters"] == 0
        assert len(taken) == 1


async def test_without_an_agent_the_file_is_opened(tmp_path: Path) -> None:
    """All of it works on the buffer of an agent that does not run; the next one knows what was done."""
    async with refusing(tmp_path) as at:
        at.agent.send(signal.SIGTERM)
        await at.agent.process.wait()
        (letter,) = await at.listed()
        exported = (await at.verb("export")).stdout
        (event,) = parsed(exported.replace("1e999", "999"))
        assert event["uuid"] == UUID
        assert event["dead_letter"]["id"] == letter["id"]
        assert (await at.verb("replay")).returncode == 0
        assert await at.listed() == []
        taken = trio.Event()

        def take(_: Request) -> Reply:
            taken.set()
            return Reply(200)

        at.sink._script = take
        async with running(at.config) as agent:
            await taken.wait()
            status = await agent.until(delivered=10, dead=1, replayed=1)
            assert status["books"]["balanced"]
            # What was exported and mended can be sent.
            mended = exported.replace("1e999", "999")
            done = await trio.to_thread.run_sync(
                lambda: run("send", "--stdin", "--config", str(at.config), text=mended)
            )
            assert done.returncode == 0, done.stderr
            await agent.until(delivered=11)


async def test_a_letter_with_a_key_of_its_own_says_so(tmp_path: Path) -> None:
    """`list`, `show` and `export` tell it apart and never tell the key; a replay goes out with that key."""
    keys: list[str] = []
    sink = Sink()

    def note(request: Request) -> None:
        keys.append(json.loads(gzip.decompress(request.body))["api_key"])

    async with serving(sink) as url:
        config = configure(tmp_path, url)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        source = f'[[source]]\nkind = "http"\nlisten = "127.0.0.1:{port}"\n'
        config.write_text(config.read_text() + source)
        event = b'{"event":"e","distinct_id":"d","properties":{"n":%b}}'
        body = b'{"api_key":"phc_strange","batch":[%b,%b]}' % (event % b"1e999", event % b"1")
        async with running(config) as agent:
            with trio.fail_after(60):
                async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=10)) as sdk:
                    answer = await sdk.post(f"http://127.0.0.1:{port}/batch/", content=body)
                assert answer.status_code == 200
                await agent.until(delivered=1, dead=1)
                (letter,) = json.loads((await dead_letter(config, "list", "--json")).stdout)
                assert (letter["project"], letter["other_key"]) == ("default", True)
                listed = (await dead_letter(config, "list")).stdout
                exported = (await dead_letter(config, "export")).stdout
                shown = (await dead_letter(config, "show", str(letter["id"]))).stdout
                assert "default (with another key than its own)" in listed
                assert "default (with another key than its own)" in shown
                assert '"other_key":true' in exported
                assert "phc_strange" not in listed + exported + shown + str(letter)
                sink._script = note
                await dead_letter(config, "replay")
                await agent.until(delivered=1, dead=2)
                assert set(keys) == {"phc_strange"}


async def test_purging_asks_first(tmp_path: Path) -> None:
    """Without IDs it wants a person's word or `--all`; what is gone is counted."""
    async with refusing(tmp_path) as at:
        refused = await at.verb("purge")
        assert refused.returncode == 2
        assert "--all" in refused.stderr
        unknown = await at.verb("purge", "4711")
        assert (unknown.returncode, unknown.stdout) == (1, "purged 0 of 1\n")
        assert len(await at.listed()) == 1
        assert (await at.verb("purge", "--all")).stdout == "purged 1 of 1\n"
        empty = await at.verb("list")
        assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", "there are no dead letters\n")
        assert (await at.verb("purge", "1", "--all")).returncode == 2
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
            assert "capture_agent_dead_purged_total 1.0" in (await client.get("/metrics")).text


async def test_nobody_there_is_said(tmp_path: Path) -> None:
    """Neither an agent nor a buffer: exit code 3."""
    config = configure(tmp_path, "http://127.0.0.1:9")
    done = await trio.to_thread.run_sync(lambda: run("dead-letter", "list", "--config", str(config)))
    assert done.returncode == 3
    assert "no agent is running" in done.stderr


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/dead-letters?after=x", b"", 400),
        ("GET", "/dead-letters/1", b"", 404),
        ("GET", "/dead-letters/-1", b"", 404),
        ("GET", f"/dead-letters/{2**63}", b"", 404),
        ("GET", f"/dead-letters?after={2**63}", b"", 200),
        ("GET", f"/dead-letters?after={'9' * 5000}", b"", 400),
        ("POST", "/dead-letters/replay", b'{"ids": [%d, %d]}' % (2**63, -(2**70)), 200),
        ("POST", "/dead-letters/replay", b"{}", 400),
        ("POST", "/dead-letters/purge", b'{"ids": "all"}', 400),
        ("POST", "/dead-letters/purge", b"{}", 400),
        ("POST", "/dead-letters/purge", b'{"upto": "all"}', 400),
        ("POST", "/dead-letters/purge", b'{"upto": %d}' % (2**70), 200),
        ("GET", "/dead-letters/purge", b"", 405),
    ],
)
async def test_the_pages_refuse_what_they_do_not_know(
    tmp_path: Path, method: str, path: str, body: bytes, status: int
) -> None:
    """A wrong request is told so, and does nothing; an id beyond SQLite's integers ends no agent."""
    async with running(configure(tmp_path, "http://127.0.0.1:9")):
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
            assert (await client.request(method, path, content=body)).status_code == status
            assert (await client.get("/livez")).status_code == 200


async def test_the_address_has_no_dead_letters() -> None:
    """What events contain, and what changes anything, is on the socket only."""
    async with open_memory(settings.Buffer(path="/memory", kind="memory")) as buffer:
        view = View(lambda _private: {}, lambda: "", CollectorRegistry(), buffer, dict)
        for private, status in ((True, 200), (False, 404)):
            transport = httpx.ASGITransport(make_app(view, private=private))
            async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
                assert (await client.get("/dead-letters")).status_code == status
