"""`capture-agent check`: validates a configuration and prints it as it is in force."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from agent.cli.options import config_option, load_config, plainly

if TYPE_CHECKING:
    from agent.config import Config, Settings


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(config_file: str | None, as_json: bool) -> None:
    """Validate a configuration and print it resolved: every default in its place, secrets as ***.

    Every mistake is told at once, each with its place; the exit code is then 2.
    """
    from agent.accept.source import try_source
    from agent.checks import warnings
    from agent.ways_out import try_ways_out

    config = load_config(config_file)
    with plainly():
        try_ways_out(config)
        for source in config.sources:
            try_source(source)
    for place, what in warnings(config):
        click.echo(f"warning: {place}: {what}", err=True)
    if as_json:
        import msgspec

        document = msgspec.json.encode(config, enc_hook=str)
        click.echo(msgspec.json.format(document, indent=2).decode())
        return
    click.echo("\n".join(resolved(config)))


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
