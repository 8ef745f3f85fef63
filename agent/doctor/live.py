"""What a running agent says of itself, read as a doctor would."""

from collections.abc import Iterator, Mapping
from typing import Any

from agent import __version__
from agent.advice import AWAY, FOREIGN_KEYS, HOLDS, WHEN_FULL
from agent.config import Config
from agent.doctor.finding import Finding, error, ok, warning

# The document is the agent's own JSON: its fields are what `agent/status.py` says.
Status = Mapping[str, Any]

# From here on it is time to look, and still time to act.
NEARLY_FULL = 0.8


def look(config: Config, status: Status, at: str) -> Iterator[Finding]:
    """Findings of a status document that came from the socket `at`."""
    up = f"capture-agent {status['version']} runs as process {status['pid']}"
    if status["state"] != "running":
        yield warning(
            "agent", at, f"{up}, and is {status['state']}", "wait until it has stopped, then look again"
        )
    elif status["version"] != __version__:
        hint = "restart the agent, or install the same version for both"
        yield warning("agent", at, f"{up}; this command is of version {__version__}", hint)
    else:
        yield ok("agent", at, up)
    yield from _buffer(config, status["buffer"])
    for source in status["sources"]:
        yield from _source(source)
    for project in status["projects"]:
        yield from _host(config, project)
        yield from _project(project)


def _host(config: Config, project: Status) -> Iterator[Finding]:
    """A project that the running agent sends elsewhere: what is asked on the network is another way."""
    name, used = project["name"], project["host"]
    said = next((one.host for one in config.projects if one.name == name), used)
    if said != used:
        what = f"the running agent sends to {used}, the configuration's host is {said}"
        hint = "reload the agent, or give the doctor its configuration (--config FILE) and environment"
        yield warning("agent", f"project {name}", what, hint)


def _buffer(config: Config, buffer: Status) -> Iterator[Finding]:
    where = buffer["path"] or "in memory"
    if buffer["path"] and buffer["path"] != config.buffer.path:
        what = f"the running agent's buffer is {buffer['path']}, the configuration's is {config.buffer.path}"
        yield warning(
            "agent", where, what, "restart the agent, or give the doctor its configuration (--config FILE)"
        )
    if buffer["trouble"]:
        what = f"it cannot be written, and senders wait: {buffer['trouble']}"
        yield error(
            "buffer", where, what, "make room on the disk, or mend it; the agent tries again every second"
        )
    share = buffer.get("filled", 0.0)  # an agent that is older than this command does not say it
    holds = f"{buffer['events']:,} events wait, {share:.0%} of the room for them is used"
    hint = "see why nothing is delivered (below), or raise buffer.max_size"
    if buffer["waiting"] and not buffer["trouble"]:
        yield error("buffer", where, f"it is full, and {buffer['waiting']} puts wait for room; {holds}", hint)
    elif (dropped := buffer.get("dropping")) and not buffer["trouble"]:
        what = f"it is full, and {WHEN_FULL[buffer['when_full']]}: {dropped:,} so far; {holds}"
        yield error("buffer", where, what, hint)
    elif share >= NEARLY_FULL:
        yield warning("buffer", where, holds, hint)
    elif not buffer["trouble"]:
        yield ok("buffer", where, holds)
    if count := buffer["dead_letters"]:
        yield warning(
            "dead letters", where, f"PostHog refused {count:,} events", "capture-agent dead-letter list"
        )


def _source(source: Status) -> Iterator[Finding]:
    refused = {reason: count for reason, count in source["rejected"].items() if count}
    if refused and not source["accepted"]:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(refused.items()))
        what = f"not one event was taken, all were refused ({reasons})"
        hint = "`capture-agent status` shows the last; `capture-agent check --explain FILE` tries one"
        yield warning("source", f"source {source['name']}", what, hint)


def _project(project: Status) -> Iterator[Finding]:
    where = f"project {project['name']}"
    if held := project["held"]:
        why = f": {held['why']}" if held["why"] else ""
        yield error(
            "delivery", where, f"held ({held['reason']}){why}; events wait", HOLDS.get(held["reason"], AWAY)
        )
    elif project["next_try_seconds"] is not None:
        last = project["last_error"]
        what = f"{project['failures']} requests failed in a row" + (
            f", the last: {last['text']}" if last else ""
        )
        yield warning("delivery", where, what, AWAY)
    else:
        yield ok("delivery", where, f"flows; {project['delivered']:,} events were delivered")
    for other in project["held_keys"]:
        what = f"{other['keys']} keys that clients sent are held ({other['reason']}); their events wait"
        yield warning("delivery", where, what, FOREIGN_KEYS)


def takes(status: Status | None, project: str) -> bool:
    """Whether PostHog took the last that the running agent sent of this project."""
    return status is not None and any(
        told["name"] == project and told["requests"].get("200") and not told["held"] and not told["failures"]
        for told in status["projects"]
    )
