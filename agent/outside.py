"""What looks outward: deliveries to PostHog, and pages for people; loaded once events are being taken."""

import platform
import sqlite3
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from math import inf
from socket import socket

import structlog
import trio

from agent import __version__, httpd
from agent.accept.sockets import address_of
from agent.accept.source import Source
from agent.admin import View, make_app
from agent.buffer import Kept
from agent.clock import Clock
from agent.config import Config
from agent.deliver.client import Client
from agent.deliver.worker import Delivery
from agent.events import OTHER
from agent.metrics import DeliveryFacts, Metrics, Pulled
from agent.page.history import EVERY_SECONDS, History, sample
from agent.source_checks import is_loopback
from agent.status import AboutClock, Document, Reloaded, balance, describe, has_others
from agent.timekeeper import Timekeeper

log = structlog.get_logger("agent")

# Who looks at the pages at the same time, on each of their two sockets: people, their monitoring, commands.
VIEWERS = 16
# An idle viewer's place is soon another's; Prometheus comes back each 15 s or more, and reconnects.
VIEWER_SECONDS = 15.0
# And where all places are taken, at once: who waited for one has said long since what he wants.
VIEWERS_TURN_SECONDS = 0.05

# Before a reload requests that are under way have so long to be answered, as they would else be sent again;
# an answer takes a second at most where PostHog is well.
REST_SECONDS = 5.0


class Outside:
    """The deliveries and the pages of one agent; `state` is what the pages call it."""

    def __init__(
        self,
        config: Config,
        buffer: Kept,
        sources: Sequence[Source],
        metrics: Metrics,
        clock: Clock,
        timekeeper: Timekeeper,
    ) -> None:
        self._config = config
        self._buffer = buffer
        self._sources = sources
        self._metrics = metrics
        self._clock = clock
        self._timekeeper = timekeeper
        self._deliveries: list[Delivery] = []
        self._history = History()
        self._started = time.monotonic()
        self._over = trio.Event()
        self.state = "running"
        self.reloaded: Reloaded | None = None

    async def deliver(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver each project's events until cancelled or drained."""
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            for project in self._config.projects:
                client = await stack.enter_async_context(Client(project.delivery))
                delivery = Delivery(project, self._buffer, client, self._metrics, self._clock.now)
                self._deliveries.append(delivery)
                nursery.start_soon(delivery.run)
            if names := self._unconfigured():
                log.warning(
                    "the buffer holds events of projects that are not configured; they wait",
                    projects=", ".join(names),
                    hint="configure a project of that name, and they are delivered",
                )
            task_status.started()
        self._over.set()

    async def rest(self) -> None:
        """Begin no more deliveries, and wait a moment for the answers that are due."""
        for delivery in self._deliveries:
            delivery.drain(begin=False)
        with trio.move_on_after(REST_SECONDS):
            await self._over.wait()

    def drain(self) -> None:
        """Deliver what is there, wait for no company, and end."""
        for delivery in self._deliveries:
            delivery.drain()

    async def watch(self) -> None:
        """Keep samples for the status page's pictures, until cancelled."""
        while True:
            self._history.add(sample(self._buffer.books(), self._buffer.stats(), self._clock.now()))
            await trio.sleep(EVERY_SECONDS)

    async def show(
        self,
        pages: Sequence[tuple[socket, bool]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve the pages on bound sockets until cancelled; each is told whether it is private."""
        self._metrics.pull(
            Pulled(
                sources=[source.settings.name for source in self._sources],
                projects=[project.name for project in self._config.projects]
                + ([OTHER] if self._config.any_key else []),
                drops_known=lambda: [source.settings.name for source in self._sources if source.drops_known],
                turned_away=lambda: {
                    source.settings.name: source.turned_away
                    for source in self._sources
                    if source.turned_away is not None
                },
                flag_calls=lambda: {
                    source.settings.name: source.flag_calls
                    for source in self._sources
                    if source.flag_calls is not None
                },
                http_answers=lambda: {
                    source.settings.name: source.answers
                    for source in self._sources
                    if source.answers is not None
                },
                books=self._buffer.books,
                stats=self._buffer.stats,
                balanced=lambda: balance(self._buffer.books(), self._buffer.stats().events)["balanced"],
                writable=lambda: not self._buffer.trouble,
                deliveries=self._facts,
                clock_steps=lambda: self._timekeeper.steps,
                now=lambda: self._clock.now().wall,
                build={
                    "version": __version__,
                    "sqlite": sqlite3.sqlite_version,
                    "python": platform.python_version(),
                },
            )
        )
        view = View(
            self._status,
            self._unready,
            self._metrics.registry,
            self._buffer,
            lambda: self._history.document(self._clock.now().monotonic),
            {source.settings.name: source.putter.tap for source in self._sources},
        )
        async with trio.open_nursery() as nursery:
            for sock, private in pages:
                local = not private and is_loopback(address_of(sock))
                app = make_app(view, private=private, local=local)
                await nursery.start(_serve, app, sock, inf if private else httpd.UNREAD_SECONDS)
            task_status.started()

    @property
    def ways(self) -> dict[str, str]:
        """The state of each project's delivery, by its name."""
        return {delivery.project.name: delivery.state for delivery in self._deliveries}

    def wedged(self) -> str:
        """Which delivery makes no progress and never will, and why; empty where there is none."""
        now = trio.current_time()
        found = ((delivery.project.name, delivery.wedged(now)) for delivery in self._deliveries)
        return next((f"delivery of {name}: {why}" for name, why in found if why), "")

    def _facts(self) -> list[DeliveryFacts]:
        facts = [
            DeliveryFacts(
                delivery.project.name,
                delivery.pace.concurrency,
                (delivery.hold.reason,) if delivery.hold else (),
                delivery.courier.ahead,
            )
            for delivery in self._deliveries
        ]
        facts += [DeliveryFacts(name, 0, ("unconfigured",), None) for name in self._unconfigured()]
        if has_others(self._config, self._buffer.books(), self._deliveries):
            held = {reason for delivery in self._deliveries for reason in delivery.keys.reasons}
            facts.append(DeliveryFacts(OTHER, None, held, None))
        return facts

    def _unconfigured(self) -> list[str]:
        """Projects that have events in the buffer, but no place in the configuration any more."""
        configured = {project.name for project in self._config.projects}
        return sorted(self._buffer.stats().unleased.keys() - configured)

    def _status(self, private: bool) -> Document:
        return describe(
            self._config,
            self._buffer,
            self._sources,
            self._deliveries,
            state=self.state,
            uptime=time.monotonic() - self._started,
            clock=self._about_clock(),
            wall=self._clock.now().wall,
            monotonic=trio.current_time(),
            private=private,
            reloaded=self.reloaded,
        )

    def _about_clock(self) -> AboutClock:
        last = self._timekeeper.last
        return AboutClock(
            self._clock.now().boot, self._timekeeper.steps, last and last.at, last.by if last else 0
        )

    def _unready(self) -> str:
        """Why events cannot be taken now; empty when they can."""
        if self.state != "running":
            return f"the agent is {self.state}"
        if self._buffer.trouble:
            return f"the buffer cannot be written: {self._buffer.trouble}"
        for source in self._sources:
            if source.unreachable:
                return f"source {source.settings.name} cannot be reached: {source.unreachable}"
        return "the buffer is full; senders wait" if self._buffer.stats().waiting else ""


async def _serve(
    app: httpd.App,
    sock: socket,
    unread: float,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The pages; only on the socket, where people pause what they read, a client may take its time."""
    await httpd.serve(
        app,
        [sock],
        shutdown=trio.Event(),
        max_connections=VIEWERS,
        keep_alive=VIEWER_SECONDS,
        unread=unread,
        turn=VIEWERS_TURN_SECONDS,
        task_status=task_status,
    )
