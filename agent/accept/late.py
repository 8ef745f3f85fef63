"""Has an HTTP source wait for its server, which takes longer to load than others' clients should wait."""

import socket
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import trio

from agent.accept.putter import Putter
from agent.clock import Clock
from agent.config import Http, Project

if TYPE_CHECKING:
    from agent.accept.http import HttpSource


# As `flags.Answered` has them.
ANSWERS = ("passed", "stale", "unavailable", "refused")
# Those of the source itself; what PostHog answers to flag calls can be any other.
STATUSES = (200, 204, 400, 401, 404, 405, 408, 413, 415, 429, 503)


class LateHttp:
    """An `HttpSource` of these parts, once it is loaded; the kernel keeps who comes before."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        putter: Putter,
        clock: Clock,
        settings: Http,
        projects: Sequence[Project],
    ) -> None:
        self._parts = (listeners, putter, clock, settings, projects)
        self._source: HttpSource | None = None

    @property
    def requests(self) -> int:
        """How many are under way."""
        return self._source.requests if self._source is not None else 0

    @property
    def flag_calls(self) -> Mapping[str, int]:
        """How many flag calls were answered, by how."""
        calls = {str(answer): 0 for answer in ANSWERS}
        if self._source is not None:
            calls.update(self._source.flag_calls)
        return calls

    @property
    def answers(self) -> Mapping[int, int]:
        """How many requests were answered, by status."""
        answers = dict.fromkeys(STATUSES, 0)
        if self._source is not None:
            answers.update(self._source.answers)
        return answers

    async def run(self, stop: trio.Event) -> None:
        """See `HttpSource.run`."""
        module = await trio.to_thread.run_sync(import_module, "agent.accept.http")
        self._source = module.HttpSource(*self._parts)
        await self._source.run(stop)
