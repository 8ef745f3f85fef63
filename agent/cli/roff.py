"""Writes a command's texts as a manual page in man(7)'s roff."""

from collections.abc import Iterator, Sequence
from inspect import cleandoc

import click

from agent.cli.options import SYSTEM_FILE

NAME = "capture-agent"
SUMMARY = "delivers events of local processes to PostHog, and loses none"

# What no command says of itself.
EXIT_CODES = (
    ("0", "Done."),
    ("1", "Failed."),
    ("2", "Usage or configuration."),
    ("3", "No agent is running."),
    ("75", "Try again: the buffer is full, or locked by another agent."),
)
FILES = (
    (SYSTEM_FILE, "The configuration, where --config names none."),
    ("/run/capture-agent/", "The sockets: events.sock, events.dgram and admin.sock."),
    ("/var/lib/capture-agent/buffer.db", "The buffer."),
)
ENVIRONMENT = (
    ("CAPTURE_AGENT_API_KEY", "The first project's key."),
    ("CAPTURE_AGENT_HOST", "The first project's host."),
    (
        "CAPTURE_AGENT_SECTION__KEY",
        "Any setting, in capitals, such as CAPTURE_AGENT_BUFFER__MAX_SIZE.",
    ),
    ("HTTPS_PROXY, NO_PROXY", "The way out, where delivery.proxy is not set."),
)


def page(group: click.Group, *, version: str, day: str) -> str:
    """The whole page; `day` as in 2026-12-31."""
    return "\n".join(_page(group, version, day)) + "\n"


def _page(group: click.Group, version: str, day: str) -> Iterator[str]:
    context = click.Context(group, info_name=NAME)
    yield f'.TH {NAME.upper()} 1 {day} "{NAME} {version}" "User Commands"'
    yield ".SH NAME"
    yield f"{_text(NAME)} \\- {_text(SUMMARY)}"
    yield ".SH SYNOPSIS"
    yield f".B {_text(NAME)}"
    yield _text("[OPTIONS] COMMAND [ARGS]...")
    yield ".SH DESCRIPTION"
    yield from _paragraphs(group.help or "")
    yield ".SH OPTIONS"
    yield from _options(group, context)
    yield from _entry("-h, --help", "Show a help text; after a command, that command's.")
    yield ".SH COMMANDS"
    for name in group.list_commands(context):
        yield from _command(group, name, context)
    for title, entries in (("EXIT STATUS", EXIT_CODES), ("FILES", FILES), ("ENVIRONMENT", ENVIRONMENT)):
        yield f".SH {title}"
        for term, text in entries:
            yield from _entry(term, text)


def _command(group: click.Group, name: str, above: click.Context) -> Iterator[str]:
    """A verb, and after it those under it."""
    command = group.get_command(above, name)
    if command is None or command.hidden:
        return
    context = click.Context(command, info_name=name, parent=above)
    yield f'.SS "{_text(context.command_path.removeprefix(f"{NAME} "))}"'
    yield f".B {_text(context.command_path)}"
    yield _text(" ".join(command.collect_usage_pieces(context)))
    yield ".PP"
    yield from _paragraphs(command.help or "")
    yield from _options(command, context)
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            yield from _command(command, inner, context)


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.params:  # without --help, which all have
        if (told := parameter.get_help_record(context)) is not None and told[1]:
            yield from _entry(*told)


def _entry(term: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield f".B {_text(term)}"
    yield _text(text)


def _paragraphs(text: str) -> Iterator[str]:
    """Help's paragraphs; one that begins with a line of \\b stays in its lines, as click has it."""
    started = False
    for paragraph in cleandoc(text).split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line]
        if started:
            yield ".PP"
        started = True
        if lines[:1] == ["\b"]:
            yield from (".nf", *_all(lines[1:]), ".fi")
        else:
            yield from _all(lines)


def _all(lines: Sequence[str]) -> Iterator[str]:
    return map(_text, lines)


def _text(text: str) -> str:
    """A text that roff prints as it is: no escapes, no requests, and dashes that can be copied."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped
