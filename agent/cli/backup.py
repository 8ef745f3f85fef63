"""`capture-agent backup`: a consistent copy of the buffer's database."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

import click

from agent.cli.asking import asked, parts_of, progress
from agent.cli.options import config_option

if TYPE_CHECKING:
    import httpx

# The first byte comes when the agent has its copy; a disk that copies 10 MB/s takes so long for 10 GiB.
PATIENCE_SECONDS = 1200.0


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(file: str, config_file: str | None, as_json: bool) -> None:
    """Copy the buffer's database to FILE, as it is at one moment, while the agent goes on.

    Beside what waits it holds the dead letters and the books. FILE is replaced only when the copy is whole
    and on disk. Of an agent that does not run the file is copied.
    """
    size = 0
    with _replacing(file) as part:

        async def work(client: "httpx.AsyncClient") -> None:
            from agent.flow import TOTAL

            nonlocal size
            async with client.stream("GET", "/backup", timeout=PATIENCE_SECONDS) as answer:
                total = int(answer.headers.get(TOTAL, 0))
                with progress(total, shown=True, sized=True) as advance:
                    async for some in parts_of(answer):
                        size += part.write(some)
                        advance(len(some))

        asked(config_file, work)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode({"file": file, "bytes": size}))
    else:
        click.echo(f"{file}: {size / 2**20:,.1f} MiB")


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A file that takes this name at the end of the block, on disk; where the block fails there is none.

    A timer's SIGTERM is as good as Ctrl-C: else it would leave half a copy behind each time.
    """
    if os.path.exists(f"{path}.lock"):
        click.echo(f"capture-agent: {path}: is an agent's buffer ({path}.lock is beside it)", err=True)
        click.echo("  try: another name for the copy", err=True)
        raise SystemExit(2)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    folder = os.path.dirname(path) or "."
    try:
        number, name = tempfile.mkstemp(prefix=f"{os.path.basename(path)}.", dir=folder)
        try:
            with os.fdopen(number, "wb") as file:
                yield file
                file.flush()
                os.fsync(number)
            os.rename(name, path)
            _sync(folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        click.echo(f"capture-agent: {path}: cannot be written: {error.strerror or error}", err=True)
        click.echo(f"  try: a folder with room that you may write, instead of {folder}", err=True)
        raise SystemExit(1) from None


def _sync(folder: str) -> None:
    """Make a rename last."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
