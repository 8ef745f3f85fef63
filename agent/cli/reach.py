"""How a command reaches the agent that runs on this host."""

import os
import socket
from typing import TYPE_CHECKING

import click

from agent.cli.options import SYSTEM_FILE, load_config
from agent.cli.places import runtime_folders

if TYPE_CHECKING:
    import httpx

# By which the environment says where the admin socket is, as in a container.
SAID = "CAPTURE_AGENT_ADMIN__SOCKET"
# A busy agent answers in milliseconds.
PATIENCE_SECONDS = 5.0


def ask_status(path: str) -> bytes:
    """The status document of the agent at an admin socket, as JSON.

    Raises OSError where none answers, ValueError where the answer is no status.

    By the library's own HTTP client: loading httpx would take longer than all the rest of `status`.
    """
    import http.client

    connection = http.client.HTTPConnection("agent", timeout=PATIENCE_SECONDS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(path)
        connection.sock = sock
        try:
            connection.request("GET", "/status", headers={"Connection": "close"})
            answer = connection.getresponse()
            document = answer.read()
        except http.client.HTTPException as error:
            raise ValueError("the answer was not HTTP") from error
    if answer.status != 200:
        raise ValueError(f"HTTP {answer.status}")
    return document


def find_socket(config_file: str | None, name: str, *, needed: bool = True) -> str:
    """The path of the agent's admin socket (`admin.sock`) or of its first Unix stream (`events.sock`).

    Exits 2 where the configuration has none that is `needed`; empty where none is.
    """
    from pathlib import Path

    if config_file is not None or Path(SYSTEM_FILE).exists() or SAID in os.environ:
        from agent.config import UnixStream

        config = load_config(config_file, keys=False)
        streams = [source for source in config.sources if isinstance(source, UnixStream)]
        paths = [config.admin.socket] if name == "admin.sock" else [source.path for source in streams]
        if found := next(filter(None, paths), ""):
            return found
        if not needed:
            return ""
        if name == "admin.sock" or not streams:
            missing = "admin socket" if name == "admin.sock" else "unix_stream source"
            click.echo(
                f"capture-agent: the configuration has no {missing}, which this command needs", err=True
            )
            raise SystemExit(2)
        # systemd opened it, where its .socket unit says: most likely at the usual place
    places = [f"{folder}/{name}" for folder in runtime_folders()]
    return next((place for place in places if os.path.exists(place)), places[0])


def no_permission(path: str) -> SystemExit:
    """Says that a socket is not for this user; exit code 1."""
    click.echo(f"capture-agent: {path}: no permission", err=True)
    click.echo("  try: run it as root or as a member of the socket's group", err=True)
    return SystemExit(1)


def not_running(path: str) -> SystemExit:
    """Says that no agent answers at a socket; exit code 3."""
    click.echo(f"capture-agent: no agent is running (nobody listens at {path})", err=True)
    click.echo("  try: capture-agent run, or --config FILE if its configuration is elsewhere", err=True)
    return SystemExit(3)


def silent(path: str, error: Exception) -> SystemExit:
    """Says that what listens at a socket does not answer as an agent that is well does; exit code 1."""
    click.echo(f"capture-agent: the agent at {path} does not answer: {str(error) or 'timed out'}", err=True)
    click.echo("  try: its log (journalctl -u capture-agent); restart it if it hangs", err=True)
    return SystemExit(1)


def refused(answer: "httpx.Response", path: str) -> SystemExit:
    """Tells what the agent will not do, in its words where it has some; the answer has been read."""
    if answer.headers.get("content-type") != "application/json":
        click.echo(f"capture-agent: the agent at {path} refused: HTTP {answer.status_code}", err=True)
        return SystemExit(1)
    told = answer.json()
    click.echo(f"capture-agent: {told['error']}", err=True)
    if told.get("hint"):
        click.echo(f"  try: {told['hint']}", err=True)
    return SystemExit(told.get("exit_code", 2))  # what has no code of its own is a wrong request
