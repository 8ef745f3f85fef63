"""Opens everything, holds the nursery tree, and closes it in the order that loses nothing.

What is opened first closes last: the pages' sockets, the buffer, delivery, accepting. Events are accepted
before the modules that nobody waits for yet (the HTTP client and server) are even loaded: an agent that
starts must not make its senders wait.
"""

import os
import resource
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from agent.accept.sockets import Opened, address_of, bind_address, bind_unix, removed_at_the_end
from agent.accept.source import Source, opened
from agent.buffer import Buffer, Kept
from agent.buffer.memory import open_memory
from agent.buffer.sqlite import open_sqlite
from agent.clock import Clock
from agent.config import Admin, Config, Http, Stream
from agent.config import Source as Settings
from agent.memory import keep_freed, settle_in
from agent.metrics import Metrics
from agent.notify import Notices
from agent.pulse import Pulse, status_line
from agent.source_checks import ADMIN_SOCKET
from agent.systemd import NOTHING, UNIX_STREAM, Passed
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

ADMIN_MODE = 0o660

# How long a stop waits for systemd to take the news; it needs none.
TELL_SECONDS = 0.2

# Descriptors that clients may not have: some 20 are the agent's own, 32 are for who looks at it.
KEPT_DESCRIPTORS = 64


class Agent:
    """One agent; `ready` is set when its sources take events, setting `stop` ends it in order."""

    def __init__(self, config: Config, passed: Passed = NOTHING, notices: Notices | None = None) -> None:
        self.config = config
        self.ready = trio.Event()
        self.stop = trio.Event()
        self.sources: list[Source] = []
        self.pages = ""  # the address of the pages, empty where there is none
        self._passed = passed
        self._notices = notices or Notices()
        self._metrics = Metrics()
        self._clock = Clock()

    async def run(self) -> None:
        """Take events and deliver them until `stop` is set. Raises `AgentError` where it cannot start."""
        keep_freed()
        self.config = _with_descriptors(self.config, _raise_descriptor_limit())
        try_ways_out(self.config)
        _tell_unused(self.config, self._passed)
        with ExitStack() as stack:
            sockets = [
                stack.enter_context(opened(settings, self._passed)) for settings in self.config.sources
            ]
            pages = stack.enter_context(_page_sockets(self.config.admin, self._passed))
            self.pages = next((address_of(sock) for sock, private in pages if not private), "")
            async with trio.open_nursery() as showing:
                async with self._open_buffer() as buffer:
                    await self._serve(buffer, sockets, pages, showing)
                showing.cancel_scope.cancel()
        log.info("stopped")

    def _open_buffer(self) -> AbstractAsyncContextManager[Kept]:
        settings = self.config.buffer
        return open_memory(settings) if settings.kind == "memory" else open_sqlite(settings, self._metrics)

    async def _serve(
        self,
        buffer: Kept,
        sockets: list[Sequence[Opened]],
        pages: list[tuple[socket.socket, bool]],
        showing: trio.Nursery,
    ) -> None:
        """Accept, then deliver and show; until `stop`, and then in the opposite order."""
        projects = {project.name: project for project in self.config.projects}
        for settings, its in zip(self.config.sources, sockets, strict=True):
            project = projects[settings.project]
            source = Source(settings, project, its, buffer, self._clock, self.config.projects)
            self.sources.append(source)
        timekeeper = Timekeeper(self._clock, buffer)
        await timekeeper.look()  # before anything is stamped
        pulse = Pulse(self._notices, buffer)
        async with trio.open_nursery() as delivering, trio.open_nursery() as watching:
            watching.start_soon(timekeeper.run)
            async with trio.open_nursery() as accepting:
                for source in self.sources:
                    accepting.start_soon(source.run, self.stop)
                places = [f"{source.settings.name} at {source.address}" for source in self.sources]
                log.info("ready", sources=", ".join(places), buffer=self.config.buffer.path)
                self.ready.set()
                watching.start_soon(pulse.run)
                outside = await self._load_outside(buffer, timekeeper)
                await delivering.start(outside.deliver)
                pulse.outside = outside
                await showing.start(outside.show, pages)
                if pages:
                    watching.start_soon(outside.watch)
                settle_in()
                await self.stop.wait()
                outside.state = "stopping"
                log.info("stopping", buffered=buffer.stats().events)
                with trio.move_on_after(TELL_SECONDS):
                    await self._notices.stopping(f"stopping, {status_line(buffer.stats().events, {}, '')}")
                stopped = trio.current_time()
                showing.start_soon(_close_door, buffer, accepting.cancel_scope)
            if accepting.cancel_scope.cancelled_caught:
                log.error(
                    "there was no time to put all that was received; the rest is counted as shed",
                    hint="was the disk slow (dmesg), or a client's events large?",
                )
            watching.cancel_scope.cancel()
            outside.drain()
            patience = min(trio.current_time() + DRAIN_SECONDS, stopped + STOP_SECONDS)
            delivering.cancel_scope.deadline = patience

    async def _load_outside(self, buffer: Kept, timekeeper: Timekeeper) -> "Outside":
        """Load, in a thread, what takes longer to load than senders should wait."""
        module = await trio.to_thread.run_sync(import_module, "agent.outside")
        made: Outside = module.Outside(
            self.config, buffer, self.sources, self._metrics, self._clock, timekeeper
        )
        return made


async def _close_door(buffer: Buffer, accepting: trio.CancelScope) -> None:
    """When the grace is over, what found no room is given up, and booked; only then is it cut short."""
    await trio.sleep(GRACE_SECONDS)
    buffer.close_door()
    accepting.deadline = trio.current_time() + GIVE_UP_SECONDS


async def run_until_signalled(agent: Agent) -> None:
    """Run until SIGTERM, SIGINT or SIGHUP (its terminal was closed), then stop in order.

    A second signal leaves at once.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def obey() -> None:
                async for _ in signals:
                    if agent.stop.is_set():
                        nursery.cancel_scope.cancel()
                    agent.stop.set()

            nursery.start_soon(obey)
            await agent.run()
            nursery.cancel_scope.cancel()


@contextmanager
def _page_sockets(admin: Admin, passed: Passed) -> Iterator[list[tuple[socket.socket, bool]]]:
    """The sockets of the pages for a block, and whether what is asked there is private.

    The admin socket is systemd's where it passed one of that name: the commands look for it at `admin.socket`
    either way.
    """
    pages: list[tuple[socket.socket, bool]] = []
    with ExitStack() as stack:
        if admin.socket and ADMIN_SOCKET in passed.left:
            sockets = passed.take(ADMIN_SOCKET, (UNIX_STREAM,), "the admin socket")
            pages += [(stack.enter_context(sock), True) for sock in sockets]
            if not any(_same_place(address_of(sock), admin.socket) for sock in sockets):
                log.warning(
                    "the admin socket that systemd passed is not where the commands look for it",
                    passed=", ".join(map(address_of, sockets)),
                    configured=admin.socket,
                    hint="set admin.socket to its ListenStream=",
                )
        elif admin.socket:
            sock = bind_unix(admin.socket, socket.SOCK_STREAM, ADMIN_MODE)
            pages.append((stack.enter_context(removed_at_the_end(sock, admin.socket)), True))
        if admin.listen:
            sock = stack.enter_context(bind_address(admin.listen, socket.SOCK_STREAM))
            pages.append((sock, False))
        yield pages


def _tell_unused(config: Config, passed: Passed) -> None:
    """One line where systemd holds sockets for nobody; what is wrong with a name shows here."""
    used = {ADMIN_SOCKET} if config.admin.socket else set()
    used |= {source.socket for source in config.sources}
    if unused := [name for name in passed.left if name not in used]:
        log.warning(
            "nobody uses some of the sockets that systemd passed; who sends to them waits",
            sockets=", ".join(unused),
            hint='give a source socket = "NAME", or take them out of the .socket unit',
        )


def _same_place(path: str, other: str) -> bool:
    """Whether two paths are one, as /run and /var/run are."""
    return os.path.realpath(path) == os.path.realpath(other)


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
