"""One configured source, from its bound socket to its putter."""

import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from math import inf

import structlog
import trio

from agent import __version__
from agent.accept.anew import keep
from agent.accept.datagram import DatagramSource
from agent.accept.handed import HandedSource, place_of
from agent.accept.inherit import inherit
from agent.accept.late import LateHttp
from agent.accept.peer import server_context, stay_awake
from agent.accept.putter import Putter
from agent.accept.rates import Rate, Rates
from agent.accept.sender import Senders
from agent.accept.sockets import Opened, SocketFile, address_of, ask_buffer, bind_address, take_unix
from agent.accept.stream import StreamSource
from agent.buffer import Buffer
from agent.clock import Clock, zone
from agent.config import Http, Project, Stream, Tcp, Udp, Unix, UnixDatagram, UnixStream
from agent.config import Source as Settings
from agent.decode.framing import FrameReader
from agent.decode.lines import Format
from agent.decode.logfmt import Logfmt
from agent.decode.ndjson import LineReader
from agent.decode.objects import Json
from agent.decode.syslog import Syslog
from agent.shape import shape_of
from agent.systemd import NOTHING, Passed
from agent.vouch import Door, Rules

log = structlog.get_logger("accept")

# A source that is left puts what it has read for so long: less than the agent's grace. What finds no room by
# then is handed on.
LEAVE_SECONDS = 1.0


class Source:
    """A source that is open: its settings, its sockets' facts, and the tasks that serve it.

    systemd may have opened several sockets for it (IPv4 and IPv6): it reads them all, as if they were one.
    """

    def __init__(
        self,
        settings: Settings,
        project: Project,
        sockets: Sequence[Opened],
        buffer: Buffer,
        clock: Clock,
        projects: Sequence[Project] = (),
        handed: HandedSource | None = None,
    ) -> None:
        self.settings = settings
        self._sockets = sockets
        self._handed = handed
        self._leaving = False
        self._patience = trio.CancelScope()
        self.granted = min((opened.granted for opened in sockets if opened.granted is not None), default=None)
        self.address = ", ".join(address_of(opened.sock) for opened in sockets)
        self.putter = Putter(settings.name, door_of(settings, project), buffer, _rates(settings))
        self._file = next((opened.file for opened in sockets), None)
        senders = _senders(settings)
        syslog = settings.format == "syslog"
        allowed = frozenset(settings.allow_uids) if isinstance(settings, Unix) else frozenset[int]()
        self._readings: Sequence[DatagramSource | StreamSource | LateHttp]
        if isinstance(settings, Http):
            listeners = [opened.sock for opened in sockets]
            self._readings = [LateHttp(listeners, self.putter, clock, settings, projects or (project,))]
        elif isinstance(settings, Stream):
            tcp = settings if isinstance(settings, Tcp) else None
            streams = StreamSource(
                [opened.sock for opened in sockets],
                self.putter,
                clock,
                reader=partial(FrameReader if syslog else LineReader, settings.max_event),
                ack=settings.ack,
                max_connections=settings.max_connections,
                idle_timeout=tcp.idle_timeout if tcp else inf,
                tls=_context_of(tcp) if tcp else None,
                senders=senders,
                allowed=allowed,
                handed=() if handed is None else handed.clients,
            )
            self._readings = [streams]
        else:
            self._read_datagrams = partial(
                DatagramSource,
                putter=self.putter,
                clock=clock,
                max_event=settings.max_event,
                one_line=syslog,
                senders=senders,
                allowed=allowed,
            )
            self._readings = [self._read_datagrams(one.sock, granted=one.granted or 0) for one in sockets]

    @property
    def connections(self) -> int | None:
        """How many are open, or of HTTP how many requests are under way; None for datagrams."""
        counts = [
            one.requests if isinstance(one, LateHttp) else len(one.connections)
            for one in self._readings
            if not isinstance(one, DatagramSource)
        ]
        return sum(counts) if counts else None

    @property
    def turned_away(self) -> int | None:
        """How many connections of users who may not send here were closed; None where users are not known."""
        counts = [one.turned_away for one in self._readings if isinstance(one, StreamSource)]
        return sum(counts) if counts else None

    @property
    def flag_calls(self) -> Mapping[str, int] | None:
        """How many flag calls of SDKs were answered, by how; None but for http."""
        return next((one.flag_calls for one in self._readings if isinstance(one, LateHttp)), None)

    @property
    def answers(self) -> Mapping[int, int] | None:
        """How many requests of clients were answered, by status; None but for http."""
        return next((one.answers for one in self._readings if isinstance(one, LateHttp)), None)

    @property
    def drops_known(self) -> bool:
        """Whether the kernel tells how many datagrams it dropped."""
        return all(isinstance(one, DatagramSource) and one.drops_known for one in self._readings)

    @property
    def unreachable(self) -> str:
        """Why clients cannot find its socket now; empty where they can."""
        return "" if self._file is None else self._file.lost

    @property
    def leaving(self) -> bool:
        """Whether it leaves something; see `leave`."""
        return self._leaving

    def leave(self) -> None:
        """At the end leave clients and datagrams as they are, for the process that replaces this one."""
        self._leaving = True
        self.putter.leave()
        for one in self._readings:
            if not isinstance(one, LateHttp):
                one.leave()

    async def run(self, stop: trio.Event) -> None:
        """Take events until `stop`, then what is still in the kernel's queue, and put all of it.

        Left, it takes no more from the kernel, and puts what it can in `LEAVE_SECONDS`.
        """
        for read in () if self._handed is None else self._handed.reads:
            self.putter.offer(read, admitted=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._put)
            async with trio.open_nursery() as reading:
                for one in self._readings:
                    reading.start_soon(one.run, stop)
                if self._file is not None and isinstance(self.settings, Unix):
                    serve = partial(self._serve_beside, reading, stop)
                    reading.start_soon(keep, self._file, self.settings, serve, stop)
            self.putter.close()
            if self._leaving:
                self._patience.deadline = trio.current_time() + LEAVE_SECONDS

    def _serve_beside(self, reading: trio.Nursery, stop: trio.Event, new: Opened) -> None:
        """Serve the socket that has the file now, and the one before for who is connected; no older one."""
        self._sockets = [new]
        self.granted = new.granted
        for one in self._readings:
            if isinstance(one, StreamSource):
                one.serve_beside(new.sock)
                return
        *older, last = (one for one in self._readings if isinstance(one, DatagramSource))
        last.replaced()
        its = self._read_datagrams(new.sock, granted=new.granted or 0)
        self._readings = [last, its]
        reading.start_soon(its.run, stop)
        for one in older:
            one.retire()

    async def _put(self) -> None:
        with self._patience:
            await self.putter.run()

    def handed(self) -> HandedSource:
        """What it leaves, once `run` has returned: nothing, unless it was told to leave."""
        streams = [one for one in self._readings if isinstance(one, StreamSource)]
        clients = [client for one in streams for client in one.handed()]
        return HandedSource(place=place_of(self.settings), clients=clients, reads=self.putter.left())

    def detach(self) -> list[int]:
        """The descriptors of its sockets, which are no longer its own to close; of a file's the newest."""
        return [opened.sock.detach() for opened in self._sockets]


def door_of(settings: Settings, project: Project) -> Door:
    """What becomes of a source's lines."""
    return Door(_rules(settings, project), _format(settings), shape=shape_of(settings))


def _rules(settings: Settings, project: Project) -> Rules:
    ours: dict[str, object] = {}
    if not isinstance(settings, Http):  # an SDK says who it is, and a client's address where it was
        ours = {"$lib": "capture-agent", "$lib_version": __version__}
    if project.delivery.disable_geoip and not isinstance(settings, Http):
        ours["$geoip_disable"] = True
    made: dict[str, object] = {}
    if settings.format == "syslog":  # a host is no person, and profiles cost
        made["$process_person_profile"] = False
    return Rules(
        source=settings.name,
        project=project.name,
        properties={**ours, **settings.properties},
        made=made,
        # Of a line that is JSON the decoder knows the hostname; without one it is this host's.
        distinct_id=settings.distinct_id.replace("{hostname}", socket.gethostname()),
        max_event=settings.max_event,
        max_batch_events=project.delivery.max_batch_events,
        max_batch_size=project.delivery.max_batch_size,
    )


def _format(settings: Settings) -> Format:
    match settings.format:
        case "json":
            return Json(settings.max_event)
        case "logfmt":
            return Logfmt(settings.max_event)
        case "syslog":
            return Syslog(
                event=settings.event,
                distinct_id=settings.distinct_id,
                hostname=socket.gethostname(),
                zone=zone(settings.time_zone),
                max_event=settings.max_event,
            )


def try_source(settings: Settings) -> None:
    """What a source refers to that cannot be used is told before anything is taken. Raises `AgentError`."""
    if settings.format == "syslog":
        zone(settings.time_zone)
    if isinstance(settings, Tcp):
        _context_of(settings)


def _senders(settings: Settings) -> Senders | None:
    """Where the source must know who sends."""
    if not isinstance(settings, Unix):
        return None
    told = settings.sender or settings.sender_unit
    if told or settings.allow_uids or settings.uid_events_per_second:
        return Senders(told=told, units=settings.sender_unit)
    return None


def _rates(settings: Settings) -> Rates | None:
    own = _rate(settings.max_events_per_second, settings.burst)
    user = _rate(0, 0)
    if isinstance(settings, Unix):
        user = _rate(settings.uid_events_per_second, settings.uid_burst)
    return Rates(own, user, trio.current_time()) if own.per_second or user.per_second else None


def _rate(per_second: float, burst: int) -> Rate:
    """Without a burst of its own as many as two seconds allow, and one event at least."""
    return Rate(per_second, burst or max(1.0, 2 * per_second))


def _context_of(settings: Tcp) -> ssl.SSLContext | None:
    return server_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


@contextmanager
def opened(settings: Settings, passed: Passed) -> Iterator[Sequence[Opened]]:
    """The source's sockets for a block: the ones that systemd passed for it, or one of its own."""
    if not settings.socket:
        with bound(settings, passed) as own:
            yield [own]
        return
    try_source(settings)
    with ExitStack() as stack:
        sockets = inherit(settings, passed)
        for sock, granted, _ in sockets:
            stack.enter_context(sock)
            if isinstance(settings, Tcp | Http):
                stay_awake(sock)
            if isinstance(settings, Udp):
                hint = f"ReceiveBuffer={settings.receive_buffer} in the .socket unit"
                _tell_small(settings, granted or 0, hint)
        yield sockets


@contextmanager
def bound(settings: Settings, passed: Passed = NOTHING) -> Iterator[Opened]:
    """A socket of the source's own for a block, the one that it had before where the agent is replaced."""
    try_source(settings)
    with ExitStack() as stack:
        sock = passed.take_own(place_of(settings))
        match settings:
            case UnixStream(path=path):
                sock = take_unix(sock, path, socket.SOCK_STREAM, settings.mode, settings.group)
                yield Opened(sock, None, stack.enter_context(closing(SocketFile(sock, path))))
            case UnixDatagram(path=path):
                sock = take_unix(sock, path, socket.SOCK_DGRAM, settings.mode, settings.group)
                file = stack.enter_context(closing(SocketFile(sock, path)))
                yield Opened(sock, ask_buffer(sock, settings.receive_buffer), file)
            case Tcp(listen=listen) | Http(listen=listen):
                sock = stack.enter_context(sock or bind_address(listen, socket.SOCK_STREAM))
                stay_awake(sock)
                yield Opened(sock, None)
            case Udp(listen=listen):
                sock = stack.enter_context(sock or bind_address(listen, socket.SOCK_DGRAM))
                granted = ask_buffer(sock, settings.receive_buffer)
                _tell_small(settings, granted, f"sysctl -w net.core.rmem_max={settings.receive_buffer}")
                yield Opened(sock, granted)


def _tell_small(settings: Udp, granted: int, hint: str) -> None:
    """One line where the receive buffer is smaller than it should be."""
    if granted < settings.receive_buffer:
        log.warning(
            "the kernel granted a smaller receive buffer; bursts may be dropped, and counted",
            source=settings.name,
            asked=settings.receive_buffer,
            granted=granted,
            hint=hint,
        )
