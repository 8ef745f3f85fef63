"""Ends the process at a named point, as kill -9 would, so that tests see what a crash just there leaves.

Off, and able to do nothing, unless the environment says otherwise when the agent starts; no socket and no
setting reaches it. A point stands once in the code, and is passed once a chunk, request or commit at most.
"""

import os
import re
import signal
from collections.abc import Mapping

from agent import AgentError

# NAME, or NAME:N for the N-th time that it is passed; not one of CAPTURE_AGENT_*, which are for people.
VARIABLE = "_CAPTURE_AGENT_CRASH"

# Where each stands: its name says what was done last.
POINTS: Mapping[str, str] = {
    "put.asked": "agent.buffer.desk",
    "put.inserted": "agent.buffer.store",
    "put.shown": "agent.buffer.sqlite",
    "put.returned": "agent.accept.putter",
    "commit.begun": "agent.buffer.store",
    "commit.entered": "agent.buffer.store",
    "commit.written": "agent.buffer.store",
    "ack.due": "agent.accept.connection",
    "ack.written": "agent.accept.connection",
    "answer.due": "agent.accept.http",
    "answer.written": "agent.accept.http",
    "take.found": "agent.buffer.store",
    "post.due": "agent.deliver.courier",
    "post.sent": "agent.deliver.client",
    "post.answered": "agent.deliver.client",
    "post.read": "agent.deliver.courier",
    "settle.due": "agent.deliver.worker",
    "settle.kept": "agent.buffer.store",
    "settle.forgotten": "agent.buffer.store",
    "settle.buried": "agent.buffer.store",
    "settle.done": "agent.deliver.worker",
    "replay.taken_out": "agent.buffer.store",
    "replay.inserted": "agent.buffer.store",
    "replay.done": "agent.letters",
    "shed.oldest": "agent.buffer.shedding",
    "shed.expired": "agent.buffer.shedding",
    "pages.given_back": "agent.buffer.store",
    "backup.named": "agent.buffer.copies",
    "backup.copied": "agent.buffer.copies",
    "close.begun": "agent.buffer.store",
    "close.checkpointed": "agent.buffer.store",
    "close.closed": "agent.buffer.store",
    "start.locked": "agent.buffer.file",
    "start.opened": "agent.buffer.store",
    "reserve.named": "agent.buffer.reserve",
    "migrate.added": "agent.buffer.schema",
    "migrate.sized": "agent.buffer.schema",
    "migrate.applied": "agent.buffer.schema",
    "migrate.numbered": "agent.buffer.file",
    "log.hidden": "agent.buffer.file",
    "log.closed": "agent.buffer.file",
    "rescue.begun": "agent.buffer.rescue",
    "rescue.log_aside": "agent.buffer.rescue",
    "rescue.aside": "agent.buffer.rescue",
    "rescue.carried": "agent.buffer.rescue",
    "rescue.booked": "agent.buffer.rescue",
    "rescue.whole": "agent.buffer.rescue",
    "rescue.named": "agent.buffer.rescue",
    "stray.copied": "agent.buffer.stray",
    "stray.named": "agent.buffer.stray",
    "reload.checked": "agent.reload",
    "reload.opened": "agent.reload",
    "reload.drained": "agent.app",
    "reload.handed": "agent.app",
    "reload.left": "agent.reload",
    "reload.entered": "agent.handover",
    "reload.read": "agent.handover",
    "reload.locked": "agent.buffer.file",
    "reload.resumed": "agent.app",
}

_left: dict[str, int] = {}  # of the point that is armed, how often it is yet to be passed


class NoSuchPoint(AgentError):
    """What was asked for is no point."""

    exit_code = 2


def arm(env: Mapping[str, str]) -> None:
    """Obey the environment; once, when the agent starts. Raises `NoSuchPoint`."""
    said = env.get(VARIABLE, "")
    if not said:
        return
    found = re.fullmatch(r"([a-z_.]+)(?::([1-9][0-9]{0,8}))?", said)
    if found is None or found[1] not in POINTS:
        raise NoSuchPoint(f"{VARIABLE}: {said!r} is no point to crash at", "unset it: it is for tests only")
    _left[found[1]] = int(found[2] or 1)


def point(name: str) -> None:
    """Nothing; or the end, where this point is armed and was passed often enough."""
    if name in _left:
        _left[name] -= 1
        if not _left[name]:
            os.kill(os.getpid(), signal.SIGKILL)
