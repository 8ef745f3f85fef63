"""What the verbs share: finding and loading the configuration, and telling errors plainly."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from agent.cli.places import folders

if TYPE_CHECKING:
    from agent import AgentError
    from agent.config import Config, Text

SYSTEM_FILE = "/etc/capture-agent/config.toml"
# What stands for the file in messages where there is none.
NO_FILE = "defaults and environment"
# A configuration has some KiB, a key some bytes: a file with more is another one, and may be without an end.
MOST_BYTES = 1024 * 1024


def _chosen(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """The file given after the verb, else the one given before it."""
    before: str | None = ctx.find_root().obj
    return value if value is not None else before


config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    callback=_chosen,
    help=f"The configuration [default: {SYSTEM_FILE} where it exists].",
)


# Every verb takes the option, so that a wrapper may always give it; these verbs have no use for it.
unused_config_option = click.option(
    "--config", metavar="FILE", expose_value=False, help="Taken by every command; this one needs none."
)


def plain(text: str) -> str:
    """What a terminal could obey is escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def plainly() -> Iterator[None]:
    """Tell an `AgentError` in two lines on stderr, what is wrong and what to do, and exit with its code."""
    from agent import AgentError

    try:
        yield
    except AgentError as error:
        _tell(error)
    except BaseExceptionGroup as group:
        errors, others = group.split((AgentError, BrokenPipeError))
        if errors is None or others is not None:
            raise
        first = _first(errors)
        if isinstance(first, AgentError):
            _tell(first)
        raise first from None  # nobody reads our output any more: click ends the command without a word


def _first(error: BaseException) -> BaseException:
    """Any of the errors that a nursery gathered; the others say the same or follow from it."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _tell(error: "AgentError") -> None:
    from agent.config import ConfigError

    # A configuration's mistakes have the file's name in front, one a line.
    click.echo(str(error) if isinstance(error, ConfigError) else f"capture-agent: {error}", err=True)
    if error.hint:
        click.echo(f"  try: {error.hint}", err=True)
    raise SystemExit(error.exit_code)


def load_config(config_file: str | None, *, keys: bool = True) -> "Config":
    """The configuration in force. Exits 2 with every mistake when it is not valid.

    Without `keys` it works for those who may not read the projects' keys.
    """
    with plainly():
        return read_config(config_file, keys=keys)
    raise AssertionError("unreachable: plainly exits")


def read_config(
    config_file: str | None, *, keys: bool = True, env: Mapping[str, str] = os.environ
) -> "Config":
    """The configuration in force. Raises `ConfigError` with every mistake when it is not valid."""
    return understood(read_text(config_file), keys=keys, env=env)


def read_text(config_file: str | None) -> "Text":
    """What the configuration's file says; nothing where there is none. Raises `ConfigError`."""
    from agent.config import ConfigError, Text

    file = config_file or (SYSTEM_FILE if os.path.exists(SYSTEM_FILE) else None)
    if file is None:
        return Text(NO_FILE, "")
    try:
        return Text(file, _content(file))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", "give the file with --config FILE") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 (byte {error.start})", "save it as UTF-8") from error


def _content(file: str) -> str:
    """What is in a file of text. Raises `OSError`, also where it is far too large."""
    import errno

    with open(file, "rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), file)
    return content.decode()


def understood(text: "Text", *, keys: bool = True, env: Mapping[str, str] = os.environ) -> "Config":
    """The configuration that a text says on this host. Raises `ConfigError` with every mistake."""
    import socket

    from agent.load import Surroundings, load

    around = Surroundings(
        env=env,
        paths=folders(),
        hostname=socket.gethostname(),
        read_text=_content,
    )
    return load(text.text, around, file=text.file, keys=keys)
