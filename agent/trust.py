"""Who else on this host may read the agent's secrets, or change what it relies on: by owners and modes.

It looks at names only, and changes nothing. What cannot be looked at is passed over.
"""

import errno
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from agent.config import Config, Tcp, Text, Unix

# As many links on one way as Linux follows (path_resolution(7)).
MOST_LINKS = 40
# Whom a user namespace shows for all users that it does not know (/proc/sys/kernel/overflowuid).
UNKNOWN = 65534
READ, WRITE, ENTER = stat.S_IROTH, stat.S_IWOTH, stat.S_IXOTH


class Exposed(NamedTuple):
    """A file or folder that others may use, what of it, and what to do."""

    path: str
    what: str
    hint: str


def exposed(config: Config, text: Text, uid: int) -> Iterator[Exposed]:
    """What others may read or change that only the agent, which runs as `uid`, and root should."""
    document = tomllib.loads(text.text)
    keys = {*_key_files(document), *_tls_keys(config)}
    secret = dict.fromkeys(keys, "a key")
    if _has_secrets(document):
        secret[text.file] = "a key or a password"
    relied_on = [*([text.file] if text.text else []), *sorted(keys)]  # no text: no file, only defaults
    places = {os.path.dirname(source.path) for source in config.sources if isinstance(source, Unix)}
    places.add(os.path.dirname(config.admin.socket))
    if config.buffer.kind == "sqlite":
        secret |= {config.buffer.path + end: "events" for end in ("", "-wal")}
        places.add(config.buffer.path)  # and so its folder
    for path, what in sorted(secret.items()):
        if _readable(path):
            yield Exposed(
                path, f"everybody on this host may read it, and it holds {what}", f"chmod o-r {path}"
            )
    told = set()
    for path in (*relied_on, *sorted(filter(None, places))):
        for found in _changeable(path, uid):
            if found not in told:
                told.add(found)
                yield found


def user_of(config: Config) -> int:
    """Whom the buffer belongs to, where there is one; else this user."""
    with suppress(OSError):
        return os.stat(config.buffer.path).st_uid
    return os.geteuid()


def steps(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Each folder on the way and then what is there, links followed; OSError where it leads nowhere."""
    done, left, links = "/", _parts(os.path.abspath(path)), 0
    yield done, os.lstat(done)
    while left:
        part = left.pop(0)
        if part == "..":
            done = os.path.dirname(done)
            continue
        step = os.path.join(done, part)
        found = os.lstat(step)
        if not stat.S_ISLNK(found.st_mode):
            done = step
            yield step, found
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(step)
        done = "/" if target.startswith("/") else done
        left = _parts(target) + left


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _readable(path: str) -> bool:
    """Whether everybody may: the file, and each folder on the way to it."""
    try:
        way = list(steps(path))
    except OSError:
        return False
    *folders, (_, last) = way
    return bool(last.st_mode & READ) and all(found.st_mode & ENTER for _, found in folders)


def _changeable(path: str, uid: int) -> Iterator[Exposed]:
    """What on the way to a file or folder others may replace, or write to."""
    with suppress(OSError):
        for step, found in steps(path):
            if found.st_uid not in (0, uid, UNKNOWN):
                what = (
                    f"it belongs to user {found.st_uid}, who may change what the agent keeps or reads there"
                )
                yield Exposed(step, what, f"run the agent as that user, or chown {uid} {step}")
            # In a folder with the sticky bit everybody may make files, and only touch their own.
            if found.st_mode & WRITE and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
                what = (
                    "everybody on this host may write to it, and change what the agent keeps or reads there"
                )
                yield Exposed(step, what, f"chmod o-w {step}")


def _key_files(document: Mapping[str, object]) -> Iterator[str]:
    """The files that a configuration takes secrets from."""
    for table in _tables(document):
        for name in ("api_key", "hash_key"):
            match table.get(name):
                case {"file": str(path)}:
                    yield path


def _tls_keys(config: Config) -> Iterator[str]:
    for project in config.projects:
        if project.delivery.client_key or project.delivery.client_cert:
            yield project.delivery.client_key or project.delivery.client_cert
    for source in config.sources:
        if isinstance(source, Tcp) and (source.tls_key or source.tls_cert):
            yield source.tls_key or source.tls_cert


def _has_secrets(document: Mapping[str, object]) -> bool:
    """Whether the text itself holds a secret. That a proxy's address has a password shows by its @."""
    return any(
        any(isinstance(table.get(name), str) for name in ("api_key", "hash_key"))
        or bool(table.get("headers"))
        or "@" in str(table.get("proxy", ""))
        for table in _tables(document)
    )


def _tables(value: object) -> Iterator[Mapping[str, object]]:
    """Every table of a document."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _tables(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _tables(inner)
