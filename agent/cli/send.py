"""`capture-agent send`: hands events to a running agent and waits until they are on disk."""

import os
import socket
import stat
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from select import select

import click

from agent.cli.options import config_option
from agent.cli.output import INTERRUPTED
from agent.cli.reach import find_socket, not_running

# Lines that are sent at once; between two such lots the acknowledgements are looked at.
LOT = 1000
# As long as a disk may stall before somebody should look; and before somebody at a terminal wonders.
PATIENCE_SECONDS, WONDER_SECONDS = 60.0, 3.0
# Refusals that are shown; beyond it only their number.
SHOWN = 20


def _utf8(text: str) -> str:
    """An argument as it was given; bytes that are not UTF-8 cannot be told in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise click.BadParameter(f"{text!r} is not UTF-8") from None
    return text


def _pair(_ctx: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, object]:
    """`key=value` properties; a value that is JSON is that value, anything else a text."""
    import msgspec

    found: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{text!r} is not key=value")
        try:
            found[name] = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            found[name] = value
    return found


@click.command()
@click.argument("event", required=False, type=_utf8)
@click.option(
    "--distinct-id", metavar="ID", type=_utf8, help="Whose event it is [default: this host's name]."
)
@click.option(
    "-p", "properties", metavar="KEY=VALUE", multiple=True, type=_utf8, callback=_pair, help="A property."
)
@click.option("--stdin", "from_stdin", is_flag=True, help="Send events from stdin, a JSON object a line.")
@click.option("--socket", "path", metavar="PATH", help="The agent's unix_stream socket.")
@config_option
def command(
    event: str | None,
    distinct_id: str | None,
    properties: dict[str, object],
    from_stdin: bool,
    path: str | None,
    config_file: str | None,
) -> None:
    """Send one EVENT, or with --stdin many, and exit 0 only once the agent has them on disk.

    Lines that the agent refuses are told by number and reason; the exit code is then 1.
    """
    import msgspec

    if (event is None) == (not from_stdin):
        raise click.UsageError("give either an EVENT or --stdin")
    if from_stdin and (distinct_id is not None or properties):
        raise click.UsageError("with --stdin each line has its own distinct_id and properties")
    lines: Iterable[bytes] = sys.stdin.buffer
    if not from_stdin:
        who = distinct_id if distinct_id is not None else socket.gethostname()
        one = {"event": event, "distinct_id": who, "properties": properties}
        lines = [msgspec.json.encode(one) + b"\n"]
    path = path or find_socket(config_file, "events.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
        except PermissionError:
            click.echo(f"capture-agent: {path}: no permission to send there", err=True)
            click.echo("  try: as a member of the socket's group", err=True)
            raise SystemExit(1) from None
        except (FileNotFoundError, ConnectionRefusedError):
            if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
                click.echo(f"capture-agent: {path}: is not a socket", err=True)
                click.echo("  try: the path of one of the agent's unix_stream sources", err=True)
                raise SystemExit(1) from None
            raise not_running(path) from None
        except OSError as error:
            click.echo(f"capture-agent: {path}: {error.strerror or error}", err=True)
            click.echo("  try: the path of one of the agent's unix_stream sources", err=True)
            raise SystemExit(1) from None
        raise SystemExit(_send(_Sending(sock), lines, bar=from_stdin and sys.stderr.isatty()))


class _Sending:
    """One connection: what was sent, and what the agent has said of it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._said = b""
        self._wondered = False
        self.sent = self.accepted = self.rejected = self.full = 0
        self.open = True
        self._blanks: list[int] = []  # before each blank line, so many were sent

    def send(self, lines: bytes, count: int, blanks: Sequence[int] = ()) -> None:
        """Hand lines over, with how many of them come before each blank line that is left out.

        What the agent has said meanwhile is read without waiting. Raises `TimeoutError` where it takes none.
        """
        self._blanks += [self.sent + before for before in blanks]
        left = memoryview(lines)
        while left:
            self._await(writing=True)
            left = left[self._sock.send(left, socket.MSG_DONTWAIT) :]
        self.sent += count
        if select([self._sock], [], [], 0)[0]:
            self._hear(self._sock.recv(65536))

    def finish(self) -> None:
        """Say that this was all."""
        self._sock.shutdown(socket.SHUT_WR)

    def wait(self) -> None:
        """Wait for the agent to say more. Raises `TimeoutError`."""
        self._await(writing=False)
        self._hear(self._sock.recv(65536))

    def _await(self, *, writing: bool) -> None:
        """Wait for the agent to take or to say something; who runs this is told once that it takes long."""
        mine = [self._sock]
        for seconds in (WONDER_SECONDS, PATIENCE_SECONDS - WONDER_SECONDS):
            if any(select([] if writing else mine, mine if writing else [], [], seconds)):
                return
            if not self._wondered:
                self._wondered = True
                click.echo("capture-agent: the agent has not answered yet; waiting for it", err=True)
                click.echo("  to see why: capture-agent status, or its log", err=True)
        raise TimeoutError

    @property
    def settled(self) -> bool:
        """Whether every line sent is on disk or refused."""
        return self.accepted + self.rejected >= self.sent

    def _hear(self, text: bytes) -> None:
        import msgspec

        self.open = bool(text)
        *lines, self._said = (self._said + text).split(b"\n")
        for line in lines:
            said = msgspec.json.decode(line, type=dict[str, int | str])
            if "error" in said and "line" not in said:
                click.echo(
                    f"capture-agent: the agent takes nothing from this user ({said['error']})", err=True
                )
                click.echo("  try: have it added to the source's allow_uids", err=True)
                raise SystemExit(1)
            if "error" in said:
                self.full += said["error"] == "buffer_full"
                if self.rejected < SHOWN:
                    number = int(said["line"])
                    number += bisect_left(self._blanks, number)
                    click.echo(f"line {number} refused: {said['error']}", err=True)
            else:
                self.accepted, self.rejected = int(said["accepted"]), int(said["rejected"])


def _send(sending: _Sending, lines: Iterable[bytes], *, bar: bool) -> int:
    """Send all, wait for the last word on it; the exit code."""
    interrupted = False
    try:
        with _progress(bar) as show:
            sending.send(b'{"ack":true}\n', 0)
            for lot, count, blanks in _lots(lines):
                sending.send(lot, count, blanks)
                show(sending)
            sending.finish()
            while sending.open and not sending.settled:
                sending.wait()
                show(sending)
    except TimeoutError:
        click.echo(f"capture-agent: the agent said nothing for {PATIENCE_SECONDS:.0f} s", err=True)
        click.echo("  try: capture-agent status: its buffer may be full, or it hangs", err=True)
    except OSError as error:
        click.echo(f"capture-agent: the connection ended early: {error}", err=True)
    except KeyboardInterrupt:
        interrupted = True
    if sending.rejected:
        click.echo(f"{sending.rejected} of {sending.sent} lines were refused", err=True)
    if not sending.settled:
        click.echo(f"only {sending.accepted} of {sending.sent} events are known to be on disk", err=True)
        click.echo("  try: send the rest again (with uuids of their own, none is doubled)", err=True)
        return INTERRUPTED if interrupted else 75
    if sending.full:
        click.echo("  try: again later, the agent's buffer is full", err=True)
        return 75
    return 1 if sending.rejected else 0


def _lots(lines: Iterable[bytes]) -> Iterator[tuple[bytes, int, Sequence[int]]]:
    """Lines in lots, each with how many are events, and how many of those come before each blank line."""
    source = iter(lines)
    while lot := list(islice(source, LOT)):
        full: list[bytes] = []
        blanks: list[int] = []
        for line in lot:
            if line.strip():
                full.append(line if line.endswith(b"\n") else line + b"\n")
            else:
                blanks.append(len(full))
        yield b"".join(full), len(full), blanks


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[_Sending], None]]:
    """On a terminal, a moving line that says how many are sent and how many are on disk."""
    if not shown:
        yield lambda _sending: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("on disk"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=0)
        yield lambda sending: bar.update(
            task, completed=sending.accepted + sending.rejected, total=sending.sent
        )
