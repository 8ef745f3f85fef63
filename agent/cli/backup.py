"""`capture-agent backup`: a consistent copy of the buffer's database."""

import os
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

import click

from agent.cli.asking import asked, parts_of, progress
from agent.cli.options import config_option, read_config

if TYPE_CHECKING:
    import httpx

# The first byte comes when the agent has its copy; a disk that copies 10 MB/s takes so long for 10 GiB.
PATIENCE_SECONDS = 1200.0

LOCK = ".lock"
# How a database begins: `MAGIC` of the buffer, of which a command knows nothing.
DATABASE = b"SQLite format 3\0"
# What the files are called that are named after a buffer: SQLite's, the agent's, and evidence.
BESIDE = ("-wal", "-shm", "-journal", LOCK, ".reserve", ".new", ".again", ".copy-", ".damaged-")


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(file: str, config_file: str | None, as_json: bool) -> None:
    """Copy the buffer's database to FILE, as it is at one moment, while the agent goes on.

    Beside what waits it holds the dead letters and the books. FILE is replaced only when the copy is whole
    and on disk, and only where it is a database or empty; a device, a pipe, a socket or a link stays. Of an
    agent that does not run the file is copied.
    """
    size = 0
    _refuse_the_buffers(file, config_file)
    _refuse_what_is_no_copy(file)
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


def _refuse_the_buffers(path: str, config_file: str | None) -> None:
    """Exit 2 where a copy of this name would replace a buffer, its log, or what else is named after it."""
    named = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    for place in (named, os.path.realpath(path)):
        for buffer in (*_configured(config_file), *_locked(os.path.dirname(place))):
            if place == buffer or (place.startswith(buffer) and place[len(buffer) :].startswith(BESIDE)):
                text = f"capture-agent: {path}: is an agent's buffer or a file of its own ({buffer})"
                click.echo(text, err=True)
                click.echo("  try: another name for the copy", err=True)
                raise SystemExit(2)


def _refuse_what_is_no_copy(path: str) -> None:
    """Exit 2 where what has this name is neither a database nor empty: a configuration, a key, a device."""
    what = ""
    with suppress(OSError):  # what cannot be read is told by who replaces it
        if not stat.S_ISREG(os.lstat(path).st_mode):  # a device or a pipe is not even opened
            what = "is no file"
        else:
            with open(path, "rb") as file:
                begin = file.read(len(DATABASE))
            what = "is no database" if begin and begin != DATABASE else ""
    if what:
        click.echo(f"capture-agent: {path}: {what}, and would be lost", err=True)
        click.echo("  try: another name for the copy", err=True)
        raise SystemExit(2)


def _configured(config_file: str | None) -> set[str]:
    """The buffer of the configuration, by its name and where that leads; none where it cannot be read."""
    from agent.config import ConfigError

    try:
        path = read_config(config_file, keys=False).buffer.path
    except ConfigError:  # whoever asks the agent tells it
        return set()
    folder, name = os.path.split(path)
    return {os.path.join(os.path.realpath(folder), name), os.path.realpath(path)}


def _locked(folder: str) -> list[str]:
    """Every buffer in a folder, whoever's it is: its lock is beside it."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [os.path.join(folder, name.removesuffix(LOCK)) for name in names if name.endswith(LOCK)]


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A file that takes this name at the end of the block, on disk; where the block fails there is none.

    A timer's SIGTERM is as good as Ctrl-C: else it would leave half a copy behind each time.
    """
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
