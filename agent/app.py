"""Opens everything, holds the nursery tree, and closes it in the order that loses nothing.

What is opened first closes last: the pages' sockets, the buffer, delivery, accepting. Events are accepted
before the modules that nobody waits for yet (the HTTP client and server) are even loaded: an agent that
starts must not make its senders wait.
"""

import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, closing
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from agent import AgentError, crash
from agent.accept.handed import goes_on, place_of
from agent.accept.sockets import Opened, address_of
from agent.accept.source import Source, opened
from agent.buffer import Buffer, Kept
from agent.buffer.memory import open_memory
from agent.buffer.sqlite import SqliteBuffer, open_sqlite
from agent.clock import Clock
from agent.config import Config, Http, Stream
from agent.config import Source as Settings
from agent.handover import Handover
from agent.memory import keep_freed, settle_in
from agent.metrics import Metrics
from agent.notify import Notices
from agent.page_sockets import Page, page_sockets, tell_unused
from agent.pulse import Pulse, status_line
from agent.reload import Anew, Plan, handover_of, planned
from agent.signals import Waiting
from agent.status import Reloaded
from agent.systemd import NOTHING, Bound, Passed
from agent.timekeeper import Timekeeper
from agent.ways_out import try_ways_out

if TYPE_CHECKING:
    from agent.outside import Outside

log = structlog.get_logger("agent")

# The parts of a shutdown; with closing the file they stay under the 5 s that a person waits.
GRACE_SECONDS = 1.5  # to read what was sent, and put it
GIVE_UP_SECONDS = 2.0  # from then on, to book what found no room: milliseconds, unless the disk hangs
DRAIN_SECONDS = 1.2  # to deliver what is there
STOP_SECONDS = 3.7  # all of these together

# How long a stop waits for systemd to take the news; it needs none.
TELL_SECONDS = 0.2

# How long a thread may keep the interpreter from the loop, or the loop from the thread that commits; a tenth
# of Python's default. Beside a flood of brackets, which a thread looks at, the p99 of a good client by HTTP
# was 1.5 s by the default and is 35 ms by this; the rows of bench/pipeline.py are the same by both.
SWITCH_SECONDS = 0.0005

# Descriptors that clients may not have: some 20 are the agent's own, 32 are for who looks at it.
KEPT_DESCRIPTORS = 64


class Agent:
    """One agent; `ready` is set when its sources take events, setting `stop` ends it in order.

    `handed` is what the agent that it replaces has left, `anew` gives the configuration as it is now. After a
    reload `handover` is what this one leaves.
    """

    def __init__(
        self,
        config: Config,
        passed: Passed = NOTHING,
        notices: Notices | None = None,
        *,
        handed: Handover | None = None,
        anew: Anew | None = None,
    ) -> None:
        self.config = config
        self.ready = trio.Event()
        self.stop = trio.Event()
        self.sources: list[Source] = []
        self.pages = ""  # the address of the pages, empty where there is none
        self.plan: Plan | None = None  # of the agent that is to replace this one
        self.handover: Handover | None = None
        self.asked = False  # for a reload that has not begun
        self._passed = passed
        self._handed = handed or Handover(at=0)
        self._anew = anew
        self._reloading = trio.Lock()
        self._settled = trio.Event()
        self._lock: int | None = None
        self._notices = notices or Notices()
        self._metrics = Metrics()
        self._clock = Clock()

    async def run(self) -> None:
        """Take events and deliver them until `stop` is set. Raises `AgentError` where it cannot start."""
        keep_freed()
        sys.setswitchinterval(SWITCH_SECONDS)
        self.config = _with_descriptors(self.config, _raise_descriptor_limit())
        try_ways_out(self.config)
        tell_unused(self.config, self._passed)
        with ExitStack() as stack:
            sockets = [
                stack.enter_context(opened(settings, self._passed)) for settings in self.config.sources
            ]
            pages = stack.enter_context(page_sockets(self.config.admin, self._passed))
            self._passed.close_own()
            self.pages = next((address_of(page.sock) for page in pages if not page.private), "")
            async with trio.open_nursery() as showing:
                async with self._open_buffer() as buffer:
                    await self._serve(buffer, sockets, pages, showing)
                showing.cancel_scope.cancel()
            if self.plan is not None:
                crash.point("reload.drained")
                at, places = self._clock.now().wall, [(page.sock, page.place) for page in pages]
                self.handover = handover_of(self.plan, at, self.sources, places, self._passed, self._lock)
                crash.point("reload.handed")
        log.info("stopped" if self.plan is None else "replaced")

    async def reload(self) -> None:
        """Be replaced by an agent with the configuration as it is now; where that cannot be, go on.

        One that has not begun does for all who ask meanwhile; where this agent does not come to it, `asked`
        stays for the next.
        """
        if self.asked:
            return
        self.asked = True
        async with self._reloading:
            await self._settled.wait()
            if self._anew is None or self.stop.is_set():
                return
            self.asked = False
            log.info("reloading")
            await self._notices.reloading()
            try:
                plan = await planned(self.config, self._passed, self._anew, self._lost)
            except AgentError as error:
                await self._refuse(error)
                return
            await self._outside.rest()
            if self.stop.is_set():
                plan.close()
                return
            self.plan = plan
            for source in self.sources:
                if any(goes_on(source.settings, new) for new in plan.config.sources):
                    source.leave()
            self.stop.set()

    def _lost(self) -> dict[Bound, str]:
        """Where clients do not find a source, and why."""
        return {place_of(one.settings): one.unreachable for one in self.sources if one.unreachable}

    async def _refuse(self, error: AgentError) -> None:
        """Tell everybody that the new configuration is not used."""
        log.error(f"the reload was refused, the agent goes on as it was: {error}", hint=error.hint)
        self._outside.reloaded = Reloaded(self._clock.now().wall, str(error))
        await self._notices.ready(f"reload refused, everything goes on as before: {error}")

    def _open_buffer(self) -> AbstractAsyncContextManager[Kept]:
        settings = self.config.buffer
        if settings.kind == "memory":
            return open_memory(settings)
        return open_sqlite(settings, self._metrics, self._handed.lock)

    async def _serve(
        self,
        buffer: Kept,
        sockets: list[Sequence[Opened]],
        pages: list[Page],
        showing: trio.Nursery,
    ) -> None:
        """Accept, then deliver and show; until `stop`, and then in the opposite order."""
        projects = {project.name: project for project in self.config.projects}
        left = list(self._handed.sources)
        for settings, its in zip(self.config.sources, sockets, strict=True):
            project = projects[settings.project]
            handed = next((one for one in left if one.place == place_of(settings)), None)
            if handed is not None:
                left.remove(handed)
            source = Source(settings, project, its, buffer, self._clock, self.config.projects, handed)
            self.sources.append(source)
        if self._handed.at:
            crash.point("reload.resumed")
        timekeeper = Timekeeper(self._clock, buffer)
        await timekeeper.look()  # before anything is stamped
        pulse = Pulse(self._notices, buffer)
        async with trio.open_nursery() as delivering, trio.open_nursery() as watching:
            watching.start_soon(timekeeper.run)
            async with trio.open_nursery() as accepting:
                for source in self.sources:
                    accepting.start_soon(source.run, self.stop)
                places = [f"{source.settings.name} at {source.address}" for source in self.sources]
                kept = self.config.buffer
                where = kept.path if kept.kind == "sqlite" else kept.kind
                log.info("ready", sources=", ".join(places), buffer=where)
                self.ready.set()
                watching.start_soon(pulse.run)
                self._outside = outside = await self._load_outside(buffer, timekeeper)
                await delivering.start(outside.deliver)
                pulse.outside = outside
                await showing.start(outside.show, [(page.sock, page.private) for page in pages])
                if pages:
                    watching.start_soon(outside.watch)
                settle_in()
                self._settled.set()
                await self.stop.wait()
                if self.plan is None:
                    outside.state = "stopping"
                    log.info("stopping", buffered=buffer.stats().events)
                    with trio.move_on_after(TELL_SECONDS):
                        await self._notices.stopping(
                            f"stopping, {status_line(buffer.stats().events, {}, '')}"
                        )
                stopped = trio.current_time()
                showing.start_soon(_close_door, buffer, accepting.cancel_scope)
            if accepting.cancel_scope.cancelled_caught and self.plan is None:  # else the next agent puts it
                log.error(
                    "there was no time to put all that was received; the rest is counted as shed",
                    hint="was the disk slow (dmesg), or a client's events large?",
                )
            watching.cancel_scope.cancel()
            outside.drain()
            patience = min(trio.current_time() + DRAIN_SECONDS, stopped + STOP_SECONDS)
            delivering.cancel_scope.deadline = patience
        if self.plan is not None and isinstance(buffer, SqliteBuffer):
            self._lock = buffer.share_lock()

    async def _load_outside(self, buffer: Kept, timekeeper: Timekeeper) -> "Outside":
        """Load, in a thread, what takes longer to load than senders should wait."""
        module = await trio.to_thread.run_sync(import_module, "agent.outside")
        made: Outside = module.Outside(
            self.config, buffer, self.sources, self._metrics, self._clock, timekeeper
        )
        if self._handed.at:
            made.reloaded = Reloaded(self._handed.at, "")
        return made


async def _close_door(buffer: Buffer, accepting: trio.CancelScope) -> None:
    """When the grace is over, what found no room is given up, and booked; only then is it cut short."""
    await trio.sleep(GRACE_SECONDS)
    buffer.close_door()
    accepting.deadline = trio.current_time() + GIVE_UP_SECONDS


async def run_until_signalled(agent: Agent, *, hangs_up: bool = False) -> None:
    """Run until SIGTERM or SIGINT, then stop in order; a second one leaves at once. SIGHUP reloads.

    Where the agent `hangs_up`, SIGHUP stops it too: its terminal was closed. They must be held already.
    """
    with closing(Waiting()) as signals:
        async with trio.open_nursery() as nursery:

            async def obey() -> None:
                while True:
                    await trio.lowlevel.wait_readable(signals)
                    if agent.plan is not None:  # it is for the next agent
                        return
                    if signals.take() == signal.SIGHUP and not hangs_up:
                        nursery.start_soon(agent.reload)
                    else:
                        if agent.stop.is_set():
                            nursery.cancel_scope.cancel()
                        agent.stop.set()

            nursery.start_soon(obey)
            await agent.run()
            if agent.handover is not None and agent.asked:
                signal.raise_signal(signal.SIGHUP)  # the next agent does it
            nursery.cancel_scope.cancel()


def _raise_descriptor_limit() -> int:
    """Each connection needs a descriptor; the usual soft limit is 1,024, below a source's own default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _with_descriptors(config: Config, limit: int) -> Config:
    """The configuration with no more clients than there are descriptors for, beside delivery's and our own.

    Else clients that stay would keep events from being delivered, and people from seeing why.
    """
    streams = sum(isinstance(source, Stream | Http) for source in config.sources)
    kept = KEPT_DESCRIPTORS + sum(project.delivery.concurrency for project in config.projects)
    room = max(1, (limit - kept) // max(1, streams))

    def within(source: Settings) -> Settings:
        if isinstance(source, Stream | Http) and source.max_connections > room:
            log.warning(
                "the limit on open files allows fewer clients at once than max_connections; more will wait",
                source=source.name,
                clients=room,
                hint="raise it: LimitNOFILE= in the unit, or ulimit -n",
            )
            return msgspec.structs.replace(source, max_connections=room)
        return source

    return msgspec.structs.replace(config, sources=tuple(map(within, config.sources)))
