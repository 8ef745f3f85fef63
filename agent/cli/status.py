"""`capture-agent status`: one screen of what a running agent does."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from agent.advice import WHEN_FULL
from agent.cli.options import config_option
from agent.cli.reach import ask_status, find_socket, no_permission, not_running, silent
from agent.units import format_age

# Wider than any line of the screen but a refused one.
PIPE_WIDTH = 200
# PostHog tells its time to the second, and an answer takes its own.
CLOCK_ODD_SECONDS = 60.0
# The newest refusals that one screen has room for.
REJECTS_SHOWN = 5

# The document is the agent's own JSON: its fields are what `agent/status.py` says.
Document = dict[str, Any]


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(config_file: str | None, as_json: bool) -> None:
    """Show a running agent's sources, buffer, delivery, holds, books and last error.

    The exit code is 3 when no agent is running.
    """
    path = find_socket(config_file, "admin.sock")
    try:
        document = ask_status(path)
    except PermissionError:
        raise no_permission(path) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise not_running(path) from None
    except (OSError, ValueError) as error:
        raise silent(path, error) from None
    if as_json:
        click.echo(document)
        return
    _show(json.loads(document))


def _show(document: Document) -> None:
    """The screen."""
    from rich.console import Console
    from rich.markup import escape

    # A pipe has no width; what reads it should not meet lines cut for an imagined screen.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    state = f"{document['state']}, up {format_age(document['uptime_seconds'])}, process {document['pid']}"
    console.print(f"[bold]capture-agent {document['version']}[/] {state}")
    if (reload := document["reload"]) and reload["refused"]:
        console.print(f"[red]the reload at {reload['at']} was refused:[/] {escape(reload['error'])}")
    console.print(_sources(document["sources"]))
    for line in buffer_lines(document["buffer"]):
        console.print(line)
    for project in document["projects"]:
        for line in project_lines(project, escape):
            console.print(line)
    if others := document["other"]:
        console.print(others_line(others))
    for line in clock_lines(document):
        console.print(line)
    console.print(books_line(document["books"]))
    for reject in document["rejects"][:REJECTS_SHOWN]:
        what = f"{reject['source']}: {reject['reason']}: {reject['sample']}"
        console.print(f"[dim]refused {reject['at']}[/] {escape(what)}", overflow="ellipsis", no_wrap=True)


def _sources(sources: list[Document]) -> "Any":  # rich's Table; rich is loaded only where it is used
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("source", "at", "received", "accepted", "rejected", "kernel drops", "clients"):
        table.add_column(title, justify="left" if title in {"source", "at"} else "right")
    for source in sources:
        rejected = sum(source["rejected"].values())
        table.add_row(
            source["name"],
            source["address"],
            f"{source['received']:,}",
            f"{source['accepted']:,}",
            f"{rejected:,}",
            "" if source["dropped"] is None else f"{source['dropped']:,}",
            "" if source["connections"] is None else f"{source['connections']:,}",
        )
    return table


def buffer_lines(buffer: Document) -> Iterator[str]:
    oldest = f", the oldest {format_age(buffer['oldest_seconds'])} old" if buffer["oldest_seconds"] else ""
    dead = f", {buffer['dead_letters']:,} dead letters" if buffer["dead_letters"] else ""
    # An agent that is older than this command does not say how full it is.
    filled = f", {buffer['filled']:.0%} full" if "filled" in buffer else ""
    size = f"{buffer['disk_bytes'] / 2**20:,.1f} of {buffer['limit_bytes'] / 2**20:,.0f} MiB{filled}"
    yield f"[bold]buffer[/] {buffer['events']:,} events{oldest}, {size}{dead}"
    if buffer["trouble"]:
        yield f"[red]the buffer cannot be written: {buffer['trouble']}[/]; senders wait"
    elif buffer["waiting"]:
        yield f"[yellow]{buffer['waiting']} puts wait for room[/]"
    elif dropped := buffer.get("dropping"):
        yield f"[red]the buffer is full, and {WHEN_FULL[buffer['when_full']]}[/]: {dropped:,} so far"


def project_lines(project: Document, escape: Any) -> Iterator[str]:
    yield (
        f"[bold]project {project['name']}[/] to {escape(project['host'] or 'nowhere')}: "
        f"{_outcomes(project)}; up to {project['concurrency']} at once"
    )
    if held := project["held"]:
        yield f"  [red]held ({held['reason']}){_since(held)}[/]: {escape(held['why'])}{_probe(held)}"
    for held in project["held_keys"]:
        keys = f"{held['keys']} key" + ("s" if held["keys"] != 1 else "")
        yield f"  [red]{keys} of clients held ({held['reason']}){_since(held)}[/]{_probe(held)}"
    if (seconds := project["next_try_seconds"]) is not None:
        yield f"  [yellow]waits after {project['failures']} failures[/]; next try in {format_age(seconds)}"
    if error := project["last_error"]:
        yield f"  [dim]last error {error['at']}[/] {escape(error['text'])}"


def others_line(others: Document) -> str:
    return f"[bold]keys of clients[/]: {_outcomes(others)}"


def _outcomes(document: Document) -> str:
    requests = ", ".join(f"{status}: {count:,}" for status, count in document["requests"].items())
    dead = sum(document["dead"].values())
    return f"{document['delivered']:,} delivered, {dead:,} dead; answers {requests or 'none yet'}"


def _since(held: Document) -> str:
    seconds = held["since_seconds"]
    return f" for {format_age(seconds)}" if seconds is not None else ""


def _probe(held: Document) -> str:
    seconds = held["next_probe_seconds"]
    return f"; next try in {format_age(seconds)}" if seconds is not None else ""


def clock_lines(document: Document) -> Iterator[str]:
    """What is odd about the host's clock; nothing where all is well."""
    clock = document["clock"]
    if last := clock["last_step"]:
        yield (
            f"[bold]clock[/] set {clock['steps']} times since the start, last by {last['seconds']:+,.1f} s to"
            f" {last['at']}; events keep their instants"
        )
    for project in document["projects"]:
        ahead = project["clock_ahead_seconds"]
        if ahead is not None and abs(ahead) > CLOCK_ODD_SECONDS:
            how = "ahead of" if ahead > 0 else "behind"
            yield (
                f"[yellow]this host's clock is {format_age(abs(ahead))} {how} PostHog's[/]; events keep their"
                " instants, but set it: NTP is off or cannot reach its servers"
            )


def books_line(books: Document) -> str:
    from agent.events import SHED_AT_THE_DOOR

    door = sum(books["shed"].get(reason, 0) for reason in SHED_AT_THE_DOOR)
    shed = sum(books["shed"].values()) - door
    verdict = "[green]the books balance[/]" if books["balanced"] else "[yellow]under way[/]"
    again = f" replayed {books['replayed']:,}," if books["replayed"] else ""
    return (
        f"[bold]books[/] received {books['received']:,} = accepted {books['accepted']:,}"
        f" + rejected {books['rejected']:,} + shed at the door {door:,};{again}"
        f" delivered {books['delivered']:,}, dead {books['dead']:,}, shed {shed:,},"
        f" buffered {books['buffered']:,}: {verdict}"
    )
