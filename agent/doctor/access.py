"""Whether a user may write to a socket or file: worked out from modes and ACLs, and tried where root can.

It promises to follow links as the kernel does, and to say which part of the path is in the way. Trying it
changes nothing: a connection is opened and closed, nothing is sent.
"""

import errno
import grp
import os
import pwd
import socket
import stat
import struct
from typing import NamedTuple

from agent import AgentError
from agent.trust import steps

READ, WRITE, ENTER = 4, 2, 1

# How ACLs are kept on disk and told (linux/posix_acl_xattr.h): a version; of each entry tag, bits and id.
ACL = "system.posix_acl_access"
_ACL_VERSION = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32

# Only root may enter it; a service with DynamicUser= has its own part of it mounted (systemd.exec(5)).
PRIVATE = "/var/lib/private"

# What the child exits with where it could not become the user; no errno is so high.
NOT_BECOME = 255


class Person(NamedTuple):
    """A user as the kernel sees one."""

    name: str
    uid: int
    gid: int
    groups: frozenset[int]


def person(name: str) -> Person:
    """The user of that name or number, with all groups. Raises `AgentError` where there is none."""
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        if name.isdecimal() and int(name) < 2**32 - 1:  # a number that has no name may send all the same
            return Person(f"uid {name}", int(name), int(name), frozenset({int(name)}))
        hint = "give the user that the sending program runs as"
        raise AgentError(f"there is no user {name!r} on this host", hint) from None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Person(entry.pw_name, entry.pw_uid, entry.pw_gid, frozenset(groups))


def called(who: Person) -> str:
    """A user in a sentence."""
    return who.name if who.name.startswith("uid ") else f"user {who.name}"


def user_name(uid: int) -> str:
    """A user's name, or the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """A group's name, or the number."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def obstacle(path: str, who: Person, want: int = WRITE) -> str:
    """What keeps a user from the file at `path`, by modes and ACLs; empty where nothing does.

    Raises OSError where we may not look ourselves, or the way leads nowhere.
    """
    for step, found in steps(path):
        if step == PRIVATE:
            continue
        last = not stat.S_ISDIR(found.st_mode) or step == os.path.realpath(path)
        bits = want if last else ENTER
        if not bits & ~_permissions(step, found, who):
            continue
        owner, group = user_name(found.st_uid), group_name(found.st_gid)
        may = "write to" if last else "enter"
        return f"{called(who)} may not {may} {step} ({owner}:{group}, mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def _permissions(step: str, found: os.stat_result, who: Person) -> int:
    """What of read, write and enter the user has there (path_resolution(7), acl(5))."""
    if who.uid == 0:
        return READ | WRITE | ENTER
    if who.uid == found.st_uid:
        return found.st_mode >> 6 & 7
    try:
        entries = os.getxattr(step, ACL)
    except OSError:  # none there, or none on such a file system
        return found.st_mode >> 3 & 7 if found.st_gid in who.groups else found.st_mode & 7
    return _by_acl(entries, found.st_gid, who)


def _by_acl(entries: bytes, group: int, who: Person) -> int:
    """What an ACL gives to a user who is not the owner."""
    body = entries[_ACL_VERSION.size :]
    acl = list(_ACL_ENTRY.iter_unpack(body[: len(body) // _ACL_ENTRY.size * _ACL_ENTRY.size]))
    mask = next((bits for tag, bits, _ in acl if tag == _MASK), 7)
    for tag, bits, ident in acl:
        if tag == _USER and ident == who.uid:
            return int(bits & mask)
    its = [
        bits & mask
        for tag, bits, ident in acl
        if (tag == _GROUP_OBJ and group in who.groups) or (tag == _GROUP and ident in who.groups)
    ]
    # One of the groups must grant all that is wanted; as one thing is wanted at a time, their sum is as good.
    granted = 0
    for bits in its:
        granted |= bits
    return granted if its else next((int(bits) for tag, bits, _ in acl if tag == _OTHER), 0)


def connects(path: str, kind: socket.SocketKind) -> int:
    """The errno of connecting to a Unix socket as ourselves, 0 where it works."""
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.setblocking(False)
        try:
            outcome = sock.connect_ex(path)
        except OSError as failed:  # a path that no socket can have
            return failed.errno or errno.EINVAL
    # Whoever is made to wait by clients before him may write.
    return 0 if outcome in (errno.EAGAIN, errno.EINPROGRESS) else outcome


def connects_as(path: str, kind: socket.SocketKind, who: Person) -> int | None:
    """The same as another user, in a child that has become that user; None where we cannot become that user.

    Only for a process without threads, as it forks.
    """
    if who.uid == os.geteuid() and (who.uid == 0 or who.groups <= {*os.getgroups(), os.getegid()}):
        return connects(path, kind)
    if os.geteuid() != 0:
        return None
    child = os.fork()
    if child == 0:
        code = NOT_BECOME
        try:
            os.setgroups(sorted(who.groups))
            os.setgid(who.gid)
            os.setuid(who.uid)
            code = connects(path, kind)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if 0 <= code < NOT_BECOME else None
