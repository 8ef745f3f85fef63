"""Replaces the agent by a new one with a new configuration, or a new version, and loses nothing on the way.

Whatever can fail is tried while the agent still works: a process of the installed version reads the
configuration, and sockets that it has more are opened. Then the agent leaves what it has under way, and the
process replaces itself.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from socket import socket
from typing import NamedTuple, NoReturn, TypeVar

import trio

from agent import AgentError, crash
from agent.accept.handed import place_of
from agent.accept.inherit import WANTED
from agent.accept.sockets import FileGone, SocketError, dressed
from agent.accept.source import Source, bound
from agent.config import Config, ConfigError, Text, Unix
from agent.handover import VARIABLE, Handover, left
from agent.page_sockets import TCP, admin_places, page_socket
from agent.source_checks import ADMIN_SOCKET
from agent.systemd import Bound, Passed

# To read a configuration and look up certificates takes half a second; a busy host may take many times that.
CHECK_SECONDS = 60.0
# Of what the check said, for logs and pages: a screen.
TOLD_CHARACTERS = 2000
# How commands tell an error, and what to do about it (`cli/options.py`).
NAMED, TRY = "capture-agent: ", "\n  try: "

T = TypeVar("T")


class ReloadRefused(AgentError):
    """The agent cannot be replaced now; it goes on as it is."""


class Anew(NamedTuple):
    """How the configuration is read again: its text, what that means here, and a command that checks it.

    The command is of the version that is installed now.
    """

    text: Callable[[], Text]
    understood: Callable[[Text], Config]
    check: Sequence[str]


class Plan(NamedTuple):
    """What the next agent will have: its settings, their text, and sockets that are opened for it already."""

    config: Config
    text: Text
    opened: Sequence[tuple[Bound, int]]

    @property
    def places(self) -> frozenset[Bound]:
        """Where it will listen."""
        return frozenset((*map(place_of, self.config.sources), *admin_places(self.config.admin)))

    def close(self) -> None:
        """It will not come to that."""
        for place, descriptor in self.opened:
            os.close(descriptor)
            if place.kind.startswith("unix"):
                os.unlink(place.place)


async def planned(
    config: Config, passed: Passed, anew: Anew, lost: Callable[[], Mapping[Bound, str]]
) -> Plan:
    """Try everything that can fail. Raises `AgentError`, and then nothing has changed.

    `lost` tells where clients do not find the agent's socket now, and why.
    """
    if config.buffer.kind == "memory":
        raise ReloadRefused("the buffer is in memory, and would be lost", "restart the agent instead")
    try:
        with trio.fail_after(CHECK_SECONDS):
            text, new = await _read_anew(anew)
    except trio.TooSlowError:
        hint = "is the host very busy, or a file's disk away? run `capture-agent check` by hand"
        raise ReloadRefused(f"the check took longer than {CHECK_SECONDS:.0f} s", hint) from None
    if new is None:
        return Plan(config, text, ())
    if not _same_buffer(config, new):
        raise ReloadRefused(
            f"buffer.path: the events in {config.buffer.path} would be left behind",
            "stop the agent, move the file (and its -wal, if there is one), and start the agent again",
        )
    try:
        return Plan(new, text, _open_new(config, new, passed, lost()))
    except FileGone as error:
        raise ReloadRefused(str(error), error.hint) from error
    except SocketError as error:
        hint = f"{error.hint}; where this agent itself is in the way, restart it"
        raise ReloadRefused(str(error), hint) from error


async def _read_anew(anew: Anew) -> tuple[Text, Config | None]:
    """The text, and what it means here: None where only a newer version knows, which opens all for itself."""
    text = await _aside(anew.text)
    await _checked(anew.check)
    crash.point("reload.checked")
    if await _aside(anew.text) != text:
        raise ReloadRefused(f"{text.file}: it was changed while it was read", "reload again")
    try:
        return text, await _aside(partial(anew.understood, text))
    except ConfigError:
        return text, None


async def _aside(read: Callable[[], T]) -> T:
    """Read files in a thread, which is left where one never comes to its end (a FIFO, a lost disk)."""
    return await trio.to_thread.run_sync(read, abandon_on_cancel=True)


def _same_buffer(old: Config, new: Config) -> bool:
    """Whether the events stay where they are."""
    same = os.path.realpath(old.buffer.path) == os.path.realpath(new.buffer.path)
    return same and old.buffer.kind == new.buffer.kind


async def _checked(check: Sequence[str]) -> None:
    """Have the version that is installed now read the configuration. Raises `ReloadRefused`."""
    try:
        done = await trio.run_process(
            check,
            stdin=subprocess.DEVNULL,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            deliver_cancel=_kill,
        )
    except OSError as error:
        hint = "is the agent still installed where it was started from?"
        raise ReloadRefused(f"{check[0]}: {error.strerror}", hint) from error
    if done.returncode:
        told, _, hint = done.stderr.decode(errors="replace").strip().partition(TRY)
        told = told.removeprefix(NAMED) or f"the check ended with {done.returncode}"
        otherwise = "mend it" if done.returncode == ConfigError.exit_code else "install the agent anew"
        raise ReloadRefused(told[-TOLD_CHARACTERS:], hint or f"{otherwise}, and reload again")


async def _kill(process: trio.Process) -> None:
    """It has nothing to put in order, and holds signals as the agent does."""
    process.kill()


def _open_new(old: Config, new: Config, passed: Passed, lost: Mapping[Bound, str]) -> list[tuple[Bound, int]]:
    """Open what the new configuration has more. Raises `AgentError`."""
    having = [*map(place_of, old.sources), *admin_places(old.admin)]
    with ExitStack() as stack:
        made: list[tuple[Bound, socket]] = []
        for settings in new.sources:
            place = place_of(settings)
            if settings.socket:
                passed.expect(settings.socket, WANTED[type(settings)], f"source {settings.name}")
            elif place in having:
                having.remove(place)
                if place in lost:  # what is there is not the agent's to change, nor to hand on
                    hint = "the agent tries each second to make the file anew: reload again when it has"
                    raise ReloadRefused(lost[place], hint)
                if isinstance(settings, Unix):
                    stack.enter_context(dressed(settings.path, settings.mode, settings.group))
            else:
                made.append((place, stack.enter_context(bound(settings)).sock))
        for place in admin_places(new.admin):
            if place in having:
                having.remove(place)
            elif place.kind == TCP or not passed.knows(ADMIN_SOCKET):
                made.append((place, stack.enter_context(page_socket(place))))
        crash.point("reload.opened")
        return [(place, sock.detach()) for place, sock in made]


def handover_of(
    plan: Plan,
    at: int,
    sources: Iterable[Source],
    pages: Iterable[tuple[socket, Bound]],
    passed: Passed,
    lock: int | None,
) -> Handover:
    """Everything that an agent has left when it has stopped; descriptors are no longer its own to close."""
    named = passed.rest()
    own = list(plan.opened)
    handed = []
    for source in sources:
        place = place_of(source.settings)
        if source.leaving:
            handed.append(source.handed())
        if source.settings.socket:
            named[source.settings.socket] = source.detach()
        elif place in plan.places:
            own += [(place, descriptor) for descriptor in source.detach()]
    for sock, place in pages:
        if place.kind == "systemd":
            named[place.place] = [*named.get(place.place, ()), sock.detach()]
        elif place in plan.places:
            own.append((place, sock.detach()))
    return Handover(at=at, passed=named, own=own, sources=handed, lock=lock, config=plan.text)


def check_command(config_file: str | None) -> list[str]:
    """`check`, started as this process was."""
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    return [sys.executable, *program, "check", *(() if config_file is None else ("--config", config_file))]


def replace_process(handover: Handover) -> NoReturn:
    """Become the next agent. Raises `AgentError` where the program has gone since the check."""
    environment = {**os.environ, VARIABLE: left(handover)}
    command = [sys.executable, *sys.orig_argv[1:]]
    crash.point("reload.left")
    try:
        os.execve(command[0], command, environment)  # noqa: S606  # no shell is wanted, only another program
    except OSError as error:
        hint = "start the agent again; what was acknowledged is in its buffer"
        raise AgentError(f"{command[0]}: cannot be started any more: {error.strerror}", hint) from error
