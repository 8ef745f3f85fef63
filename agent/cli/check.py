"""`capture-agent check`: validates a configuration and prints it as it is in force."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO

import click

from agent.cli.options import config_option, load_config, plainly, read_text

if TYPE_CHECKING:
    from agent.accept.explain import Explanation
    from agent.config import Config, Settings

# What `run` loads, at once and late.
OF_RUN = ("agent.cli.run", "agent.logs", "agent.app", "agent.outside", "agent.accept.http")


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--explain",
    "example",
    metavar="FILE",
    type=click.File("rb"),
    help="Tell what becomes of the event in FILE (- is stdin) at each source; exits 1 where none takes it.",
)
@click.option("--source", "only", metavar="NAME", help="With --explain: at this source only.")
def command(config_file: str | None, as_json: bool, example: BinaryIO | None, only: str | None) -> None:
    """Validate a configuration and print it resolved: every default in its place, secrets as ***.

    Every mistake is told at once, each with its place; the exit code is then 2.
    """
    from agent.accept.source import try_source
    from agent.checks import warnings
    from agent.trust import exposed, user_of
    from agent.ways_out import try_ways_out

    if only is not None and example is None:
        raise click.UsageError("--source is for --explain: it says whose view of the event is wanted.")
    config = load_config(config_file)
    with plainly():
        _load_the_rest()
        try_ways_out(config)
        for source in config.sources:
            try_source(source)
    for place, what in warnings(config):
        click.echo(f"warning: {place}: {what}", err=True)
    with plainly():
        for found in exposed(config, read_text(config_file), user_of(config)):
            click.echo(f"warning: {found.path}: {found.what}: {found.hint}", err=True)
    if example is not None:
        raise SystemExit(_explain(config, example.read(), only, as_json=as_json))
    if as_json:
        import msgspec

        document = msgspec.json.encode(config, enc_hook=str)
        click.echo(msgspec.json.format(document, indent=2).decode())
        return
    click.echo("\n".join(resolved(config)))


def _load_the_rest() -> None:
    """Load what `run` does. Raises `AgentError` where the installation is not whole.

    It is told now: an agent that is to be replaced has this command ask whether the new version can run.
    """
    from importlib import import_module

    from agent import AgentError

    try:
        for name in OF_RUN:
            import_module(name)
    except (ImportError, SyntaxError) as error:
        raise AgentError(f"this version cannot run: {error}", "install it anew") from error


def resolved(config: "Config") -> Iterator[str]:
    """The configuration as a file would say it, with nothing left to defaults."""
    from agent.source_checks import SOCKET_UNIT

    several = len(config.projects) > 1
    for project in config.projects:
        yield "[[project]]" if several else "[project]"
        yield from _settings(project, without=("delivery",))
        yield ""
        yield "[project.delivery]" if several else "[delivery]"
        yield from _settings(project.delivery)
        yield ""
    for source in config.sources:
        yield "[[source]]"
        yield f'kind = "{source.__struct_config__.tag}"'
        yield from _settings(source, without=tuple(SOCKET_UNIT) if source.socket else ())
        yield ""
    for name, part in (("buffer", config.buffer), ("admin", config.admin), ("log", config.log)):
        yield f"[{name}]"
        yield from _settings(part)
        yield ""


def _explain(config: "Config", text: bytes, only: str | None, *, as_json: bool) -> int:
    """Tell what becomes of an example event; the exit code."""
    import msgspec

    from agent.accept.explain import explain
    from agent.clock import Clock

    if _several(text):
        raise click.UsageError("There are several events in the file: --explain takes one.")
    names = [source.name for source in config.sources]
    if only is not None and only not in names:
        raise click.UsageError(f"There is no source {only!r}. There are: {', '.join(names)}.")
    projects = {project.name: project for project in config.projects}
    at = Clock().now()
    found = [
        explanation
        for source in config.sources
        if only in (None, source.name)
        and (explanation := explain(source, projects[source.project], text, at)) is not None
    ]
    if not found:
        raise click.UsageError("There is no event in the file for --explain.")
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        click.echo("\n".join(line for explanation in found for line in _told(explanation)))
    return 0 if any(explanation.accepted for explanation in found) else 1


def _several(text: bytes) -> bool:
    """Whether these are JSON lines: the first one is an event, and it is not the last."""
    first, _, rest = text.strip().partition(b"\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _told(explanation: "Explanation") -> Iterator[str]:
    import msgspec

    if not explanation.accepted:
        why = f": {explanation.why}" if explanation.why else ""
        yield f"{explanation.source}: refused as {explanation.reason}{why}"
        return
    yield f"{explanation.source}: accepted"
    for change in explanation.changes:
        yield f"  {change.where}: {change.what}"
    if explanation.event is not None:
        stored = msgspec.json.format(bytes(explanation.event), indent=2).decode()
        yield from (f"  {line}" for line in stored.splitlines())


def _settings(settings: "Settings", without: tuple[str, ...] = ()) -> Iterator[str]:
    import msgspec

    from agent.units import format_duration, format_size
    from agent.values import unit_of

    for field in msgspec.structs.fields(settings):
        if field.name in without:
            continue
        value = getattr(settings, field.name)
        match unit_of(field.type):
            case "size":
                text = f'"{format_size(value)}"'
            case "duration":
                text = f'"{format_duration(value)}"'
            case _:
                text = f"{value:#o}" if field.name == "mode" else _toml(value)
        yield f"{field.name} = {text}"


def _toml(value: object) -> str:
    """A value in TOML; its texts are written as JSON's are."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case Mapping():
            pairs = ", ".join(f"{json.dumps(name)} = {_toml(inner)}" for name, inner in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case _:  # a secret is told as ***
            return json.dumps(str(value), ensure_ascii=False)
