"""`capture-agent sink`: a local stand-in for PostHog that is as strict, and shows what it takes."""

from typing import TYPE_CHECKING

import click

from agent.cli.options import plain, plainly, unused_config_option

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from agent.sink import Event, Sink

# Characters of a line before the properties are cut, and of a key that is shown: enough to tell them apart.
WIDTH = 160
KEY_SHOWN = 8
FIRST_LINE = (
    "listening on {url} as PostHog would. To send here:"
    " CAPTURE_AGENT_HOST={url} CAPTURE_AGENT_API_KEY=phc_local capture-agent run"
)


def _seconds(_context: click.Context, _parameter: click.Parameter, text: str) -> float:
    """A duration as text, in seconds."""
    from agent.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _size(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | None:
    """A size as text, in bytes."""
    from agent.units import parse_size

    try:
        return parse_size(text) if text is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _address(_context: click.Context, _parameter: click.Parameter, text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise click.BadParameter(f"{text!r} is not HOST:PORT (write it like 127.0.0.1:8000 or [::1]:8000)")
    return text


def _property(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> tuple[str, str] | None:
    name, equals, value = (text or "").partition("=")
    if text is not None and not (name and equals):
        raise click.BadParameter(f"{text!r} is not PROPERTY=VALUE")
    return (name, value) if text is not None else None


@click.command()
@unused_config_option
@click.option(
    "--listen", default="127.0.0.1:8000", show_default=True, callback=_address, help="HOST:PORT; port 0: any."
)
@click.option(
    "--status", type=click.IntRange(200, 599), help="Answer every request with this status, take nothing."
)
@click.option("--fail-rate", type=click.FloatRange(0, 1), default=0.0, help="Share of requests answered 503.")
@click.option(
    "--latency", default="0s", callback=_seconds, help="Wait so long before every answer, e.g. 200ms."
)
@click.option(
    "--reject-if",
    metavar="PROPERTY=VALUE",
    callback=_property,
    help="400 if an event has this property; by v1 that event is dropped.",
)
@click.option("--max-body", metavar="SIZE", callback=_size, help="413 for a larger body, e.g. '100 KiB'.")
@click.option("--cut-over", metavar="SIZE", callback=_size, help="End the connection over a larger body.")
@click.option(
    "--retry-rate", type=click.FloatRange(0, 1), default=0.0, help="Share of events that v1 does not store."
)
@click.option(
    "--retry-after", metavar="SECONDS", type=click.FloatRange(0), help="Goes with every 429 and 503."
)
@click.option("--portal", is_flag=True, help="Answer as a captive portal: 200, and a page to log in.")
@click.option("--no-v1", is_flag=True, help="Do not serve the v1 protocol, as older installations do not.")
@click.option("--quiet", is_flag=True, help="Do not print the events.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print events as NDJSON; everything else goes to stderr."
)
def command(
    listen: str,
    status: int | None,
    fail_rate: float,
    latency: float,
    reject_if: tuple[str, str] | None,
    max_body: int | None,
    cut_over: int | None,
    retry_rate: float,
    retry_after: float | None,
    portal: bool,
    no_v1: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Take events as PostHog would, as strictly, and print them; can be told to misbehave.

    It keeps nothing. Stop it with Ctrl-C.
    """
    import socket

    import trio

    from agent.accept.sockets import bind_address
    from agent.sink import Sink

    with plainly():
        listener = bind_address(listen, socket.SOCK_STREAM)
        sink = Sink(
            status=status,
            fail_rate=fail_rate,
            latency=latency,
            reject_if=reject_if,
            max_body=max_body,
            cut_over=cut_over,
            retry_rate=retry_rate,
            retry_after=retry_after,
            portal=portal,
            v1=not no_v1,
        )
        line = None if quiet else _as_json if as_json else _as_line
        try:
            trio.run(_run, sink, listener, line, as_json)
        except* BrokenPipeError:  # whoever read our output (`| head`) has seen enough
            raise SystemExit(0) from None


async def _run(
    sink: "Sink", listener: "socket.socket", line: "Callable[[Event], str] | None", as_json: bool
) -> None:
    """Serve and print until told to stop."""
    import signal

    import trio

    from agent.sink import serving

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as printing:
            async with serving(sink, listener) as url:
                click.echo(FIRST_LINE.format(url=url), err=as_json)
                if line is not None:
                    printing.start_soon(_print, sink, line)
                await anext(signals)
            sink.end()  # what was taken while it stopped is printed too
    answers = ", ".join(f"{status or 'none'}: {count}" for status, count in sorted(sink.statuses.items()))
    asked = f"{sink.requests} requests ({sink.received} bytes)"
    click.echo(f"took {sink.taken} events in {asked}; answers: {answers or 'none'}", err=as_json)


async def _print(sink: "Sink", line: "Callable[[Event], str]") -> None:
    """Print events as they come; a lot at a time, so that printing does not hold up the answers much."""
    async for events in sink.arrivals():
        click.echo("\n".join(map(line, events)))


def _as_json(event: "Event") -> str:
    import msgspec

    from agent.cli.output import legible

    return legible(msgspec.json.encode(event))


def _as_line(event: "Event") -> str:
    """Time, name, id, key and properties on one line; what a terminal could obey is escaped."""
    import msgspec

    properties = msgspec.json.encode(event.properties).decode()
    key = event.api_key[:KEY_SHOWN] + "…" if len(event.api_key) > KEY_SHOWN else event.api_key
    line = (
        f"{event.timestamp:%H:%M:%S.%f}"[:-3] + f"  {event.event}  {event.distinct_id}  {key}  {properties}"
    )
    line = line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
    return plain(line)
