"""Whether clients can write to the agent's Unix sockets: as a named user, or who can at all."""

import errno
import grp
import os
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agent.config import Config, Unix, UnixDatagram
from agent.doctor import access
from agent.doctor.finding import Finding, error, ok, warning

CHECK = "socket"


class Door(NamedTuple):
    """A Unix socket that clients send to."""

    where: str
    path: str
    kind: socket.SocketKind
    allow_uids: Sequence[int]
    own: bool  # the agent's to make, and not systemd's


def doors(config: Config, status: Mapping[str, Any] | None) -> Iterator[Door]:
    """The sockets of all Unix sources: where the running agent says, else where the configuration does."""
    told = {source["name"]: source["address"] for source in status["sources"]} if status else {}
    for source in config.sources:
        if isinstance(source, Unix):
            path = told.get(source.name, source.path)
            kind = socket.SOCK_DGRAM if isinstance(source, UnixDatagram) else socket.SOCK_STREAM
            if path.startswith("/"):  # systemd may have opened it elsewhere, or in no file at all
                where = f"source {source.name} at {path}"
                yield Door(where, path, kind, source.allow_uids, own=not source.socket)


def groups(config: Config) -> Iterator[Finding]:
    """Groups that sockets are to be given to, and that are not there."""
    for source in config.sources:
        if isinstance(source, Unix) and source.group:
            try:
                grp.getgrnam(source.group)
            except KeyError:
                yield error(
                    CHECK,
                    f"source {source.name}",
                    f"there is no group {source.group!r} on this host",
                    f"make it (groupadd --system {source.group}), or take `group` out of the source",
                )


def look(door: Door, who: access.Person | None, *, running: bool, silent: bool) -> Iterator[Finding]:
    """What is to be said about one door. It may fork, so no thread may run.

    `running` is an agent that answers, `silent` one that may run though it does not.
    """
    try:
        found = os.stat(door.path)
    except FileNotFoundError:
        if running:
            yield error(CHECK, door.where, "the file is gone, so no client finds it", _made_anew(door))
        return
    except OSError as failed:
        yield _not_seen(door, failed)
        return
    if not stat.S_ISSOCK(found.st_mode):
        yield error(CHECK, door.where, "there is something here that is not a socket", "move it away")
        return
    if access.connects(door.path, door.kind) == errno.ECONNREFUSED:
        if running:
            what = "nobody listens on the file that clients find: another program has taken its place"
            yield error(CHECK, door.where, what, _made_anew(door))
        return
    if not running and not silent:
        yield warning(
            CHECK,
            door.where,
            "somebody holds it though no agent answers: systemd, where clients now wait, or another program",
            "start the agent; if it then says that another program listens here, stop that one",
        )
    yield _for(door, who, found) if who else _for_anybody(door, found)


def _made_anew(door: Door) -> str:
    """What to do where a running agent's file is lost."""
    if door.own:
        return "wait a second: the agent makes it anew, or its log says why it cannot"
    return "restart its .socket unit (systemctl restart NAME.socket): the file is systemd's to make"


def _not_seen(door: Door, failed: OSError) -> Finding:
    what = f"cannot be looked at by this user: {failed.strerror}"
    return warning(CHECK, door.where, what, "run the doctor as root")


def _for(door: Door, who: access.Person, found: os.stat_result) -> Finding:
    """Whether this user can send, by computation and by trial."""
    if door.allow_uids and who.uid not in door.allow_uids:
        what = f"the source refuses {access.called(who)} (uid {who.uid}), who is not among its allow_uids"
        return error(CHECK, door.where, what, f"add {who.uid} to the source's allow_uids, if it should send")
    try:
        way = access.obstacle(door.path, who)
    except OSError as failed:
        return _not_seen(door, failed)
    outcome = access.connects_as(door.path, door.kind, who)
    if outcome == 0:
        return ok(CHECK, door.where, f"{access.called(who)} can send (tried)")
    if outcome is None and not way:
        return ok(
            CHECK,
            door.where,
            f"{access.called(who)} can send, by all modes on the way (not tried: that takes root)",
        )
    if way:
        return error(CHECK, door.where, way, _way_in(who, found))
    what = (
        f"{access.called(who)} cannot send, though all modes on the way allow it: {os.strerror(outcome or 0)}"
    )
    return error(
        CHECK, door.where, what, "look for a security module's denial (AppArmor, SELinux) in the journal"
    )


def _way_in(who: access.Person, found: os.stat_result) -> str:
    group = access.group_name(found.st_gid)
    if found.st_gid == 0:
        return "give the source a `group` that the user is in"
    return f"usermod -a -G {group} {who.name}, then start the user's programs again; or widen `mode`"


def _for_anybody(door: Door, found: os.stat_result) -> Finding:
    """Who can send, by the file itself."""
    mode = stat.S_IMODE(found.st_mode)
    may = [access.user_name(found.st_uid)] if mode & 0o200 else []
    may += [f"group {access.group_name(found.st_gid)}"] if mode & 0o020 else []
    may += ["everybody"] if mode & 0o002 else []
    return ok(CHECK, door.where, f"may send: {', '.join(may) or 'root only'}; --as USER checks one")
