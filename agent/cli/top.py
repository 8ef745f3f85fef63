"""`capture-agent top`: what a running agent does, live, with rates and pictures of the last minute."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from agent.cli.options import config_option
from agent.cli.pulse import KEPT, Document, Pulse
from agent.cli.reach import find_socket, no_permission, not_running, silent
from agent.cli.status import books_line, buffer_lines, clock_lines, others_line, project_lines
from agent.units import format_age

if TYPE_CHECKING:
    import httpx

# A busy agent answers in milliseconds.
PATIENCE_SECONDS = 5.0
# How often the agent is asked.
EVERY_SECONDS = 1.0
# The columns that the tables have beside their pictures.
NUMBERS_WIDTH = 62
# The least of a picture that still shows something.
LEAST_WIDTH = 10


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document a second.")
def command(config_file: str | None, as_json: bool) -> None:
    """Show what a running agent does, live: rates of each source and project, buffer, holds, books.

    Ctrl-C ends it. In a pipe or on a dumb terminal it prints a line a second.
    """
    import httpx

    path = find_socket(config_file, "admin.sock")
    # A dumb terminal can be written to, and no more (terminfo(5)): for such a one rich draws nothing.
    live = sys.stdout.isatty() and not as_json and os.environ.get("TERM") not in ("dumb", "unknown")
    try:
        with (
            httpx.Client(transport=httpx.HTTPTransport(uds=path), timeout=PATIENCE_SECONDS) as client,
            _screen() if live else _lines(as_json=as_json) as show,
        ):
            _watch(client, show, path, live=live)
    except KeyboardInterrupt:
        pass  # the way in which this ends


# What is shown: the document, its rates, how they went, and what is wrong with reaching the agent.
Show = Callable[[Document, Document, Pulse, str], None]


def _watch(client: "httpx.Client", show: Show, path: str, *, live: bool) -> None:
    """Ask and show for ever. On a screen a restart of the agent is sat out; else it is the end."""
    import httpx

    pulse = Pulse()
    last: tuple[Document, Document] | None = None
    due = time.monotonic()
    while True:
        try:
            document = client.get("http://agent/status").raise_for_status().json()
        except httpx.HTTPError as error:
            if last is None or not live:
                raise _ended(error, path) from None
            show(*last, pulse, f"no answer at {path}; this is what was")
        else:
            rates = pulse.feel(document, time.monotonic())
            if rates is not None:
                last = document, rates
                show(document, rates, pulse, "")
        due = max(due + EVERY_SECONDS, time.monotonic())
        time.sleep(due - time.monotonic())


def _ended(error: "httpx.HTTPError", path: str) -> SystemExit:
    import httpx

    if isinstance(error, httpx.ConnectError):
        return no_permission(path) if "Permission denied" in str(error) else not_running(path)
    return silent(path, error)


@contextmanager
def _lines(*, as_json: bool) -> Iterator[Show]:
    """For who reads a pipe: a line a second."""
    import msgspec

    def show(document: Document, rates: Document, _pulse: Pulse, _trouble: str) -> None:
        click.echo(msgspec.json.encode(rates) if as_json else _line(document, rates))

    yield show


def _line(document: Document, rates: Document) -> str:
    total, buffer = rates["rates"], rates["buffer"]
    parts = [
        rates["at"],
        f"in {total['accepted']:,.0f}/s",
        f"out {total['delivered']:,.0f}/s",
        f"rejected {total['rejected']:,.0f}/s",
        f"dead {total['dead']:,.0f}/s",
        f"buffer {buffer['events']:,} events, {buffer['disk_bytes'] / 2**20:,.1f} MiB",
        *(f"{source['name']} {source['received']:,.0f}/s" for source in rates["sources"]),
        *(f"to {project['name']} {project['delivered']:,.0f}/s" for project in rates["projects"]),
        *(f"{name} is held ({reason})" for name, reason in rates["held"].items()),
    ]
    return "; ".join([*parts, *([] if document["state"] == "running" else [document["state"]])])


@contextmanager
def _screen() -> Iterator[Show]:
    """For a person: the whole terminal, drawn anew each second."""
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:

        def show(document: Document, rates: Document, pulse: Pulse, trouble: str) -> None:
            parts = drawn(document, rates, pulse, console.width, trouble)
            live.update(Group(*parts), refresh=True)

        yield show


def drawn(document: Document, rates: Document, pulse: Pulse, width: int, trouble: str) -> Iterator[Any]:
    """The screen's parts, for rich."""
    from rich.markup import escape

    bars = max(LEAST_WIDTH, min(KEPT, width - NUMBERS_WIDTH))
    state = f"{document['state']}, up {format_age(document['uptime_seconds'])}, process {document['pid']}"
    yield f"[bold]capture-agent {document['version']}[/] {state}"
    yield f"[red]{escape(trouble)}[/]" if trouble else ""
    yield _sources(document, rates, pulse, bars)
    yield ""
    yield _projects(rates, pulse, bars)
    yield ""
    yield from buffer_lines(document["buffer"])
    yield f"[cyan]{pulse.picture('buffered', bars)}[/] [dim]events in it, the last minute[/]"
    for project in document["projects"]:
        yield from project_lines(project, escape)
    if others := document["other"]:
        yield others_line(others)
    yield from clock_lines(document)
    yield books_line(document["books"])


def _table(*titles: str) -> "Any":  # rich's Table; rich is loaded only where it is used
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    return table


def _sources(document: Document, rates: Document, pulse: Pulse, bars: int) -> "Any":
    table = _table("source", "in/s", "the last minute", "rejected/s", "drops/s", "clients")
    for source, rate in zip(document["sources"], rates["sources"], strict=True):
        name = source["name"]
        table.add_row(
            name,
            _number(rate["received"]),
            f"[green]{pulse.picture(f'source {name} received', bars)}[/]",
            _number(rate["rejected"], "yellow"),
            _number(rate["dropped"], "red"),
            "" if source["connections"] is None else f"{source['connections']:,}",
        )
    return table


def _projects(rates: Document, pulse: Pulse, bars: int) -> "Any":
    table = _table("project", "out/s", "the last minute", "dead/s", "")
    for rate in rates["projects"]:
        name = rate["name"]
        held = rates["held"].get(name)
        table.add_row(
            name,
            _number(rate["delivered"]),
            f"[blue]{pulse.picture(f'project {name} delivered', bars)}[/]",
            _number(rate["dead"], "yellow"),
            f"[red]held ({held})[/]" if held else "",
        )
    return table


def _number(rate: float | None, odd: str = "") -> str:
    """A rate; in a colour where it should be none."""
    if rate is None:
        return ""
    return f"[{odd}]{rate:,.0f}[/]" if odd and rate else f"{rate:,.0f}"
