"""The doctor as a process: with a running agent, without one, and with what may be wrong around it."""

import json
import os
import shutil
import signal
import socket
import sqlite3
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from processes import configure, run, running
from sources import line
from supervisor import Supervisor

from agent.buffer.file import APPLICATION_ID
from agent.config import Buffer
from agent.doctor import store
from agent.sink import Reply, Sink, serving

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
NOWHERE = "http://127.0.0.1:9"  # nobody serves discard (RFC 863) any more


class Report:
    """What the doctor said."""

    def __init__(self, code: int, text: str, stderr: str) -> None:
        self.code, self.text, self.stderr = code, text, stderr
        self.document: dict[str, Any] = json.loads(text)

    def told(self, check: str) -> list[tuple[str, str]]:
        """Level and words of the findings of one check."""
        return [
            (told["level"], f"{told['where']}: {told['what']}")
            for told in self.document["findings"]
            if told["check"] == check
        ]

    def one(self, check: str) -> tuple[str, str]:
        """The only one."""
        (found,) = self.told(check)
        return found


async def examined(file: Path, *arguments: str) -> Report:
    """The doctor's report; whatever is wrong has a next step."""
    call = partial(run, "doctor", "--json", "--config", str(file), *arguments)
    done = await trio.to_thread.run_sync(call)
    report = Report(done.returncode, done.stdout, done.stderr)
    assert report.document["healthy"] is (done.returncode == 0)
    for told in report.document["findings"]:
        assert (told["level"] == "ok") == (told["hint"] == ""), told
    return report


async def test_a_healthy_agent_has_no_errors(tmp_path: Path) -> None:
    """Of an agent that works everything is told, nothing is an error, and no event is sent."""
    sink = Sink()
    async with serving(sink) as url:
        file = configure(tmp_path, url)
        async with running(file) as agent:
            report = await examined(file)
            assert agent.process.poll() is None
    assert report.code == 0, report.text
    assert report.told("agent")[0][0] == "ok"
    assert report.one("key") == ("ok", f"project default: {url} knows the key")
    assert report.one("clock")[0] == report.one("delivery")[0] == report.one("buffer")[0] == "ok"
    assert [level for level, _ in report.told("socket")] == ["ok", "ok"]
    assert sink.taken == 0
    assert sink.requests == 1


async def test_without_an_agent_it_looks_itself(tmp_path: Path) -> None:
    """That none runs is a warning; the buffer that a kill left behind is looked into, and left as it was."""
    async with serving(Sink()) as url:
        file = configure(tmp_path, NOWHERE)
        async with running(file) as agent:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(agent.stream)
                client.sendall(line(1) + line(2))
            await agent.until(accepted=2)
            agent.send(signal.SIGKILL)
            await agent.process.wait()
        file = configure(tmp_path, url)
        before = {path: path.read_bytes() for path in (tmp_path / "buffer.db", tmp_path / "buffer.db-wal")}
        report = await examined(file)
        assert {path: path.read_bytes() for path in before} == before
    assert report.code == 0, report.text
    assert report.told("agent") == [("warning", f"{tmp_path}/admin.sock: no agent is running")]
    assert report.one("buffer")[1].endswith("whole; 2 events wait in it")


async def test_text_is_for_people(tmp_path: Path) -> None:
    """Each finding is a line, what to do stands under it, and the last line counts."""
    file = configure(tmp_path, NOWHERE)
    done = await trio.to_thread.run_sync(partial(run, "doctor", "--config", str(file)))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    at = next(
        number for number, text in enumerate(lines) if text.startswith("error   network: project default")
    )
    assert lines[at + 1].startswith("          try: ")
    assert lines[-1].startswith("1 error, ")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("phx_0123456789", "is a personal API key"),
        ("", "missing"),
    ],
)
async def test_a_key_that_cannot_be_one_is_told_without_it(tmp_path: Path, key: str, said: str) -> None:
    """A key of another kind is an error of the configuration; what needs no key is looked at all the same."""
    async with serving(Sink()) as url:
        file = configure(tmp_path, url)
        file.write_text(file.read_text().replace("phc_test", key))
        report = await examined(file)
    assert report.code == 1
    level, what = report.one("configuration")
    assert level == "error"
    assert said in what
    assert report.told("disk")
    assert report.told("host") == [
        ("ok", f"project default: {url} answers; the key was not to be had, so it was not tried")
    ]
    assert not key or key not in report.text


async def test_a_key_of_no_project_is_told_without_it(tmp_path: Path) -> None:
    """PostHog's 401 to the one question is an error, though events would be answered 200."""
    refusal = Reply(401, b'{"detail":"unknown key phc_test_of_nobody"}', {})
    async with serving(Sink(script=lambda request: refusal if request.path == "/flags" else None)) as url:
        file = configure(tmp_path, url)
        file.write_text(file.read_text().replace("phc_test", "phc_test_of_nobody"))
        async with running(file):
            report = await examined(file)
    assert report.code == 1
    level, what = report.one("key")
    assert (level, "does not know this key: HTTP 401" in what) == ("error", True)
    assert "phc_test" not in report.text


async def test_a_key_that_only_the_agent_has_is_no_error(tmp_path: Path) -> None:
    """Where the key is in the environment of the running agent alone, that is a warning."""
    async with serving(Sink()) as url:
        file = configure(tmp_path, url)
        async with running(file):
            given = file.read_text()
            file.write_text(given.replace('api_key = "phc_test"', 'api_key = { credential = "posthog" }'))
            report = await examined(file)
    assert report.code == 0, report.text
    assert report.one("configuration")[0] == "warning"


async def test_what_systemd_passes_to_the_unit_alone_is_no_error(tmp_path: Path) -> None:
    """Before the first start of an agent whose key is a credential, nothing can be said of the key."""
    async with serving(Sink()) as url:
        file = configure(tmp_path, url)
        file.write_text(file.read_text().replace('api_key = "phc_test"', 'api_key = { credential = "k" }'))
        report = await examined(file)
    assert report.code == 0, report.text
    level, what = report.one("configuration")
    assert (level, "systemd passes credentials to the agent's unit only" in what) == ("warning", True)


async def test_an_agent_that_hangs_is_the_only_error(tmp_path: Path) -> None:
    """Its sockets and its buffer are its own: neither systemd nor a second agent is suspected of them."""
    async with serving(Sink()) as url:
        file = configure(tmp_path, url)
        async with running(file) as agent:
            agent.send(signal.SIGSTOP)
            try:
                report = await examined(file)
            finally:
                agent.send(signal.SIGCONT)
    assert [told["check"] for told in report.document["findings"] if told["level"] == "error"] == ["agent"]
    assert all(level == "ok" for level, _ in report.told("socket"))
    assert report.told("buffer") == []


async def test_an_agent_that_sends_elsewhere_is_told(tmp_path: Path) -> None:
    """It was started with another host, by its environment or before the file changed."""
    async with serving(Sink()) as url, serving(Sink()) as other, running(configure(tmp_path, url)):
        report = await examined(configure(tmp_path, other))
        assert f"the running agent sends to {url}, the configuration's host is {other}" in words(
            report, ["warning"]
        )


async def test_a_hold_is_told_with_its_reason(tmp_path: Path) -> None:
    """What the running agent suffers from is told as it tells it."""
    async with serving(Sink(status=401)) as url:
        file = configure(tmp_path, url)
        async with running(file) as agent:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(agent.stream)
                client.sendall(line(1) + b"{}\n")
            with trio.fail_after(20):
                while not (await agent.status())["projects"][0]["held"]:
                    await trio.sleep(0.05)
            report = await examined(file)
    assert report.code == 1
    level, what = report.one("delivery")
    assert level == "error"
    assert "held (key)" in what


async def test_every_mistake_of_a_configuration_is_a_finding(tmp_path: Path) -> None:
    """A file that cannot be used is an error for each mistake in it."""
    file = tmp_path / "c.toml"
    file.write_text('[project]\napi_key = "phc_x"\n[buffer]\nmax_sise = "1 GiB"\n[log]\nlevel = "loud"\n')
    report = await examined(file)
    assert report.code == 1
    assert [level for level, _ in report.told("configuration")] == ["error", "error"]
    assert "did you mean max_size?" in report.text


async def test_a_missing_user_is_a_mistake(tmp_path: Path) -> None:
    """A name that nobody has cannot be checked."""
    done = await trio.to_thread.run_sync(partial(run, "doctor", "--as", "no-such-user"))
    assert done.returncode == 1
    assert "there is no user 'no-such-user'" in done.stderr


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, as pytest's own are not."""
    with TemporaryDirectory(prefix="doctor-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@ROOT_ONLY
async def test_another_users_way_to_the_sockets_is_tried(open_folder: Path) -> None:
    """As the named user: the file's mode, that all is well, the folder in the way, and `allow_uids`."""
    async with serving(Sink()) as url:
        await _ways_of_nobody(open_folder, url)


async def _ways_of_nobody(folder: Path, url: str) -> None:
    file = configure(folder, url)
    async with running(file):
        report = await examined(file, "--as", "nobody")
        assert report.code == 1
        for level, what in report.told("socket"):
            assert level == "error"
            assert "user nobody may not write to" in what
            assert "mode 0660" in what
        for name in ("events.sock", "events.dgram"):
            (folder / name).chmod(0o666)
        report = await examined(file, "--as", "nobody")
        assert [level for level, _ in report.told("socket")] == ["ok", "ok"], report.text
        assert report.text.count("user nobody can send (tried)") == 2
        folder.chmod(0o700)
        report = await examined(file, "--as", "65534")
        assert [f"may not enter {folder} " in what for _, what in report.told("socket")] == [True, True]
        file.write_text(
            file.read_text().replace('kind = "unix_stream"', 'kind = "unix_stream"\nallow_uids = [0]')
        )
        folder.chmod(0o755)
        report = await examined(file, "--as", "nobody")
        assert [level for level, _ in report.told("socket")] == ["error", "ok"]
        assert "not among its allow_uids" in report.text


async def test_socket_files_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    """A file that was removed and cannot be made anew, and one in the place of systemd's."""
    away = tmp_path / "away"
    away.mkdir()
    with Supervisor() as unit:
        unit.stream("s", tmp_path / "events.sock")
        async with serving(Sink()) as url:
            file = configure(tmp_path, url)
            text = file.read_text().replace(f'path = "{tmp_path}/events.sock"', 'socket = "s"')
            file.write_text(text.replace("events.dgram", "away/events.dgram"))
            async with unit.running(file):
                shutil.rmtree(away)
                (tmp_path / "events.sock").unlink()
                with socket.socket(socket.AF_UNIX) as other:
                    other.bind(str(tmp_path / "events.sock"))
                report = await examined(file)
    said = [what for level, what in report.told("socket") if level == "error"]
    assert "nobody listens on the file" in said[0]
    assert "the file is gone" in said[1]
    hints = [told["hint"] for told in report.document["findings"] if told["check"] == "socket"]
    assert "restart its .socket unit" in hints[0]
    assert "its log says why it cannot" in hints[1]


async def test_a_second_agent_is_told(tmp_path: Path) -> None:
    """A buffer that an agent owns which does not answer at the configured socket."""
    async with serving(Sink()) as url:
        file = configure(tmp_path, url)
        async with running(file) as agent:
            other = tmp_path / "other.toml"
            other.write_text(file.read_text().replace("admin.sock", "other.sock"))
            report = await examined(other)
            assert report.code == 1
            owner = f"process {agent.process.pid} owns this buffer"
            assert any(level == "error" and owner in what for level, what in report.told("agent"))
            moved = tmp_path / "moved.toml"
            moved.write_text(file.read_text().replace("buffer.db", "moved.db"))
            report = await examined(moved)
            assert [level for level, what in report.told("agent") if "running agent's buffer" in what] == [
                "warning"
            ]


async def test_something_else_at_the_admin_socket_is_told(tmp_path: Path) -> None:
    """What listens there and is no agent ends no examination."""
    file = configure(tmp_path, NOWHERE)

    async def babble(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"220 mail.example ESMTP\r\n")
        await stream.aclose()

    with trio.socket.socket(socket.AF_UNIX) as sock:
        await sock.bind(str(tmp_path / "admin.sock"))
        sock.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, babble, [trio.SocketListener(sock)])
            report = await examined(file)
            nursery.cancel_scope.cancel()
    assert (
        "error",
        f"{tmp_path}/admin.sock: the agent does not answer: the answer was not HTTP",
    ) in report.told("agent")


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE bookmark (url)")
    database.close()


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("PRAGMA user_version = 99")
    database.close()


def _torn(path: Path) -> None:
    _filled(path)
    data = bytearray(path.read_bytes())
    data[4096:12288] = b"\xff" * 8192
    path.write_bytes(data)


def _filled(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("PRAGMA user_version = 1")
        database.execute("CREATE TABLE chunk (events INTEGER, packed BLOB)")
        database.executemany("INSERT INTO chunk VALUES (1, ?)", [(b"x" * 3000,) for _ in range(50)])
    database.close()


@pytest.mark.parametrize(
    ("make", "level", "said"),
    [
        (lambda _: None, "ok", "not there yet"),
        (lambda path: path.write_bytes(b""), "ok", "empty"),
        (lambda path: path.write_text("a letter to somebody\n" * 50), "error", "no SQLite database"),
        (_foreign, "error", "another program's SQLite database"),
        (_newer, "error", "written by a newer capture-agent (schema 99"),
        (_torn, "error", "the database is damaged"),
        (Path.mkdir, "error", "this is no file"),
        (_filled, "ok", "whole; 50 events wait in it"),
    ],
)
def test_a_buffer_that_cannot_be_used_is_told(tmp_path: Path, make: Any, level: str, said: str) -> None:
    """A foreign, newer or damaged file is told, and is not changed."""
    path = tmp_path / "buffer.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    found = list(store.look(Buffer(path=str(path)), made=False))[-1]
    assert (found.level, said in found.what) == (level, True), found
    assert (path.read_bytes() if path.is_file() else None) == before
    assert {file.name for file in tmp_path.iterdir()} <= {"buffer.db"}


def test_a_missing_folder_of_the_buffer_is_told(tmp_path: Path) -> None:
    """A folder that the agent does not make itself."""
    settings = Buffer(path=str(tmp_path / "there" / "buffer.db"))
    (found,) = store.look(settings, made=False)
    assert (found.level, "does not exist" in found.what) == ("error", True)
    assert list(store.look(settings, made=True)) == []


@ROOT_ONLY
def test_files_that_their_owner_may_not_write_are_told(open_folder: Path) -> None:
    """As after a command was run as root on the buffer of another user."""
    path, lock = open_folder / "buffer.db", open_folder / "buffer.db.lock"
    _filled(path)
    lock.touch(mode=0o600)
    os.chown(path, 65534, 65534)
    by_folder, by_lock, whole = store.look(Buffer(path=str(path)), made=False)
    assert "it belongs to nobody, but user nobody may not write to" in by_folder.what
    assert by_lock.where == str(lock)
    assert "user nobody may not write to" in by_lock.what
    assert by_folder.level == by_lock.level == "error"
    assert whole.level == "ok"


async def test_a_socket_that_systemd_holds_is_no_agent(tmp_path: Path) -> None:
    """Sockets on which somebody listens while no agent answers."""
    file = configure(tmp_path, NOWHERE)
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(tmp_path / "events.sock"))
        held.listen()
        said = (await examined(file)).told("socket")
    assert any(level == "warning" and "no agent answers" in what for level, what in said)


def words(report: Report, levels: Sequence[str]) -> str:
    """All that was said at these levels."""
    return "\n".join(told["what"] for told in report.document["findings"] if told["level"] in levels)


async def test_a_group_that_is_not_there_is_told(tmp_path: Path) -> None:
    """The agent could not start with it."""
    file = configure(tmp_path, NOWHERE)
    file.write_text(
        file.read_text().replace('kind = "unix_stream"', 'kind = "unix_stream"\ngroup = "no-such"')
    )
    assert "there is no group 'no-such' on this host" in words(await examined(file), ["error"])
