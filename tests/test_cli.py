"""The commands as processes: what they print, what they say when something is wrong, how they end."""

import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import trio
from certificates import make_papers
from processes import COMMAND, ENVIRONMENT, configure, parsed, run, running
from sources import line

from agent import __version__
from agent.sink import Sink, serving

VERBS = (
    "demo", "run", "check", "send", "status", "top", "tail", "doctor", "dead-letter", "export", "backup",
    "sink", "completion", "man",
)  # fmt: skip
README = (Path(__file__).parents[1] / "README.md").read_text()


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    """`--help` answers at once: nothing but click is loaded for it."""
    done = run("--help")
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in VERBS)
    code = "import sys; from agent.cli import main; main(['--help'], standalone_mode=False)"
    loaded = subprocess.run(
        [sys.executable, "-c", code + "; print(sorted(sys.modules))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for heavy in ("trio", "httpx", "msgspec", "starlette", "rich", "structlog"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize("module", ["click", "agent.cli.output", "agent.cli.status"])
def test_an_interrupt_while_it_loads_ends_it_without_a_word(module: str) -> None:
    """Ctrl-C in the first tenth of a second; here it comes when a module is looked for."""
    code = f"""
import runpy, signal, sys
class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
sys.argv = ["capture-agent", "status"]
runpy.run_module("agent", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb: str) -> None:
    """Each verb says what it does and what it takes."""
    done = run(verb, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: capture-agent {verb}")


def test_version() -> None:
    """`--version` is the package's."""
    assert run("--version").stdout == f"capture-agent, version {__version__}\n"


def test_an_unknown_verb_is_a_usage_error_with_a_suggestion() -> None:
    """A slip of the finger is understood."""
    done = run("chekc")
    assert done.returncode == 2
    assert "Did you mean check?" in done.stderr


@pytest.mark.parametrize(
    ("source", "warned"),
    [
        ('listen = "0.0.0.0:8125"', True),
        ('listen = "[::]:8125"', True),
        ('listen = "log.example:8125"', True),
        ('listen = "127.0.0.2:8125"', False),
        ('listen = "[::1]:8125"', False),
        ('listen = "localhost:8125"', False),
        ('listen = "0.0.0.0:8125"\ntls_cert = "CERT"\ntls_key = "KEY"', False),
    ],
)
def test_check_warns_of_what_can_be_read_on_the_way(tmp_path: Path, source: str, warned: bool) -> None:
    """A TCP source that other hosts reach without TLS is allowed, but told."""
    if "CERT" in source:
        papers = make_papers(tmp_path)
        source = source.replace("CERT", papers.cert).replace("KEY", papers.key)
    file = tmp_path / "c.toml"
    file.write_text(f'[project]\napi_key = "phc_x"\n[[source]]\nkind = "tcp"\n{source}\n')
    done = run("check", "--config", str(file))
    assert done.returncode == 0, done.stderr
    assert ("warning: source[tcp].listen" in done.stderr) is warned


def test_check_tells_of_an_http_source_that_others_reach(tmp_path: Path) -> None:
    """It is allowed, and printed as a file would say it."""
    file = tmp_path / "c.toml"
    source = 'listen = "0.0.0.0:8127"\ntrusted_proxies = ["10.0.0.0/8"]'
    file.write_text(f'[project]\napi_key = "phc_x"\n[[source]]\nkind = "http"\n{source}\n')
    done = run("check", "--config", str(file))
    assert done.returncode == 0, done.stderr
    assert "warning: source[http].listen: 0.0.0.0:8127 is reached from other hosts" in done.stderr
    assert 'trusted_proxies = ["10.0.0.0/8"]' in done.stdout.splitlines()


def test_check_prints_what_is_in_force(tmp_path: Path) -> None:
    """A valid configuration is printed resolved, without its key."""
    file = configure(tmp_path, "http://127.0.0.1:1")
    for arguments in (("check", "--config", str(file)), ("--config", str(file), "check")):
        done = run(*arguments)
        assert done.returncode == 0
        assert 'api_key = "***"' in done.stdout
        assert 'linger = "50 ms"' in done.stdout
        assert "phc_test" not in done.stdout
    document = json.loads(run("check", "--config", str(file), "--json").stdout)
    assert document["projects"][0]["api_key"] == "***"


def test_check_tells_every_mistake_at_once(tmp_path: Path) -> None:
    """Each is a line of its own: file, key, what is wrong, what was meant; the exit code is 2."""
    file = tmp_path / "c.toml"
    file.write_text('[project]\napi_key = "phx_secret"\n[buffer]\nmax_sise = "1 GiB"\n')
    done = run("check", "--config", str(file))
    assert done.returncode == 2
    first, second, hint = done.stderr.splitlines()
    assert first.startswith(f"{file}: project.api_key: is a personal API key (phx_...)")
    assert second == f"{file}: buffer.max_sise: unknown key (did you mean max_size?)"
    assert hint.startswith("  try: ")
    assert "phx_secret" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ('[buffer]\npath = "/no/such/folder/b.db"', 1, "the folder /no/such/folder does not exist"),
        ('[buffer]\npath = "/sys/kernel/b.db"', 1, "needs write permission in /sys/kernel"),
        ('[admin]\nsocket = "/sys/kernel/a"', 1, "no permission"),
        ('[buffer]\npath = "{folder}/newer.db"', 1, "written by a newer capture-agent (schema 99"),
        ('[buffer]\npath = "{folder}/other.db"', 1, "this is another program's SQLite database"),
        ('[buffer]\npath = "{folder}/text.db"', 1, "this is not a database of"),
        ('[admin]\nlisten = "127.0.0.1:{taken}"', 1, "this address is in use"),
        ('[admin]\nsocket = "{folder}/text.db"', 1, "not a socket"),
        ('[delivery]\nca_file = "/no/such/file"', 1, "/no/such/file"),
    ],
)
def test_what_cannot_start_says_why_and_what_to_do(
    tmp_path: Path, setting: str, code: int, said: str
) -> None:
    """Two lines and an exit code, never a traceback."""
    (tmp_path / "text.db").write_text("I am not a database, and long enough not to be taken for an empty one")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE theirs (x)")
    with sqlite3.connect(tmp_path / "newer.db") as newer:
        newer.execute(f"PRAGMA application_id = {0x50486361}")
        newer.execute("PRAGMA user_version = 99")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        filled = setting.format(folder=tmp_path, taken=taken.getsockname()[1])
        config = tmp_path / "config.toml"
        sections = {
            "[buffer]": f'path = "{tmp_path}/b.db"',
            "[admin]": f'socket = "{tmp_path}/a"\nlisten = ""',
        }
        rest = "\n".join(f"{name}\n{text}" for name, text in sections.items() if name not in filled)
        extra = f'\nsocket = "{tmp_path}/a"' if "listen" in filled else ""
        source = f'[[source]]\nkind = "unix_stream"\npath = "{tmp_path}/s"\n'
        config.write_text(
            f'[project]\napi_key = "phc_k"\nhost = "http://[::1]:1"\n{source}{filled}{extra}\n{rest}\n'
        )
        done = run("run", "--config", str(config))
    assert said in done.stderr
    assert done.returncode == code
    assert "  try: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_and_a_missing_key_say_so(tmp_path: Path) -> None:
    """Both say where to put what is missing."""
    done = run("run", "--config", str(tmp_path / "none.toml"))
    assert done.returncode == 2
    assert "No such file" in done.stderr
    (tmp_path / "empty.toml").write_text("")
    done = run("run", "--config", str(tmp_path / "empty.toml"))
    assert done.returncode == 2
    assert "project.api_key: missing" in done.stderr


@pytest.mark.parametrize("verb", ["status", "send"])
def test_without_an_agent(tmp_path: Path, verb: str) -> None:
    """Exit code 3, and how to start one."""
    config = configure(tmp_path, "http://127.0.0.1:1")
    done = run(verb, *(["e"] if verb == "send" else []), "--config", str(config))
    assert done.returncode == 3
    assert "no agent is running" in done.stderr


async def test_an_agent_that_hangs_is_told(tmp_path: Path) -> None:
    """No command waits for ever for one that is stopped: each says so, and what to do."""
    config = str(configure(tmp_path, "http://127.0.0.1:9"))
    verbs = ("status", "top", "tail", "export", "dead-letter list", f"backup {tmp_path}/copy.db")
    async with running(Path(config)) as agent:
        agent.send(signal.SIGSTOP)
        try:
            async with trio.open_nursery() as nursery:
                for verb in verbs:
                    nursery.start_soon(_hears_nothing, verb, config)
        finally:
            agent.send(signal.SIGCONT)
    assert not list(tmp_path.glob("copy.db*"))


async def _hears_nothing(verb: str, config: str) -> None:
    done = await trio.to_thread.run_sync(partial(run, *verb.split(), "--config", config))
    wrong, hint = done.stderr.splitlines()
    assert (done.returncode, wrong.endswith("admin.sock does not answer: timed out")) == (1, True), (
        done.stderr
    )
    assert hint.startswith("  try: ")


def test_where_nothing_can_be_written() -> None:
    """As in a container with a read-only root: `tempfile` finds no folder, and no traceback comes of it."""
    no_files = ("sh", "-c", 'ulimit -f 0; exec "$@"', "sh")  # files of no more than 0 blocks
    done = subprocess.run(
        [*no_files, *COMMAND, "check", "--config", "/dev/null"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**ENVIRONMENT, "CAPTURE_AGENT_API_KEY": "phc_test"},
    )
    assert (done.returncode, done.stderr) == (0, "")


async def test_the_environment_says_where_the_admin_socket_is(tmp_path: Path) -> None:
    """Commands find the agent there too, as in a container, where no file says it."""
    async with running(configure(tmp_path, "http://127.0.0.1:9")):
        env = {"CAPTURE_AGENT_ADMIN__SOCKET": str(tmp_path / "admin.sock")}
        done = await trio.to_thread.run_sync(lambda: run("status", "--json", env=env))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["buffer"]["path"] == str(tmp_path / "buffer.db")


def test_demo_once() -> None:
    """With no configuration and no account every sample event arrives."""
    done = run("demo", "--once")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "15 of 15 events arrived"


def test_a_reader_who_has_enough_is_no_error() -> None:
    """`| head -1` ends the command without a traceback."""
    command = f"{' '.join(COMMAND)} demo --once | head -1"
    done = subprocess.run(
        command, shell=True, check=False, capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["a\udcff"], ["a", "-p", "b=\udcff"], ["a", "--distinct-id", "\udcff"]]
)
def test_send_takes_utf8_only(arguments: list[str]) -> None:
    """Other bytes cannot be told in JSON: a plain error, before anything is sent."""
    done = run("send", *arguments, "--socket", "/nowhere")
    assert done.returncode == 2
    assert "is not UTF-8" in done.stderr


def test_send_tells_a_wrong_socket_from_a_missing_agent(tmp_path: Path) -> None:
    """Only where nobody listens does it say that no agent runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "d"))
        done = run("send", "a", "--socket", str(tmp_path / "d"))
    assert done.returncode == 1
    assert "wrong type for socket" in done.stderr
    assert "unix_stream" in done.stderr
    assert run("send", "a", "--socket", str(tmp_path / "none")).returncode == 3
    (tmp_path / "file").touch()
    done = run("send", "a", "--socket", str(tmp_path / "file"))
    assert (done.returncode, f"{tmp_path}/file: is not a socket" in done.stderr) == (1, True)


@pytest.mark.parametrize("lines", [1, 20_000], ids=["none said", "none taken"])
def test_send_says_that_it_waits(tmp_path: Path, lines: int) -> None:
    """A full disk or an agent that hangs can take a minute; nobody has to wonder meanwhile, once."""
    answered = threading.Event()

    def answer() -> None:
        client, _ = listener.accept()
        with client:
            time.sleep(4)
            while client.recv(65536):
                pass
            client.sendall(b'{"accepted":%d,"rejected":0}\n' % lines)
        answered.set()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        agent = threading.Thread(target=answer)
        agent.start()
        text = line(1).decode() * lines
        done = run("send", "--stdin", "--socket", str(tmp_path / "s"), text=text)
        agent.join()
    assert answered.is_set()
    assert done.returncode == 0
    assert [word for word in done.stderr.splitlines() if "waiting for it" in word] == [
        "capture-agent: the agent has not answered yet; waiting for it"
    ]


@pytest.mark.parametrize("verb", ["run", "check"])
def test_certificates_are_looked_at_before_events_are_taken(tmp_path: Path, verb: str) -> None:
    """A path that is wrong is told at once, not after `ready`."""
    config = configure(tmp_path, "https://127.0.0.1:1", f'ca_file = "{tmp_path}/no.pem"\n[buffer]')
    done = run(verb, "--config", str(config))
    assert done.returncode == 1
    assert f"cannot use the certificates in {tmp_path}/no.pem" in done.stderr
    assert "ready" not in done.stderr


async def test_demo_stays_until_it_is_told_to_stop() -> None:
    """Without --once it tells where to look, keeps running, and ends cleanly."""
    process = await trio.lowlevel.open_process(
        [*COMMAND, "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said = b""
    with trio.fail_after(30):
        while b"Ctrl-C ends it all" not in said:
            said += await process.stdout.receive_some()
        address = next(word for word in said.decode().split() if word.endswith("/metrics"))
        transport = await trio.open_tcp_stream("127.0.0.1", int(address.split(":")[2].split("/")[0]))
        await transport.send_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await transport.receive_some()).startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
        assert await process.stderr.receive_some() == b""


async def test_send_and_status(tmp_path: Path) -> None:
    """`send` ends well only for what is on disk, and says which lines were refused; `status` shows it."""
    sink = Sink()
    async with serving(sink) as url:
        config = configure(tmp_path, url)
        async with running(config):
            one = run("send", "hello world", "-p", "n=5", "-p", "who=me", "--config", str(config))
            assert (one.returncode, one.stdout, one.stderr) == (0, "", "")
            many = run(
                "send",
                "--stdin",
                "--config",
                str(config),
                text=f"\n{line(1).decode()}\n\n \n{{}}\n\n{line(2).decode()}\n{{}}",
            )
            assert many.returncode == 1
            assert many.stderr.splitlines() == [
                "line 6 refused: missing_event",
                "line 10 refused: missing_event",
                "2 of 4 lines were refused",
            ]
            await sink.wait_for(3)
            screen = run("status", "--config", str(config))
            assert screen.returncode == 0
            assert "unix_stream" in screen.stdout
            assert "missing_event" in screen.stdout
            document = json.loads(run("status", "--json", "--config", str(config)).stdout)
            assert document["books"]["accepted"] == 3
        [hello] = [event for event in sink.events if event.event == "hello world"]
        assert hello.distinct_id == socket.gethostname()
        assert (hello.properties["n"], hello.properties["who"]) == (5, "me")


async def test_sink_can_be_used_and_told_to_misbehave() -> None:
    """It prints what it takes as NDJSON, and answers as told."""
    process = await trio.lowlevel.open_process(
        [*COMMAND, "sink", "--listen", "127.0.0.1:0", "--json", "--latency", "1ms"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with trio.fail_after(30):
        said = (await process.stderr.receive_some()).decode()
        port = int(said.split("http://127.0.0.1:")[1].split()[0])
        body = b'{"api_key":"phc_a","batch":[{"event":"e","distinct_id":"d","properties":{"n":1}}]}'
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        head = f"POST /batch/ HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        await stream.send_all(head + body)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        [event] = parsed((await process.stdout.receive_some()).decode())
        assert (event["event"], event["properties"]) == ("e", {"n": 1})
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


def _blocks(language: str) -> list[str]:
    return [part.split("```")[0] for part in README.split(f"```{language}\n")[1:]]


async def test_the_readmes_one_liners_work(tmp_path: Path) -> None:
    """Netcat, Python and PHP as the README writes them, with only the places changed."""
    sink = Sink()
    async with serving(sink) as url:
        config = configure(tmp_path, url)
        sdk = '[[source]]\nkind = "http"\nlisten = "127.0.0.1:0"\n[admin]'
        config.write_text(config.read_text().replace("[admin]", sdk))
        async with running(config) as agent:
            sources = (await agent.status())["sources"]
            udp, http = (sources[number]["address"].split(":")[1] for number in (2, 3))

            def here(text: str) -> str:
                text = text.replace("/run/capture-agent", str(tmp_path)).replace(
                    "127.0.0.1 8125", f"127.0.0.1 {udp}"
                )
                text = text.replace("127.0.0.1:8127", f"127.0.0.1:{http}").replace("phc_...", "phc_test")
                return text.replace("capture-agent send", f"{sys.executable} -m agent send --config {config}")

            expected = 0
            [shell] = [block for block in _blocks("sh") if "nc -N -U" in block]
            for command in here(shell).splitlines():
                if " nc " in command and shutil.which("nc") is None:
                    continue
                subprocess.run(command, shell=True, check=True, timeout=30, env=ENVIRONMENT)
                expected += 1
            for python in _blocks("python"):
                subprocess.run([sys.executable, "-c", here(python)], check=True, timeout=30, env=ENVIRONMENT)
                expected += 1
            if shutil.which("php") is not None:
                [php] = _blocks("php")
                subprocess.run(["php", "-r", here(php)], check=True, timeout=30)
                expected += 1
            with trio.fail_after(30):
                await sink.wait_for(expected)
            assert {event.event for event in sink.events} == {"backup done", "signup"}
