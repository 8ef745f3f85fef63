"""`capture-agent doctor`: finds what is wrong, and says what to do."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from agent.cli.options import config_option, plain, plainly, read_config, read_text
from agent.cli.places import folders
from agent.cli.reach import ask_status, find_socket

if TYPE_CHECKING:
    from agent.config import Config
    from agent.doctor import Finding
    from agent.doctor.access import Person

# Where systemd keeps the credentials of the unit's process, for root to see (systemd.exec(5)).
UNIT_CREDENTIALS = "/run/credentials/capture-agent.service"
# How what is wrong with a key itself begins (`agent/checks.py`); else it is not to be had.
OF_A_KEY_ITSELF = ("is ", "holds ")
COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}

Status = Mapping[str, Any]


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--as", "user", metavar="USER", help="Check that this user may send, e.g. www-data.")
def command(config_file: str | None, as_json: bool, user: str | None) -> None:
    """Find what is wrong with the agent, its configuration and its surroundings, and say what to do.

    It asks the agent, if one runs, and looks at its files itself where none does. It asks PostHog one
    question with each project's key. It sends no event and changes nothing. As root it sees most.

    The exit code is 1 where anything is an error.
    """
    import sys

    from agent.doctor import healthy
    from agent.doctor.access import person

    with plainly():
        who = person(user) if user is not None else None
    if sys.stderr.isatty() and not as_json:
        from rich.console import Console

        with Console(stderr=True).status("looking, and asking PostHog"):
            findings = _findings(config_file, who)
    else:
        findings = _findings(config_file, who)
    if as_json:
        _print_json(findings)
    else:
        click.echo("\n".join(_lines(findings)))
    raise SystemExit(0 if healthy(findings) else 1)


def _findings(config_file: str | None, who: "Person | None") -> "list[Finding]":
    """Everything, in the order in which a person would go through it."""
    import trio

    from agent.doctor import before_threads, examine, warning
    from agent.trust import exposed, user_of

    config, findings = _configuration(config_file)
    keys = config is not None and all(project.api_key is not None for project in config.projects)
    if config is None:
        return findings
    path = config.admin.socket
    if not os.path.exists(path):  # without a file, the agent may be another user's
        path = find_socket(config_file, "admin.sock", needed=False)
    status, silent, said = _ask_agent(config, path)
    findings = [_unless_the_agents(mistake, agent=silent or status is not None) for mistake in findings]
    findings += said
    findings += [
        warning("permissions", *found) for found in exposed(config, read_text(config_file), user_of(config))
    ]
    findings += before_threads(config, status, who, silent=silent)
    place = folders()
    again = partial(_again, path)
    own = (place.state, place.runtime)
    findings += trio.run(partial(examine, config, status, again, own, silent=silent, keys=keys))
    return findings


def _configuration(config_file: str | None) -> "tuple[Config | None, list[Finding]]":
    """The configuration, without keys where only these are wrong or not to be had; and each mistake in it."""
    from agent.config import ConfigError
    from agent.doctor import error

    env = {"CREDENTIALS_DIRECTORY": UNIT_CREDENTIALS} if os.path.isdir(UNIT_CREDENTIALS) else {}
    env |= os.environ
    try:
        return read_config(config_file, env=env), []
    except ConfigError as mistakes:
        findings = [
            error("configuration", *_parted(line), mistakes.hint) for line in str(mistakes).splitlines()
        ]
    try:
        return read_config(config_file, keys=False, env=env), findings
    except ConfigError:
        return None, findings


def _unless_the_agents(mistake: "Finding", *, agent: bool) -> "Finding":
    """An agent has its key by an environment or credential of its own, though we have none.

    One that does not run is none that needs it: what systemd will pass to its unit cannot be seen before.
    """
    from agent.doctor import warning
    from agent.references import NO_CREDENTIALS

    if not mistake.where.endswith(".api_key") or mistake.what.startswith(OF_A_KEY_ITSELF):
        return mistake
    what = f"the key cannot be read here, so it is not checked: {mistake.what}"
    if agent:
        hint = "run the doctor as root, or with the agent's environment; the running agent has its own"
        return warning(mistake.check, mistake.where, what, hint)
    if mistake.what.startswith(NO_CREDENTIALS):
        hint = "start the agent and look again as root, or give the doctor the key as CAPTURE_AGENT_API_KEY"
        return warning(mistake.check, mistake.where, what, hint)
    return mistake


def _parted(line: str) -> tuple[str, str]:
    """A mistake's place and what is wrong there."""
    parts = line.split(": ", 2)
    return (": ".join(parts[:2]), parts[2]) if len(parts) == 3 else ("the configuration", line)


def _ask_agent(config: "Config", path: str) -> "tuple[Status | None, bool, list[Finding]]":
    """The running agent's status, where it tells it; whether one may run silently; what to say of that."""
    from agent.doctor import error, warning
    from agent.doctor.live import look

    if not path:
        hint = "set admin.socket, so that commands can ask the agent"
        what = "the configuration has none: no agent can be asked"
        return None, False, [warning("agent", "admin.socket", what, hint)]
    try:
        status: Status = json.loads(ask_status(path))
    except PermissionError:
        hint = "run the doctor as root or as a member of the socket's group"
        return None, True, [warning("agent", path, "this user may not ask the agent", hint)]
    except (FileNotFoundError, ConnectionRefusedError):
        hint = "start it: systemctl start capture-agent, or capture-agent run"
        return None, False, [warning("agent", path, "no agent is running", hint)]
    except (OSError, ValueError) as failed:
        hint = "look at its log (journalctl -u capture-agent), and restart it if it hangs"
        return None, True, [error("agent", path, f"the agent does not answer: {failed}", hint)]
    try:
        return status, False, list(look(config, status, path))
    except (KeyError, TypeError, AttributeError):  # a document of other fields
        hint = "give the agent and this command the same version; see what listens there: ss -xlp"
        return None, True, [error("agent", path, "what answers is no agent of this version", hint)]


def _again(path: str) -> Status | None:
    try:
        status: Status = json.loads(ask_status(path))
    except (OSError, ValueError):  # it has ended meanwhile, which the first look could not say
        return None
    return status


def _print_json(findings: "Sequence[Finding]") -> None:
    import msgspec

    from agent.doctor import healthy

    document = {"healthy": healthy(findings), "findings": findings}
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def _lines(findings: "Sequence[Finding]") -> Iterator[str]:
    """A line for each finding, with the next step under it; what a terminal could obey is escaped."""
    for finding in findings:
        level = click.style(f"{finding.level:8}", fg=COLOURS[finding.level], bold=finding.level == "error")
        yield f"{level}{plain(f'{finding.check}: {finding.where}: {finding.what}')}"
        if finding.hint:
            yield f"          try: {plain(finding.hint)}"
    errors, warned = (sum(finding.level == level for finding in findings) for level in ("error", "warning"))
    yield f"{_count(errors, 'error')}, {_count(warned, 'warning')}"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
