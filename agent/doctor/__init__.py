"""Examines an agent's surroundings, with it or without it, and says what is wrong and what to do.

It changes nothing, sends no event, and comes to an end: what looks at disks runs in threads that are left
behind when they hang, what asks the network has deadlines, and all of it goes on at once.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import trio

from agent import AgentError
from agent.accept.source import try_source
from agent.checks import warnings
from agent.config import Config
from agent.doctor import access, doors, kernel, live, reach, room, store
from agent.doctor.finding import Finding, error, healthy, ok, warning

__all__ = ["Finding", "before_threads", "error", "examine", "healthy", "ok", "warning"]

Status = Mapping[str, Any]

# A look at a disk takes milliseconds, or the two seconds that a large buffer may take; beyond that it hangs.
DISK_SECONDS = 6.0
# Between two looks at the agent's counters; no longer than PostHog's answer from another continent may take.
RATE_SECONDS = 0.5


def before_threads(
    config: Config, status: Status | None, who: access.Person | None, *, silent: bool
) -> Iterator[Finding]:
    """What is found without waiting; it forks, so it comes before `examine`.

    `silent` is an agent that may run, though it tells us nothing.
    """
    for place, what in warnings(config):
        yield warning("configuration", place, what, "mend the configuration, or leave it so if it is meant")
    for source in config.sources:
        try:
            try_source(source)
        except AgentError as failed:
            yield error("configuration", f"source {source.name}", str(failed), failed.hint)
    yield from doors.groups(config)
    for door in doors.doors(config, status):
        yield from doors.look(door, who, running=status is not None, silent=silent)


async def examine(
    config: Config,
    status: Status | None,
    again: Callable[[], Status | None],
    own: Sequence[str],
    *,
    silent: bool,
    keys: bool,
) -> list[Finding]:
    """What is found by looking at disks, at the agent's counters, and at PostHog.

    `status` is a running agent's, `again` asks for it anew. `own` are folders that the agent makes itself.
    The buffer of an agent that is `silent` is its own affair. Without `keys` the projects' keys are not to be
    had.
    """
    parts: list[list[Finding]] = [[] for _ in range(3 + len(config.projects))]

    async def project(place: int) -> None:
        settings = config.projects[place]
        delivers = live.takes(status, settings.name)
        parts[3 + place].extend(await reach.ask(settings, key=keys, delivers=delivers))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_on_disk, parts[0], "the disk", partial(_disk, config))
        if config.buffer.kind == "sqlite" and not silent:
            look = partial(_file, config, status, own)
            nursery.start_soon(_on_disk, parts[1], config.buffer.path, look)
        nursery.start_soon(_counters, parts[2], config, status, again)
        for place in range(len(config.projects)):
            nursery.start_soon(project, place)
    return [store.sqlite_version(sqlite3.sqlite_version_info), *(found for part in parts for found in part)]


async def _on_disk(found: list[Finding], where: str, look: Callable[[], list[Finding]]) -> None:
    """Look in a thread, which is left behind where the disk does not answer."""
    with trio.move_on_after(DISK_SECONDS) as patience:
        found += await trio.to_thread.run_sync(look, abandon_on_cancel=True)
    if patience.cancelled_caught:
        hint = "look for its errors (dmesg), or for a file server that is gone"
        found.append(error("disk", where, f"no answer within {DISK_SECONDS:g} s", hint))


def _disk(config: Config) -> list[Finding]:
    return list(room.look(config))


def _file(config: Config, status: Status | None, own: Sequence[str]) -> list[Finding]:
    """The buffer's file and who owns it."""
    path = config.buffer.path
    owner = store.owner_of(path)
    if status is None and owner is not None:
        what = f"process {owner or 'unknown'} owns this buffer, but no agent answers at {config.admin.socket}"
        hint = "stop that agent, or give this one a buffer.path of its own, or the doctor that one's --config"
        return [error("agent", path, what, hint)]
    if status is None:
        return list(store.look(config.buffer, made=os.path.dirname(path) in own))
    its = status["buffer"]["path"]
    if owner and owner != status["pid"] and its != path:
        what = f"process {owner} owns this buffer, and process {status['pid']} answers: there are two agents"
        hint = "stop one of them, or give each its own configuration with a buffer.path and an admin.socket"
        return [error("agent", path, what, hint)]
    return []


async def _counters(
    found: list[Finding], config: Config, status: Status | None, again: Callable[[], Status | None]
) -> None:
    """The kernel's limits, against the rate that the running agent sees."""
    later = None
    if status is not None:
        await trio.sleep(RATE_SECONDS)
        later = await trio.to_thread.run_sync(again, abandon_on_cancel=True)
    rmem_max, queue = kernel.limit(kernel.BUFFER_LIMIT), kernel.limit(kernel.QUEUE_LIMIT)
    found += kernel.look(config, rmem_max, queue, status, later or status)
