"""`capture-agent demo`: the whole way of an event, with no configuration and no account."""

from typing import TYPE_CHECKING

import click

from agent.cli.options import plainly, unused_config_option

if TYPE_CHECKING:
    from agent.config import Config
    from agent.sink import Sink

# Sample events that each source is sent.
EACH = 5
# All of them arrive within a second; a busy host gets more.
PATIENCE_SECONDS = 30.0


@click.command()
@unused_config_option
@click.option("--once", is_flag=True, help="Exit 0 when all sample events have arrived, 1 if they do not.")
def command(once: bool) -> None:
    """Start a stand-in for PostHog and an agent, and send events through every source.

    Nothing leaves this host; the buffer is temporary. Stop it with Ctrl-C.
    """
    import os

    import trio

    from agent import logs

    logs.set_up("warning", "auto", os.environ)
    with plainly():
        if not trio.run(_demonstrate, once):
            raise SystemExit(1)


async def _demonstrate(once: bool) -> bool:
    """Whether every event arrived."""
    import signal
    import tempfile

    import trio

    from agent.app import Agent
    from agent.sink import Sink, serving

    with tempfile.TemporaryDirectory(prefix="capture-agent-") as folder:
        sink = Sink()
        async with serving(sink) as url, trio.open_nursery() as nursery:
            agent = Agent(_configuration(folder, url))
            nursery.start_soon(agent.run)
            await agent.ready.wait()
            places = {source.settings.name: source.address for source in agent.sources}
            click.echo(f"PostHog's stand-in listens on {url}, the agent on")
            for name, place in places.items():
                click.echo(f"  {name:<14}{place}")
            await trio.to_thread.run_sync(_send_samples, places)
            arrived = await _show_arrivals(sink, EACH * len(places))
            if arrived and not once:
                click.echo(TOUR.format(stream=places["unix_stream"], pages=f"http://{agent.pages}"))
                with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    await anext(signals)
            agent.stop.set()
        return arrived


def _configuration(folder: str, url: str) -> "Config":
    from agent.config import Paths
    from agent.load import Surroundings, load

    around = Surroundings(env={}, paths=Paths(folder, folder), hostname="demo", read_text=str)
    return load(SETTINGS.format(url=url), around, file="demo")


SETTINGS = """
[project]
host = "{url}"
api_key = "phc_demo"

[[source]]
kind = "unix_stream"

[[source]]
kind = "unix_datagram"

[[source]]
kind = "udp"
listen = "127.0.0.1:0"
receive_buffer = "1 MiB"

[buffer]
max_size = "64 MiB"

[admin]
listen = "127.0.0.1:0"
"""

TOUR = """
All have arrived. Both keep running; send one yourself from another terminal:

  capture-agent send "hello" --socket {stream}

and look at the status page, {pages}/
or at {pages}/metrics or {pages}/status. Ctrl-C ends it all.
"""


async def _show_arrivals(sink: "Sink", expected: int) -> bool:
    """Print the events as they come; whether all came in time."""
    import trio

    with trio.move_on_after(PATIENCE_SECONDS):
        await sink.wait_for(expected)
    for taken in sink.events:
        through = taken.properties.get("through")
        click.echo(f"arrived: {taken.event}  distinct_id={taken.distinct_id}  through={through}")
    click.echo(f"{len(sink.events)} of {expected} events arrived")
    return len(sink.events) >= expected


def _send_samples(places: dict[str, str]) -> None:
    """A few events into each source, as an application would."""
    import json
    import socket

    for name, place in places.items():
        lines = [
            json.dumps(
                {"event": "demo event", "distinct_id": f"user-{n}", "properties": {"through": name, "n": n}}
            ).encode()
            + b"\n"
            for n in range(EACH)
        ]
        if name == "unix_stream":
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
                stream.connect(place)
                stream.sendall(b"".join(lines))
            continue
        family = socket.AF_UNIX if name == "unix_datagram" else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            host, _, port = place.rpartition(":")
            address = place if family == socket.AF_UNIX else (host, int(port))
            for line in lines:
                sender.sendto(line, address)
