"""`export` and `backup`, before a running agent and on the file of one that does not run."""

import json
import os
import signal
import socket
import sqlite3
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import httpx
import pytest
import trio
import trio.lowlevel
from processes import COMMAND, ENVIRONMENT, Running, configure, parsed, run, running
from prometheus_client import CollectorRegistry

from agent import config as settings
from agent.admin import View, make_app
from agent.buffer import BufferBroken, BufferBusy
from agent.buffer.file import Ownership
from agent.buffer.memory import open_memory
from agent.buffer.sqlite import open_sqlite
from agent.cli.backup import command as backup
from agent.events import Chunk, Tally
from agent.flow import TOTAL
from agent.metrics import Metrics
from agent.pack import crc32, deflate

# What an older copy begins with, as every database does, and not more of it.
OLDER = "SQLite format 3\0, an older one"
AWAY = "http://127.0.0.1:9"  # nobody listens there, so events wait


@asynccontextmanager
async def holding(folder: Path, *, events: int = 2500, more: str = "") -> AsyncIterator[Running]:
    """An agent whose buffer holds so many events."""
    async with running(configure(folder, AWAY, more)) as agent:
        await _send(agent, range(events))
        yield agent


async def _send(agent: Running, numbers: range) -> None:
    lines = b"".join(
        b'{"event":"e%d","distinct_id":"d","properties":{"odd":"1e2, \\"{"}}\n' % n for n in numbers
    )
    async with await trio.open_unix_socket(agent.stream) as stream:
        await stream.send_all(b'{"ack":true}\n' + lines)
        await stream.send_eof()
        async for _ in stream:
            pass


async def verb(agent: Running, *arguments: str) -> CompletedProcess[str]:
    """A command with the agent's configuration."""
    whole = (*arguments, "--config", str(agent.folder / "config.toml"))
    return await trio.to_thread.run_sync(lambda: run(*whole))


def noise() -> Chunk:
    """As large as one gets, so that a copy of some takes many steps."""
    return Chunk(
        project="default",
        events=1,
        size=1_000_000,
        crc=0,
        received_at=0,
        boot="",
        monotonic=0,
        packed=os.urandom(1_000_000),
    )


def _names(text: str) -> list[str]:
    return [event["event"] for event in parsed(text)]


async def test_what_waits_is_exported_and_still_waits(tmp_path: Path) -> None:
    """Every event, in its order, as it is, from the agent as from the file; `send` takes it as the same."""
    async with holding(tmp_path) as agent:
        done = await verb(agent, "export")
        assert (done.returncode, done.stderr) == (0, "")
        events = parsed(done.stdout)
        assert [event["event"] for event in events] == [f"e{n}" for n in range(2500)]
        assert len({event["uuid"] for event in events}) == 2500
        assert events[0]["properties"]["odd"] == '1e2, "{'
        assert (await agent.status())["buffer"]["events"] == 2500
        agent.send(signal.SIGTERM)
        await agent.process.wait()
        assert (await verb(agent, "export")).stdout == done.stdout
    async with running(tmp_path / "config.toml") as again:
        assert (await again.status())["buffer"]["events"] == 2500
        first = done.stdout.splitlines()[0]
        config = ("--config", str(tmp_path / "config.toml"))
        sent = await trio.to_thread.run_sync(lambda: run("send", "--stdin", *config, text=first))
        assert sent.returncode == 0, sent.stderr
        twin = parsed((await verb(again, "export")).stdout)[-1]
        assert [twin[name] for name in ("uuid", "timestamp")] == [events[0]["uuid"], events[0]["timestamp"]]


@pytest.mark.parametrize("running_agent", [True, False])
async def test_a_backup_is_a_buffer(tmp_path: Path, running_agent: bool) -> None:
    """It has the events and the books, nobody else may read it, and an agent can go on with it."""
    async with holding(tmp_path) as agent:
        if not running_agent:
            agent.send(signal.SIGTERM)
            await agent.process.wait()
        copy = tmp_path / "copy.db"
        copy.write_text(OLDER)
        done = await verb(agent, "backup", str(copy), "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == {"file": str(copy), "bytes": copy.stat().st_size}
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert [name for name in os.listdir(tmp_path) if "copy" in name] == ["copy.db"]
        with sqlite3.connect(copy) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert database.execute("SELECT sum(events) FROM chunk").fetchone() == (2500,)
        database.close()
    other = tmp_path / "other"
    other.mkdir()
    os.rename(copy, other / "buffer.db")
    async with running(configure(other, AWAY)) as restored:
        status = await restored.status()
        assert status["buffer"]["events"] == 2500
        assert status["books"]["balanced"]


async def test_a_copy_is_of_one_moment_and_holds_nobody_up(tmp_path: Path) -> None:
    """Events that come while it is made are in it with their books, or not at all; none waits for its end."""

    tally = Tally(source="app", received=1)
    async with open_sqlite(settings.Buffer(path=str(tmp_path / "b.db")), Metrics()) as buffer:
        for _ in range(60):
            await buffer.put([noise()], tally)
        before = buffer.stats().events
        async with trio.open_nursery() as nursery:

            async def put() -> None:
                while True:
                    await buffer.put([noise()], tally)

            nursery.start_soon(put)
            async with buffer.copied() as file:
                meanwhile = buffer.stats().events
                nursery.cancel_scope.cancel()
                (tmp_path / "copy.db").write_bytes(file.read())
        assert meanwhile > before + 1
        assert not [name for name in os.listdir(tmp_path) if name.startswith("b.db.copy")]
    with sqlite3.connect(tmp_path / "copy.db") as database:
        [held] = database.execute("SELECT count(*) FROM chunk").fetchone()
        [booked] = database.execute("SELECT total FROM books WHERE joint = 'accepted'").fetchone()
        assert before <= held <= meanwhile
        assert held == booked
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


async def test_the_buffer_closes_under_a_copy(tmp_path: Path) -> None:
    """A copy that is under way when the agent stops is given up: the agent does not wait for it."""
    begun = trio.Event()

    async with trio.open_nursery() as nursery:
        async with open_sqlite(settings.Buffer(path=str(tmp_path / "b.db")), Metrics()) as buffer:
            for _ in range(60):
                await buffer.put([noise()], Tally(source="app", received=1))

            async def copy() -> None:
                begun.set()
                with pytest.raises(BufferBusy, match="the agent stops"):
                    async with buffer.copied():
                        pass

            nursery.start_soon(copy)
            await begun.wait()
            await trio.lowlevel.checkpoint()
        Ownership(tmp_path / "b.db").close()  # nobody has the file any more


def _bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_a_backup_never_replaces_a_buffer(tmp_path: Path) -> None:
    """A live database is refused as the copy's place, and a place that cannot be written is told."""
    config = ("--config", str(configure(tmp_path, AWAY)))
    (tmp_path / "buffer.db").write_text("theirs")
    Ownership(tmp_path / "buffer.db").close()
    refused = run("backup", str(tmp_path / "buffer.db"), *config)
    assert refused.returncode == 2
    assert "is an agent's buffer" in refused.stderr
    assert (tmp_path / "buffer.db").read_text() == "theirs"
    assert not [name for name in os.listdir(tmp_path) if name.startswith("buffer.db.") and "lock" not in name]
    was = Path(config[1]).read_bytes()
    refused = run("backup", config[1], *config)
    assert (refused.returncode, Path(config[1]).read_bytes()) == (2, was)
    assert "is no database, and would be lost" in refused.stderr
    for name, make in (
        ("pipe", os.mkfifo),
        ("socket", _bound),
        ("link", partial(os.symlink, "nowhere")),
    ):
        make(tmp_path / name)
        before = os.lstat(tmp_path / name).st_ino
        refused = run("backup", str(tmp_path / name), *config)
        assert (refused.returncode, os.lstat(tmp_path / name).st_ino) == (2, before)
        assert f"{name}: is no file, and would be lost" in refused.stderr
    nowhere = run("backup", "/no/such/folder/copy.db", *config)
    assert nowhere.returncode == 1
    assert "cannot be written" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr


FILES = ("", "-wal", "-wal.kept", "-journal", ".lock", ".reserve", ".new", ".new-wal", ".again", ".damaged-1")


@pytest.mark.parametrize("end", FILES)
def test_a_backup_never_replaces_a_file_of_a_buffer(
    tmp_path: Path, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor its log, nor what else is named after it: by another spelling, through links, of another agent."""
    for name in ("folder", "other", "place"):
        (tmp_path / name).mkdir()
    folder, other, place = tmp_path / "folder", tmp_path / "other", tmp_path / "place"
    (tmp_path / "link").symlink_to(folder)
    (other / "name").symlink_to(folder / f"buffer.db{end}")
    (folder / "buffer.db").symlink_to(place / "data")
    config = str(configure(folder, AWAY))  # no agent has run with it
    Ownership(other / "their.db").close()
    before = sorted(tmp_path.rglob("*"))
    for name in (
        f"{folder}/buffer.db{end}",
        f"{other}/..//folder/./buffer.db{end}",
        f"{tmp_path}/link/buffer.db{end}",
        f"{other}/name",
        f"{other}/their.db{end}",
        f"{place}/data{end}",
    ):
        with pytest.raises(SystemExit) as refused:
            backup.main([name, "--config", config], standalone_mode=False)
        assert refused.value.code == 2, name
        assert "is an agent's buffer" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


async def test_a_buffer_in_memory_is_exported_but_not_copied(tmp_path: Path) -> None:
    """It says so, and how else; no half-made file is left."""
    async with holding(tmp_path, events=3, more='[buffer]\nkind = "memory"') as agent:
        assert _names((await verb(agent, "export")).stdout) == ["e0", "e1", "e2"]
        done = await verb(agent, "backup", str(tmp_path / "copy.db"))
        assert done.returncode == 1
        assert "in memory" in done.stderr
        assert "export" in done.stderr
        assert not [name for name in os.listdir(tmp_path) if "copy" in name]


async def test_no_copy_where_the_disk_is_the_buffers(tmp_path: Path) -> None:
    """A copy takes no room that the buffer may still need: try again later, and nothing is made."""
    chosen = settings.Buffer(path=str(tmp_path / "b.db"), max_size=2**60)
    async with open_sqlite(chosen, Metrics()) as buffer:
        with pytest.raises(BufferBroken, match="no room for a copy") as refused:
            async with buffer.copied():
                pass
        assert refused.value.exit_code == 75
        assert not [name for name in os.listdir(tmp_path) if "copy" in name]


@pytest.mark.parametrize("name", ["export", "backup"])
async def test_nobody_there_is_said(tmp_path: Path, name: str) -> None:
    """Neither an agent nor a buffer: exit code 3."""
    config = configure(tmp_path, AWAY)
    arguments = [name, *([str(tmp_path / "copy.db")] if name == "backup" else [])]
    done = await trio.to_thread.run_sync(lambda: run(*arguments, "--config", str(config)))
    assert done.returncode == 3
    assert "no agent is running" in done.stderr


async def test_an_export_has_only_what_was_there(tmp_path: Path) -> None:
    """Events that come while it is read are not in it; a reader who stops holds nobody up."""
    async with holding(tmp_path, events=20_000) as agent:
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent", timeout=30) as client:
            async with client.stream("GET", "/export") as answer:
                assert answer.headers[TOTAL] == "20000"
                await _send(agent, range(20_000, 20_010))
                assert (await agent.status())["books"]["accepted"] == 20_010
                text = b"".join([part async for part in answer.aiter_raw()])
        assert _names(text.decode()) == [f"e{n}" for n in range(20_000)]


async def test_a_damaged_chunk_is_left_out(tmp_path: Path) -> None:
    """What cannot be read is told in the log; the others are exported."""

    def chunk(number: int, events: bytes) -> Chunk:
        return Chunk(
            project="default",
            events=1,
            size=len(events),
            crc=number or crc32(events),
            received_at=0,
            boot="",
            monotonic=0,
            packed=deflate(events),
        )

    good = b'{"event":"good"}'
    async with open_memory(settings.Buffer(path="/memory", kind="memory")) as buffer:
        await buffer.put([chunk(1, b"{}"), chunk(0, good)], Tally(source="app", received=2))
        view = View(lambda _private: {}, lambda: "", CollectorRegistry(), buffer, dict)
        transport = httpx.ASGITransport(make_app(view, private=True))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
            assert (await client.get("/export")).content == good + b"\n"


async def test_the_address_has_neither() -> None:
    """What events contain is on the socket only."""
    async with open_memory(settings.Buffer(path="/memory", kind="memory")) as buffer:
        view = View(lambda _private: {}, lambda: "", CollectorRegistry(), buffer, dict)
        transport = httpx.ASGITransport(make_app(view, private=False))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
            for path in ("/export", "/backup", "/tail"):
                assert (await client.get(path)).status_code == 404


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
async def test_a_killed_backup_leaves_the_old_copy(tmp_path: Path, end: signal.Signals) -> None:
    """Cut off half way, by a person or by a timer, FILE is what it was, and nothing is beside it."""
    async with holding(tmp_path, events=1) as agent:
        copy = tmp_path / "copy.db"
        copy.write_text(OLDER)
        agent.send(signal.SIGSTOP)
        process = await trio.lowlevel.open_process(
            [*COMMAND, "backup", str(copy), "--config", str(tmp_path / "config.toml")], env=ENVIRONMENT
        )
        with trio.fail_after(30):
            while len([name for name in os.listdir(tmp_path) if name.startswith("copy.db.")]) == 0:
                await trio.sleep(0.02)
            process.send_signal(end)
            assert await process.wait() == 130
        agent.send(signal.SIGCONT)
        assert copy.read_text() == OLDER
        assert [name for name in os.listdir(tmp_path) if name.startswith("copy.db")] == ["copy.db"]


@pytest.mark.parametrize("running_agent", [True, False])
async def test_a_full_disk_is_told(tmp_path: Path, running_agent: bool) -> None:
    """Where the copy cannot be written, a line says so; the old one stays, and nothing else."""
    async with holding(tmp_path, events=20_000) as agent:
        if not running_agent:
            agent.send(signal.SIGTERM)
            await agent.process.wait()
        copy = tmp_path / "copy.db"
        copy.write_text(OLDER)
        # No file over 100 blocks of 1 KiB, and the signal of that ignored: writing fails.
        command = ["sh", "-c", 'trap "" XFSZ; ulimit -f 100; exec "$@"', "sh", *COMMAND, "backup", str(copy)]
        process = await trio.run_process(
            [*command, "--config", str(tmp_path / "config.toml")],
            check=False,
            capture_stderr=True,
            env=ENVIRONMENT,
        )
        assert process.returncode == 1
        assert b"Traceback" not in process.stderr
        assert b"  try: " in process.stderr
        assert copy.read_text() == OLDER
        assert [name for name in os.listdir(tmp_path) if "copy" in name] == ["copy.db"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_roots_files_stay_apart_from_the_agents(tmp_path: Path) -> None:
    """Root copies another user's buffer: the copy is root's, and what lies beside the buffer is theirs."""
    async with holding(tmp_path, events=3) as agent:
        agent.send(signal.SIGTERM)
        await agent.process.wait()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("buffer.db", "buffer.db.lock"):
        os.rename(tmp_path / name, theirs / name)
        os.chown(theirs / name, 65534, 65534)
    os.chown(theirs, 65534, 65534)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o711)  # so that they may enter their own
    file = tmp_path / "config.toml"
    file.write_text(file.read_text().replace(f"{tmp_path}/buffer.db", f"{theirs}/buffer.db"))
    ours = tmp_path / "ours"
    ours.mkdir(0o700)
    done = await verb(agent, "backup", str(ours / "copy.db"))
    assert done.returncode == 0, done.stderr
    assert (ours / "copy.db").stat().st_uid == 0
    assert {(theirs / name).stat().st_uid for name in os.listdir(theirs)} == {65534}


async def test_a_reader_who_has_enough_is_no_error(tmp_path: Path) -> None:
    """`export | head -1` ends without a traceback."""
    async with holding(tmp_path, events=20_000):
        command = f"{' '.join(COMMAND)} export --config {tmp_path}/config.toml | head -1"
        done = await trio.run_process(
            ["sh", "-c", command], check=False, capture_stdout=True, capture_stderr=True, env=ENVIRONMENT
        )
        assert _names(done.stdout.decode()) == ["e0"]
        assert b"Traceback" not in done.stderr
        assert b"BrokenPipe" not in done.stderr
