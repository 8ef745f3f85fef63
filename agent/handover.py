"""Carries what the agent's process has to the one that replaces it: descriptors, and a document about them.

The process replaces itself (execve(2)), so its id, its descriptors and its locks stay. The document lies in
memory (memfd_create(2)), and an environment variable says where. A newer agent must be able to read what an
older one has left: fields may be added, with defaults, and no field may change its meaning.
"""

import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import msgspec
import structlog

from agent import crash
from agent.accept.handed import HandedSource
from agent.config import Text
from agent.systemd import Bound

log = structlog.get_logger("agent")

# PROCESS:DESCRIPTOR; not one of CAPTURE_AGENT_*, which are for people.
VARIABLE = "_CAPTURE_AGENT_HANDOVER"
# The standard streams come before; an agent has some thousand descriptors at most (LimitNOFILE).
FIRST, LAST = 3, 1 << 16


class Handover(msgspec.Struct, kw_only=True):
    """What is left: systemd's sockets by name, the agent's own, what sources had under way, the file's lock.

    `at` is when, in microseconds since 1970, and `config` the text that was checked for the next agent.
    """

    at: int
    passed: Mapping[str, Sequence[int]] = {}
    own: Sequence[tuple[Bound, int]] = ()
    sources: Sequence[HandedSource] = ()
    lock: int | None = None
    config: Text | None = None

    def descriptors(self) -> Iterator[int]:
        """All that must outlive the exec."""
        for some in self.passed.values():
            yield from some
        yield from (descriptor for _, descriptor in self.own)
        yield from (client.descriptor for source in self.sources for client in source.clients)
        if self.lock is not None:
            yield self.lock


def left(handover: Handover) -> str:
    """Make it ready for an exec: what `VARIABLE` is to say."""
    document = os.memfd_create("handover", 0)
    with open(document, "wb", closefd=False) as file:
        file.write(msgspec.json.encode(handover))
    for descriptor in (document, *handover.descriptors()):
        os.set_inheritable(descriptor, True)
    return f"{os.getpid()}:{document}"


def found(env: MutableMapping[str, str]) -> Handover | None:
    """What the process before this one left; None where there was none. It is taken out of the environment.

    What cannot be read is closed, and the agent starts as if there had been nothing.
    """
    said = env.pop(VARIABLE, "")
    owner, _, number = said.partition(":")
    if owner != str(os.getpid()) or not number.isdecimal():
        return None
    crash.point("reload.entered")
    try:
        with open(int(number), "rb") as file:
            file.seek(0)
            handover = msgspec.json.decode(file.read(), type=Handover)
        for descriptor in handover.descriptors():
            os.set_inheritable(descriptor, False)
    except (OSError, msgspec.DecodeError) as error:
        log.warning(
            "what the agent before this one left cannot be used; its clients are closed",
            error=str(error),
            hint="nothing that was acknowledged is lost; clients connect again",
        )
        os.closerange(FIRST, LAST)
        return None
    crash.point("reload.read")
    return handover
