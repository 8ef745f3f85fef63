"""No way in: what the admin address and socket let whom do, and who may open the agent's files."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import trio
from processes import COMMAND, ENVIRONMENT, Running, configure, run, running
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from agent import config as settings
from agent.admin import View, make_app
from agent.buffer.memory import open_memory
from agent.buffer.sqlite import open_sqlite
from agent.metrics import Metrics
from agent.sink import Sink, serving

READING = {"GET", "HEAD"}
METHODS = (
    *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "MOVE"),
    *("PURGE", "LINK", "QUERY", "post", "XYZZY"),
)
# What servers and frameworks elsewhere take for another method, path, host or sender than the request line's.
LIES = (
    "X-HTTP-Method-Override: POST",
    "X-HTTP-Method: POST",
    "X-Method-Override: POST",
    "X-Original-URL: {path}",
    "X-Rewrite-URL: {path}",
    "X-Forwarded-Prefix: {path}",
    "X-Forwarded-For: 127.0.0.1",
    "X-Forwarded-Host: localhost",
    "Forwarded: for=unix:;host=localhost;proto=http",
    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    "Content-Type: application/x-www-form-urlencoded",
    "Expect: 100-continue",
)


async def routes(*, private: bool) -> dict[str, set[str]]:
    """The admin app's own table: each path, and the methods that it takes."""
    async with open_memory(settings.Buffer(path="/memory", kind="memory")) as buffer:
        view = View(lambda _private: {}, lambda: "", CollectorRegistry(), buffer, dict)
        table = make_app(view, private=private).routes
    assert all(isinstance(route, Route) for route in table), "a mount or socket: walk it too"
    return {route.path: set(route.methods or ()) for route in table if isinstance(route, Route)}


def disguises(path: str) -> list[str]:
    """Request targets that some server would take for the path."""
    first, bare = path[1:2], path.strip("/")
    upper = "".join(f"%{ord(char):02X}" for char in bare)
    return [
        *(path, f"{path}/", f"/{path}", f"//{bare}//", f"/./{bare}", f"/x/../{bare}", f"/livez/../{bare}"),
        *(f"/livez/..%2f{bare}", f"/%2e%2e/{bare}", f"/livez/%2e%2e/{bare}", f"/livez;/../{bare}"),
        *(f"/%{ord(first or '/'):02x}{bare[1:]}", f"/{upper}", f"%2f{bare}", f"/%252f{bare}", f"/\\{bare}"),
        *(f"{path}?", f"{path}?x=1", f"{path}#x", f"{path}%00", f"{path}%20", f"{path};a=b", f"{path}.json"),
        *(path.upper(), f"*{path}", f"http://localhost{path}", f"http://agent{path}", f"unix:{path}"),
        *(f"localhost:9469{path}", f"/metrics{path}", f"/status/..{path}", f"/?{path}"),
    ]


async def ask(address: tuple[str, int], request: str) -> list[int]:
    """The statuses of what comes back until the connection ends; none where it is only closed."""
    stream = await trio.open_tcp_stream(*address)
    async with stream:
        answer = bytearray()
        try:
            await stream.send_all(request.encode("latin-1"))
            with trio.fail_after(30):
                async for part in stream:
                    answer += part
        except trio.BrokenResourceError:
            pass
    return [int(found) for found in re.findall(rb"(?:^|\n|\})HTTP/1\.1 (\d+)", bytes(answer))]


def request(method: str, target: str, *more: str, host: str = "127.0.0.1", body: str = "") -> str:
    """One request, after which the server is to close."""
    lines = (f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", *more)
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", body))


def with_pages(folder: Path, url: str) -> tuple[Path, tuple[str, int]]:
    """A configuration with the pages on a free port of loopback, and where that is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = configure(folder, url)
    config.write_text(config.read_text().replace('listen = ""', f'listen = "127.0.0.1:{port}"'))
    return config, ("127.0.0.1", port)


async def with_a_dead_letter(agent: Running) -> dict[str, object]:
    """Have an event refused, beside one that is taken; the books then."""
    async with await trio.open_unix_socket(agent.stream) as stream:
        await stream.send_all(b'{"event":"e","distinct_id":"d"}\n')
        await stream.send_all(b'{"event":"dead","distinct_id":"d","properties":{"n":1e999}}\n')
    return dict((await agent.until(delivered=1, dead=1))["books"])


async def test_the_table_has_nothing_but_reading_for_the_address() -> None:
    """On the address every page is only read; what the socket has beyond is none of the address's."""
    public, private = await routes(private=False), await routes(private=True)
    assert all(methods <= READING for methods in public.values())
    assert public.items() <= private.items()
    assert {path for path, methods in private.items() if not methods <= READING} == {
        "/dead-letters/replay",
        "/dead-letters/purge",
    }


@pytest.mark.parametrize("disguised", ["/dead-letters/purge", pytest.param("", marks=pytest.mark.slow)])
async def test_nothing_on_tcp_changes_anything(
    disguised: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """No method, path or header makes the address do what only the socket may; the socket itself does it."""
    public, private = await routes(private=False), await routes(private=True)
    hidden = [path.replace("{ident:int}", "1") for path in private.keys() - public.keys()]
    assert not disguised or disguised in hidden
    body = '{"ids": [1]}'
    tries: list[tuple[str, str, tuple[str, ...]]] = [
        (method, path, ()) for path in [*public, *hidden] for method in METHODS
    ]
    hidden = [disguised] if disguised else hidden
    tries += [
        (method, target, ()) for path in hidden for target in disguises(path) for method in ("GET", "POST")
    ]
    tries += [
        (method, target, (lie.format(path=path),))
        for path in hidden
        for lie in LIES
        for method, target in (("GET", path), ("POST", path), ("GET", "/"), ("POST", "/"))
    ]
    async with serving(Sink()) as url:
        config, address = with_pages(tmp_path, url)
        async with running(config) as agent:
            before = await with_a_dead_letter(agent)
            free = trio.CapacityLimiter(8)
            answers: list[tuple[str, str, list[int]]] = []

            async def attempt(method: str, target: str, more: tuple[str, ...]) -> None:
                async with free:
                    told = await ask(address, request(method, target, *more, body=body))
                    answers.append((method, target, told))

            async with trio.open_nursery() as nursery:
                for each in tries:
                    nursery.start_soon(attempt, *each)
            for method, target, told in answers:
                good = [status for status in told if 200 <= status < 300]
                plain = target.partition("?")[0].partition("#")[0]
                read = method in READING and (plain in public or plain.startswith("http://"))
                assert not good or read, f"{method} {target}: {told}"
            after = (await agent.status())["books"]
            assert after == before
            purged = httpx.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
            async with httpx.AsyncClient(transport=purged, base_url="http://agent") as client:
                assert (await client.get("/dead-letters/1")).status_code == 200
                told = (await client.post("/dead-letters/purge", content=body)).json()
                assert told == {"done": 1}
    record_property("told", f"{len(tries):,} requests on TCP, none of which changed or showed anything")


async def test_neither_two_requests_in_one_nor_a_foreign_name(tmp_path: Path) -> None:
    """What hides a second request in the first gets no more by it; names are not answered on loopback."""
    hidden = request("POST", "/dead-letters/purge", body='{"ids": [1]}')
    both = "Host: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked"
    async with serving(Sink()) as url:
        config, address = with_pages(tmp_path, url)
        async with running(config) as agent:
            before = await with_a_dead_letter(agent)
            for smuggling in (
                f"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n{hidden}",
                f"POST / HTTP/1.1\r\n{both}\r\n\r\n0\r\n\r\n{hidden}",
                f"GET / HTTP/1.1\r\nHost: localhost\r\nX: 1\n\n{hidden}",
                f"GET / HTTP/1.1\nHost: localhost\n\n{hidden}",
            ):
                assert not set(await ask(address, smuggling)) - {200, 400, 404, 405, 501}
            assert (await agent.status())["books"] == before
            assert await ask(address, request("GET", "/status", host="evil.example")) == [421]
            elsewhere = request("GET", "http://localhost/status", host="evil.example")
            assert await ask(address, elsewhere) in ([421], [400])
            assert await ask(address, request("GET", "/status", host="localhost")) == [200]
            # Who is too old to name a host is no browser.
            assert await ask(address, "GET /status HTTP/1.0\r\n\r\n") == [200]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("127.0.0.1", "127.0.0.1:9469", "localhost", "LocalHost:80", "[::1]:9469")),
        *((host, 200) for host in ("[::1]", "10.0.0.7:9469")),
        *(
            (host, 421)
            for host in ("evil.example", "evil.example:9469", "localhost.evil.example", "127.0.0.1.nip.io")
        ),
        *(
            (host, 421)
            for host in ("agent", "localhost.", "0x7f.1", "[evil]:1", "::1:9469:x", "user@localhost")
        ),
    ],
)
async def test_a_web_page_of_another_name_reads_nothing(host: str, status: int) -> None:
    """On loopback names are not answered: anybody may have pointed one there, and a browser asks by it."""
    async with open_memory(settings.Buffer(path="/memory", kind="memory")) as buffer:
        view = View(lambda _private: {}, lambda: "", CollectorRegistry(), buffer, dict)
        for local, expected in ((True, status), (False, 200)):
            transport = httpx.ASGITransport(make_app(view, private=False, local=local))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                for path in ("/livez", "/metrics", "/status"):
                    answer = await client.get(path, headers={"Host": host})
                    assert answer.status_code == expected, answer.text


async def test_its_files_are_its_users_alone(tmp_path: Path) -> None:
    """Whatever the umask: buffer, log, reserve, lock, copies and evidence 0600, the sockets as configured."""
    async with open_sqlite(settings.Buffer(path=str(tmp_path / "buffer.db")), Metrics()):
        pass
    with (tmp_path / "buffer.db").open("r+b") as file:  # it will be set aside as evidence
        file.seek(8192)
        file.write(b"\0" * 8192)
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        text = config.read_text().replace('/events.dgram"', '/events.dgram"\nmode = 0o620')
        config.write_text(text)
        async with running(config, ("sh", "-c", 'umask 0; exec "$@"', "sh")) as agent:
            await with_a_dead_letter(agent)
            copy = ("backup", str(tmp_path / "copy.db"), "--config", str(config))
            done = await trio.run_process(
                ["sh", "-c", 'umask 0; exec "$@"', "sh", *COMMAND, *copy],
                capture_stdout=True,
                env=ENVIRONMENT,
            )
            assert done.returncode == 0
            modes = {
                path.name: stat.S_IMODE(path.lstat().st_mode)
                for path in tmp_path.iterdir()
                if path.name not in ("config.toml", "log")
            }
    evidence = {name for name in modes if name.startswith("buffer.db.damaged-")}
    assert evidence
    assert modes == {
        **dict.fromkeys(
            ("buffer.db", "buffer.db-wal", "buffer.db.lock", "buffer.db.reserve", "copy.db"), 0o600
        ),
        **dict.fromkeys(evidence, 0o600),
        "events.sock": 0o660,
        "events.dgram": 0o620,
        "admin.sock": 0o660,
    }


# What a user of no group tries, and what comes of it.
TRIES = """
import json, os, socket, sys
folder, pid, port = sys.argv[1:]
"a".encode("idna")  # loaded while its file can be read
os.setgroups([]); os.setgid(65534); os.setuid(65534)
def tried(what):
    try:
        what()
    except OSError as error:
        return type(error).__name__
def connect(name, kind):
    return lambda: socket.socket(socket.AF_UNIX, kind).connect(f"{folder}/{name}")
def page():
    with socket.create_connection(("127.0.0.1", int(port))) as sock:
        sock.sendall(b"GET /status HTTP/1.0\\r\\n\\r\\n")
        assert b" 200 " in sock.recv(100)
reads = ["key", "buffer.db", "buffer.db-wal", "buffer.db.lock", "buffer.db.reserve"]
found = {name: tried(lambda: open(f"{folder}/{name}")) for name in reads}
found |= {name: tried(lambda: open(f"/proc/{pid}/{name}").read()) for name in ("environ", "mem", "maps")}
found["events.sock"] = tried(connect("events.sock", socket.SOCK_STREAM))
found["admin.sock"] = tried(connect("admin.sock", socket.SOCK_STREAM))
found["events.dgram"] = tried(connect("events.dgram", socket.SOCK_DGRAM))
found["kill"] = tried(lambda: os.kill(int(pid), 0))
found["page"] = tried(page)
print(json.dumps(found))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_gets_to_the_page_only(tmp_path: Path) -> None:
    """Files, sockets, memory and environment are closed to a user of another group; the address is open."""
    with TemporaryDirectory(prefix="capture-agent-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "key").write_text("phc_test")
        (folder / "key").chmod(0o600)
        config, (_, port) = with_pages(folder, "http://127.0.0.1:9")
        async with running(config) as agent:
            asked = [sys.executable, "-c", TRIES, name, str(agent.process.pid), str(port)]
            done = await trio.run_process(asked, capture_stdout=True, cwd="/")
    found = json.loads(done.stdout)
    assert found.pop("page") is None
    assert set(found.values()) == {"PermissionError"}, found


def test_folders_that_it_makes_are_not_for_others_to_write(tmp_path: Path) -> None:
    """Also those above its own, and with no umask at all."""
    env = {**ENVIRONMENT, "HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    code = (
        "import os; os.umask(0); os.access = lambda *_: False\n"
        "from agent.cli.options import read_config; from agent.cli.places import make_folders\n"
        "make_folders(read_config('/dev/null', keys=False))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    made = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert {path.name for path in made} >= {"run", "home", ".local", "state", "capture-agent"}
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o022 == 0 for path in made)


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    """Neither a file nor a program that core_pattern names gets the agent's memory."""
    config = configure(tmp_path, "http://127.0.0.1:9")
    script = 'ulimit -c unlimited 2>/dev/null || ulimit -c "$(ulimit -H -c)"; exec "$@"'
    process = subprocess.Popen(
        ["sh", "-c", script, "sh", *COMMAND, "run", "--config", str(config)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env={**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stderr is not None
    while b"ready" not in process.stderr.readline():
        assert process.poll() is None
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    os.kill(process.pid, 6)
    _, status = os.waitpid(process.pid, 0)
    process.stderr.close()
    soft = re.search(r"Max core file size +(\d+)", limits)
    assert soft
    assert int(soft[1]) <= 1
    assert os.WTERMSIG(status) == 6
    assert not os.WCOREDUMP(status)
    assert not list(tmp_path.glob("core*"))


def test_no_command_takes_a_secret_as_an_argument() -> None:
    """Arguments are seen by everybody (ps): keys come from files, the environment or systemd."""
    options = set(re.findall(r"--[a-z-]+", run("man").stdout.replace("\\-", "-")))
    assert "--config" in options
    assert not [name for name in options if re.search("key|token|secret|password|auth", name)]
