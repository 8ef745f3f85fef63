"""No secret is told: a real agent lives through what may go wrong, and all that it says is searched."""

import gzip
import json
import os
import re
import signal
import socket
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote

import httpx
import msgspec
import pytest
import trio
from processes import COMMAND, ENVIRONMENT, Running, ended, running

# Of a kind that no pattern knows, and with characters that are written in several ways.
KEY = 'own"key/of+this=project'
FOREIGN = "phc_ForeignKey0123456789"
PERSONAL = "phx_PersonalKey0123456789"
HEADER = "gate/way+token=0123"
PASSWORD = "pass/word+of=the%proxy"
HASHED = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
SECRETS = (KEY, FOREIGN, PERSONAL, HEADER, PASSWORD, HASHED)


def forms(secret: str) -> Iterator[bytes]:
    """How a secret may be written."""
    plain = secret.encode()
    yield from (
        plain,
        plain[::-1],
        plain.hex().encode(),
        quote(secret).encode(),
        quote(secret, safe="").encode(),
    )
    yield from (msgspec.json.encode(secret)[1:-1], repr(secret)[1:-1].encode(), plain.replace(b"/", b"\\/"))
    yield plain.replace(b'"', b"&quot;")
    yield plain.replace(b'"', b"&#34;")
    for before in range(3):  # base64 has three ways, by where in a longer text it stands
        coded = b64encode(b"x" * before + plain)
        yield coded[4 * (before > 0) : -4].rstrip(b"=")


def assert_untold(where: str, text: bytes) -> None:
    """No secret, in none of its forms, is in the text."""
    for secret in SECRETS:
        for form in forms(secret):
            at = text.find(form)
            assert at < 0, f"{where} tells {form!r}: ...{text[max(0, at - 200) : at + 100]!r}"


class Echo(BaseHTTPRequestHandler):
    """A proxy and a PostHog in one, which repeats all that it was sent, in the words of `status`."""

    protocol_version = "HTTP/1.1"
    status = 200
    kind = "text/plain"

    def do_POST(self) -> None:
        """Answer one request."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with_gzip = self.headers.get("Content-Encoding") == "gzip"
        body = gzip.decompress(body) if with_gzip else body
        status = 400 if b'"poison"' in body else type(self).status
        sent = re.search(rb'"api_key":"((?:[^"\\]|\\.)*)"', body)
        said = [json.loads(b'"%b"' % sent[1])] if sent else []
        said += [value for _, value in self.headers.items()]
        told = json.dumps(
            {
                "error": "invalid",
                "sent": said,
                "raw": [way(value) for value in said for way in (quote, escape, str.lower)],
            }
        )
        told = " ".join(said) + told if status != 200 else '{"status":"Ok"}'
        told = f"<html>{told}</html>" if type(self).kind == "text/html" else told
        self.send_response(status)
        self.send_header("Content-Type", type(self).kind)
        self.send_header("Content-Length", str(len(told.encode())))
        if 300 <= status < 400:
            self.send_header("Location", f"http://portal.example/?back={quote(' '.join(said))}")
        self.end_headers()
        self.wfile.write(told.encode())

    do_GET = do_POST  # noqa: N815  # as its base class has it

    def log_message(self, *_args: object) -> None:
        """Nothing is logged."""


@contextmanager
def echoing() -> Iterator[int]:
    """Such a server's port, for a block."""
    Echo.status, Echo.kind = 200, "text/plain"
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def configured(folder: Path, port: int, http: int, pages: int) -> Path:
    """A configuration in which there is every kind of secret."""
    (folder / "key").write_text(KEY + "\n")
    (folder / "key").chmod(0o600)
    file = folder / "config.toml"
    file.write_text(
        f"""
        [project]
        host = "http://posthog.example"
        api_key = {{ file = "{folder}/key" }}
        [delivery]
        proxy = "http://agent:{quote(PASSWORD, safe="")}@127.0.0.1:{port}"
        headers = {{ Authorization = "Bearer {HEADER}" }}
        linger = "10 ms"
        backoff_base = "50 ms"
        backoff_max = "100 ms"
        cooldown = "1 s"
        [[source]]
        kind = "unix_stream"
        path = "{folder}/events.sock"
        hash = ["distinct_id"]
        hash_key = {{ env = "HASH_KEY" }}
        [[source]]
        kind = "http"
        listen = "127.0.0.1:{http}"
        [buffer]
        path = "{folder}/buffer.db"
        [admin]
        socket = "{folder}/admin.sock"
        listen = "127.0.0.1:{pages}"
        [log]
        level = "debug"
        format = "json"
        """
    )
    file.chmod(0o600)
    return file


def free_port() -> int:
    """One that is likely to stay free."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


async def say(config: Path, *arguments: str, **env: str) -> None:
    """Look at all that a command prints; what goes on by itself is stopped after a while."""
    process = await trio.lowlevel.open_process(
        [*COMMAND, *arguments, "--config", str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**ENVIRONMENT, "HASH_KEY": HASHED, **env},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    printed = bytearray()
    async with ended(process):
        if arguments[0] in ("top", "tail"):
            await trio.sleep(3)
            process.send_signal(signal.SIGINT)
        await process.stdin.send_all(b'{"event":"e","distinct_id":"d"}')
        await process.stdin.aclose()
        async for part in process.stdout:
            printed += part
    assert b"Traceback" not in printed, printed
    assert_untold(" ".join(arguments), bytes(printed))


# What shows most; and beside it the rest of all that there is to ask.
ASKED = (("check",), ("status", "--json"), ("doctor",), ("dead-letter", "show", "1"))
ALSO_ASKED = (
    *(("check", "--json"), ("check", "--explain", "-", "--json"), ("status",), ("top", "--json"), ("tail",)),
    *(("doctor", "--json"), ("export",), ("dead-letter", "list"), ("dead-letter", "list", "--json")),
    *(("dead-letter", "export"), ("man",), ("completion", "bash"), ("send", "e", "--distinct-id", "d")),
)


async def look_everywhere(config: Path, pages: int, *, long: bool) -> None:
    """Ask the running agent what it may be asked."""
    free = trio.CapacityLimiter(2)

    async def one(arguments: tuple[str, ...]) -> None:
        async with free:
            await say(config, *arguments)

    async with trio.open_nursery() as nursery:
        for arguments in (*ASKED, *(ALSO_ASKED if long else ())):
            nursery.start_soon(one, arguments)
    await over_http(config, pages)


async def over_http(config: Path, pages: int) -> None:
    """The pages on both of their sockets."""
    uds = httpx.AsyncHTTPTransport(uds=str(config.with_name("admin.sock")))
    async with (
        httpx.AsyncClient(transport=uds, base_url="http://agent") as private,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{pages}", trust_env=False) as public,
    ):
        for client in (private, public):
            for path in ("/", "/figures", "/history", "/metrics", "/status", "/readyz"):
                assert_untold(path, (await client.get(path)).content)
        for path in ("/dead-letters?full=1", "/dead-letters/1", "/export"):
            assert_untold(path, (await private.get(path)).content)


def assert_process_tells_nothing(pid: int) -> None:
    """What ps and the environment show, but for what was given by the environment itself."""
    assert_untold("cmdline", Path(f"/proc/{pid}/cmdline").read_bytes())
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert_untold("environ", environment.replace(b"HASH_KEY=" + HASHED.encode(), b""))
    held = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    assert not [name for name in held if "memfd" in name]  # what was handed over is read and gone


def assert_files_tell_nothing(folder: Path) -> None:
    """Every file, but for the configuration, the key and the buffer, whose own these are."""
    for path in folder.rglob("*"):
        own = path.name in ("config.toml", "key") or path.name.startswith("buffer.db")
        if path.is_file() and not own:
            assert_untold(path.name, path.read_bytes())


async def held(agent: Running, reason: str) -> None:
    """Wait until the project is held for a reason."""
    with trio.fail_after(60):
        while ((await agent.status())["projects"][0]["held"] or {}).get("reason") != reason:
            await trio.sleep(0.05)


async def logged(agent: Running, words: str, times: int) -> None:
    """Wait until the log has said so often."""
    with trio.fail_after(60):
        while agent.log().count(words) < times:
            await trio.sleep(0.05)


async def send(agent: Running, *events: str) -> None:
    """Events over the stream."""
    lines = [json.dumps({"event": event, "distinct_id": "d", "properties": {"n": 1}}) for event in events]
    async with await trio.open_unix_socket(agent.stream) as stream:
        await stream.send_all("\n".join([*lines, ""]).encode())


async def post(port: int, path: str, document: object, **headers: str) -> int:
    """As an SDK does."""
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(f"http://127.0.0.1:{port}{path}", json=document, headers=headers)
    return answer.status_code


def misspelt(good: str) -> list[str]:
    """Configurations in which secrets stand where they do not belong; all but the last two in one."""
    return [
        good.replace("[project]", f"[project]\n'{FOREIGN}' = 1\nname = '{PERSONAL}'")
        .replace("file =", f"env = '{KEY}' #")
        .replace("http://agent:", "nowhere://agent:")
        .replace("[buffer]", f"[buffer]\nwhen_full = '{FOREIGN}'\nmax_size = '{PERSONAL}'"),
        f"{good}\n[project]\napi_key = '{FOREIGN}'",
        good.replace("Authorization = ", f"'{HEADER} ' = "),
    ]


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_nobody_is_told(
    long: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """From a start through refusals, holds, reloads and a crash, no output, page or file has a secret."""
    http, pages = free_port(), free_port()
    with echoing() as port:
        config = configured(tmp_path, port, http, pages)
        env = {"HASH_KEY": HASHED, "PYTHONFAULTHANDLER": "1", **({"PYTHONVERBOSE": "1"} if long else {})}
        async with running(config, env=env) as agent:
            assert_process_tells_nothing(agent.process.pid)
            await send(agent, "good", "poison")
            batch = {"api_key": FOREIGN, "batch": [{"event": "e", "distinct_id": "d"}]}
            assert await post(http, "/batch/", batch) == 200
            await agent.until(delivered=2, dead=1)
            Echo.status = 401
            await send(agent, "late")
            assert await post(http, "/batch/", batch) == 200
            await held(agent, "key")
            flags = {"token": FOREIGN, "distinct_id": "d"}
            for status in (500, 401):
                Echo.status = status
                await post(http, "/flags/?v=2", flags, Authorization=f"Bearer {PERSONAL}")
            await look_everywhere(config, pages, long=long)
            good = config.read_text()
            for number, bad in enumerate(misspelt(good)[: None if long else 1], 1):
                config.write_text(bad)
                if long:
                    await say(config, "check", PYTHONVERBOSE="1")
                agent.send(signal.SIGHUP)
                await logged(agent, "the reload was refused", number)
            config.write_text(good)
            agent.send(signal.SIGHUP)
            await logged(agent, '"ready"', 2)
            await agent.status()
            assert_process_tells_nothing(agent.process.pid)
            for status, kind in ((302, "text/plain"), (500, "text/plain"), (200, "text/html")):
                Echo.status, Echo.kind = status, kind
                await trio.sleep(0.2)
                await over_http(config, pages)
            if long:
                await say(config, "backup", str(tmp_path / "buffer.db.copy"))
            agent.send(signal.SIGABRT)
            await agent.process.wait()
    assert "Fatal Python error: Aborted" in agent.log()
    assert_untold("the log", agent.log().encode())
    assert_files_tell_nothing(tmp_path)
    if long:
        await say(config, "export")
        await say(config, "dead-letter", "list")
    record_property("told", f"{len(SECRETS)} secrets, each in {len(list(forms(KEY)))} forms; none was told")
