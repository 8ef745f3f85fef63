"""`capture-agent tail`: events as they pass into the buffer."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from agent.cli.options import config_option, plain
from agent.cli.output import legible
from agent.cli.reach import find_socket, no_permission, not_running, refused, silent

if TYPE_CHECKING:
    import httpx

# A busy agent answers in milliseconds; afterwards there may be nothing to say for days.
PATIENCE_SECONDS = 5.0


class Event(msgspec.Struct):
    """What is shown of an event."""

    event: str
    distinct_id: str
    properties: msgspec.Raw = msgspec.Raw(b"{}")


class Line(msgspec.Struct):
    """What `agent/tail.py` says: an event, or how many are not shown."""

    source: str = ""
    received_at: str = ""
    event: Event | None = None
    left_out: int = 0
    missed: int = 0


@click.command()
@click.option("--source", "sources", metavar="NAME", multiple=True, help="Only from this source.")
@click.option("--event", "events", metavar="NAME", multiple=True, help="Only of this name; * is any text.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print each as one JSON object.")
def command(sources: Sequence[str], events: Sequence[str], config_file: str | None, as_json: bool) -> None:
    """Show events as a running agent takes them, until Ctrl-C.

    Under load some are shown, evenly chosen, and it says how many more passed. The agent waits for nobody.
    """
    import httpx

    path = find_socket(config_file, "admin.sock")
    endless = httpx.Timeout(PATIENCE_SECONDS, read=None)
    wanted = {"source": list(sources), "event": list(events)}
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), timeout=PATIENCE_SECONDS) as client:
            client.get("http://agent/livez")  # one that hangs is as silent as one that has nothing to tell
            with client.stream("GET", "http://agent/tail", params=wanted, timeout=endless) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise refused(answer, path)
                for line in _lines(answer):
                    _show(line, as_json=as_json)
    except httpx.ConnectError as error:
        if "Permission denied" in str(error):
            raise no_permission(path) from None
        raise not_running(path) from None
    except httpx.TimeoutException as error:
        raise silent(path, error) from None
    except httpx.HTTPError as error:
        click.echo(f"capture-agent: the agent at {path} went away: {error}", err=True)
        raise SystemExit(3) from None
    except KeyboardInterrupt:
        pass  # the way in which this ends


def _lines(answer: "httpx.Response") -> Iterator[bytes]:
    """Lines as they come; those of httpx end at more than newlines."""
    rest = b""
    for part in answer.iter_raw():
        *lines, rest = (rest + part).split(b"\n")
        yield from filter(None, lines)


def _show(line: bytes, *, as_json: bool) -> None:
    if as_json:
        click.echo(legible(line))
        return
    said = msgspec.json.decode(line, type=Line)
    if said.event is None:
        _tell_unseen(said)
        return
    when = said.received_at[11:-1]
    name, who, what = map(plain, (said.event.event, said.event.distinct_id, _text(said.event.properties)))
    if not sys.stdout.isatty():
        click.echo(f"{when} {said.source} {name} {who} {what}")
        return
    room = shutil.get_terminal_size().columns - len(f"{when} {said.source} {name} {who} ")
    what = what if len(what) <= room else f"{what[: max(0, room - 1)]}…"
    styled = click.style(name, bold=True), click.style(who, fg="cyan"), click.style(what, dim=True)
    click.echo(" ".join((click.style(f"{when} {said.source}", dim=True), *styled)))


def _text(properties: msgspec.Raw) -> str:
    return bytes(properties).decode("utf-8", "backslashreplace")


def _tell_unseen(said: Line) -> None:
    """On stderr, so that what reads the events sees nothing else."""
    if said.left_out:
        click.secho(f"... {said.left_out:,} more passed, not shown to spare the agent", fg="yellow", err=True)
    if said.missed:
        click.secho(
            f"... {said.missed:,} missed: they came faster than they were read here", fg="red", err=True
        )
