"""The page on which events are watched as they pass, for the admin socket only: a line an event, without end.

However much passes, watching takes a fixed share of the agent: some events are shown, the others counted. A
line `{"left_out":N,"missed":M}` then says how many: N so that the agent is spared, M as the reader is slow.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from math import ceil, inf

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent import AgentError
from agent.accept.rates import Bucket, Rate
from agent.accept.tap import Passed, Tap, View, watched
from agent.deliver.cargo import opened
from agent.events import Chunk, label_of
from agent.flow import NDJSON, Body, Flow
from agent.globs import Names
from agent.units import format_time

# Events that are opened in a second for one watcher: measured, at most 5 us each, so 2.5 % of a core.
OPENED_A_SECOND = 5_000
# And shown: more than anybody reads.
SHOWN_A_SECOND = 500
# How often is told how many were not.
TELL_SECONDS = 1.0
# Each may have a queue of 1 MiB; people at one host's agent are few.
MOST_WATCHERS = 8


class _Named(msgspec.Struct):
    event: str


_name_of = msgspec.json.Decoder(_Named).decode


class TooMany(AgentError):
    """Nobody else can watch now."""

    exit_code = 75


def routes(taps: Mapping[str, Tap]) -> list[Route]:
    """The page, to be part of an app; of the taps by the names of their sources."""
    watching: list[View] = []

    async def tail(request: Request) -> Response:
        """`?source=NAME` and `?event=NAME`, each as often as wanted: what is from there and so called."""
        sources, events = (request.query_params.getlist(name) for name in ("source", "event"))
        if unknown := [name for name in sources if name not in taps]:
            why = f"there is no source {unknown[0]!r}; there are: {', '.join(taps)}"
            return JSONResponse({"error": why}, 404)
        chosen = [taps[name] for name in sources or taps]
        return Flow(partial(_watched, chosen, Names(events), watching), NDJSON)

    return [Route("/tail", tail)]


@asynccontextmanager
async def _watched(taps: Sequence[Tap], names: Names, watching: list[View]) -> AsyncIterator[Body]:
    if len(watching) >= MOST_WATCHERS:
        raise TooMany("too many watch this agent", "again when somebody has stopped")
    with watched(taps) as view:
        watching.append(view)
        try:
            yield Body(Sampling(view, names).parts())
        finally:
            watching.remove(view)


class Sampling:
    """What one watcher is shown of what passes: all of it, or as much as is allowed in a second."""

    def __init__(self, view: View, names: Names) -> None:
        self._view = view
        self._names = names
        now = self._told = trio.current_time()
        self._opened = Bucket(Rate(OPENED_A_SECOND, OPENED_A_SECOND), now)
        self._shown = Bucket(Rate(SHOWN_A_SECOND, SHOWN_A_SECOND), now)
        self._left_out = 0

    async def parts(self) -> AsyncIterator[bytes]:
        """The body: whole lines."""
        yield b""  # the answer begins: from now on nothing passes unseen
        while True:
            if passed := await self._next():
                lines = self._lines(*passed)
                if lines:
                    yield b"".join(lines)
            if remark := self._remark():
                yield remark

    async def _next(self) -> Passed | None:
        """What passes next; None where something is to be told before."""
        due = self._told + TELL_SECONDS if self._left_out or self._view.missed else inf
        with trio.move_on_at(due):
            return await self._view.next()
        return None

    def _lines(self, source: str, chunk: Chunk) -> list[bytes]:
        """Those events of a chunk that are shown; evenly chosen, where not all are."""
        now = trio.current_time()
        if self._opened.level(now) <= 0:
            self._left_out += chunk.events
            return []
        self._opened.take(chunk.events)  # may be more than there were left: the next ones come later
        events = opened(chunk) or []
        if self._names:
            events = [event for event in events if _name_of(event).event in self._names]
        allowed = max(0, self._shown.level(now))
        shown = events[:: ceil(len(events) / allowed)] if events and allowed else []
        self._shown.take(len(shown))
        self._left_out += len(events) - len(shown)
        head = {"source": source, "project": label_of(chunk.project, chunk.key)}
        begin = msgspec.json.encode({**head, "received_at": format_time(chunk.received_at)})[:-1]
        return [b'%b,"event":%b}\n' % (begin, event) for event in shown]

    def _remark(self) -> bytes:
        """How many were not shown, once a second; empty where all were."""
        now = trio.current_time()
        if now < self._told + TELL_SECONDS or not (self._left_out or self._view.missed):
            return b""
        remark = {"left_out": self._left_out, "missed": self._view.missed}
        self._told, self._left_out, self._view.missed = now, 0, 0
        return msgspec.json.encode(remark) + b"\n"
