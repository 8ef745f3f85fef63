"""One client of a stream: its bytes become lines, its lines reads, and their fate acknowledgements."""

from collections import deque
from collections.abc import Callable, Iterator
from math import inf
from typing import Protocol

import msgspec
import trio

from agent import crash
from agent.accept.acknowledgements import Acknowledgements
from agent.accept.handed import HandedClient
from agent.accept.offered import Offered
from agent.accept.peer import Peer
from agent.accept.putter import Putter
from agent.accept.shortage import Shortage
from agent.clock import Clock
from agent.decode.ndjson import Unfinished
from agent.events import Cut, Origin, Read, sample

# After a smaller read of a client that waits for no answer, the reader lets some gather.
SMALL_BYTES, SMALL_PAUSE = 16 * 1024, 0.020
# The unfinished lines of all connections of a source together (the handbook's joint).
PARTIAL_BYTES = 16 * 1024 * 1024
# A client that has ended its side has so long to read its last totals; one that gives way, whose place
# another waits for, a moment.
FAREWELL_SECONDS, HURRIED_SECONDS = 30.0, 1.0

ASKING = b"ack"
# What may stand before it: empty lines, and the line ends of senders in C.
BLANK = b"\r\n\0"


class Partials:
    """The unfinished lines of a source's connections; beyond the bound the longest is refused."""

    def __init__(self, most: int = PARTIAL_BYTES) -> None:
        self._most = most
        self._held = 0
        self._of: dict[Connection, int] = {}

    def note(self, connection: "Connection", size: int) -> None:
        """A connection now holds so many bytes."""
        self._held += size - self._of.get(connection, 0)
        if size:
            self._of[connection] = size
        else:
            self._of.pop(connection, None)
        if self._held > self._most:
            max(self._of, key=self._of.__getitem__).refuse_partial()


class Reader(Protocol):
    """What cuts a stream into lines; see `LineReader`."""

    @property
    def pending(self) -> int: ...
    @property
    def due(self) -> bool: ...
    def feed(self, data: bytes) -> bytes: ...
    def refuse(self) -> None: ...
    def take_refused(self) -> bytes | None: ...
    def begin_anew(self) -> None: ...
    def unfinished(self) -> Unfinished: ...
    def resume(self, unfinished: Unfinished) -> None: ...
    def finish(self) -> bytes: ...


class Manner(Protocol):
    """How a source serves its connections, and what they share."""

    putter: Putter
    clock: Clock
    reader: Callable[[], Reader]
    ack: bool
    idle_timeout: float
    partials: Partials
    shortage: Shortage


class Connection:
    """One client: its bytes become lines, its lines reads, and what became of them acknowledgements."""

    def __init__(
        self,
        source: Manner,
        peer: Peer,
        origin: Origin | None = None,
        handed: HandedClient | None = None,
        user: object = None,
    ) -> None:
        self._source = source
        self._peer = peer
        self._origin = origin
        self._user = self if user is None else user
        self._reader = source.reader()
        self._acks: Acknowledgements | None = Acknowledgements() if source.ack else None
        self._offered = deque[Offered]()
        self._more = trio.Event()
        self._asked = trio.Event()  # for acknowledgements, or the connection ended without
        self._first = True
        self._silent = False  # there is nothing to read
        self._stopped = False
        self._farewell = FAREWELL_SECONDS
        self._until = inf  # it is read so long
        self._settled_at = -inf
        self._ended = False
        self._serving = trio.CancelScope()
        if handed is not None:
            self._resume(handed)

    def _resume(self, handed: HandedClient) -> None:
        """Go on where the process before this one stopped."""
        self._first = handed.first
        self._reader.resume(handed.unfinished)
        self._acks = None if handed.totals is None else Acknowledgements(handed.totals)
        for read in handed.reads:
            self._offered.append(self._pass_on(read, urgent=True, admitted=True))

    async def run(self) -> None:
        """Serve it to its end, or until it is left."""
        with self._serving:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_acknowledgements)
                nursery.start_soon(self._fold, nursery.cancel_scope)
                try:
                    await self._read()
                finally:
                    self._source.partials.note(self, 0)
                    self._ended = True
                    self._more.set()
                    self._asked.set()

    def stop(self) -> None:
        """Read what the client has sent to its end; it can send no more."""
        self._stopped = True
        self._peer.stop()

    def give_way(self, *, busy: bool) -> bool:
        """Stop, if the client was told, or can be, of all that it has sent, or will send.

        It is silent, unless it may be `busy`; one that waits for what finds no room is not.
        """
        now = trio.current_time()
        flows = not self._offered or (busy and now < self._settled_at + HURRIED_SECONDS)
        knows = self._peer.knows or self._acks is not None or self._first
        if not (flows and knows and (busy or self._silent)):
            return False
        if not busy:
            self._farewell = HURRIED_SECONDS
        if not self._peer.knows:  # the kernel goes on to take what it writes
            self._until = now + HURRIED_SECONDS
        self.stop()
        return True

    def leave(self) -> None:
        """Stop between two reads, or when all is read and not all settled: another process goes on."""
        self._serving.cancel()

    @property
    def left(self) -> bool:
        """Whether it was left before its end."""
        return self._serving.cancelled_caught

    def handed(self, descriptor: int) -> HandedClient:
        """What another process needs to go on with this client, once nothing more is put here."""
        left = [offered for offered in self._offered if not offered.settled.is_set()]
        return HandedClient(
            descriptor=descriptor,
            first=self._first,
            unfinished=self._reader.unfinished(),
            totals=None if self._acks is None else self._acks.totals(),
            unsent=self._peer.unsent,
            reads=[self._source.putter.withdraw(offered) for offered in left],
        )

    async def _read(self) -> None:
        """Bytes to lines until the client ends, resets, or is stopped."""
        putter = self._source.putter
        while True:
            try:
                with trio.move_on_after(self._source.idle_timeout) as patience:
                    self._silent = True
                    await self._peer.ready()
                    self._silent = False
                if patience.cancelled_caught:
                    self._finish(clean=False)
                    return
                async with putter.reading(self, self._user):
                    data = await self._peer.receive()
            except OSError:
                self._finish(clean=False)
                return
            if data is None:
                continue
            if not data or trio.current_time() > self._until:
                self._finish(clean=not self._stopped)
                return
            self._feed(data)
            few = len(data) < SMALL_BYTES
            del data  # or every idle client would keep its last read
            if self._acks is None and few:
                await trio.sleep(SMALL_PAUSE)

    def _feed(self, data: bytes) -> None:
        lines = b""
        for piece in self._pieces(data):
            more = self._reader.feed(piece)
            lines += self._greet(more, ended=piece.endswith(b"\n")) if self._first and more else more
            if (refused := self._reader.take_refused()) is not None:
                self._offer(lines, Cut("too_large", sample(refused)))
                lines = b""
        self._offer(lines, None)
        self._source.partials.note(self, self._reader.pending)

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """The first line by itself: what follows a greeting may be framed in another way."""
        while self._first:
            blank = 0 if self._reader.pending else len(data) - len(data.lstrip(BLANK))
            end = data.find(b"\n", blank) + 1
            if not end:
                break
            yield data[:end]
            data = data[end:]
        yield data

    def _greet(self, lines: bytes, *, ended: bool) -> bytes:
        """A client may ask for acknowledgements in its first line; `ended` if a newline came behind all."""
        lines = lines.lstrip(b"\r\n")
        if not lines:
            return lines
        self._first = False
        first, _, others = lines.partition(b"\n")
        if ASKING not in first or not _asks(first):
            return lines
        if ended and not others:
            self._reader.begin_anew()
        if self._acks is None:
            self._acks = Acknowledgements()
        self._asked.set()
        return others

    def refuse_partial(self) -> None:
        """The source holds too many unfinished lines and this is the longest."""
        self._reader.refuse()
        refused = self._reader.take_refused()
        self._offer(b"", Cut("too_large", sample(refused or b"")))
        self._source.partials.note(self, 0)

    def _finish(self, *, clean: bool) -> None:
        """The last line: whole if the client closed, cut if it was reset or stopped, or more was due.

        Who is told what arrived has not been told of a line that the agent itself cut, and sends it again.
        """
        due = self._reader.due
        last = self._reader.finish()
        if not due and not last.strip():
            return
        if clean and not due:
            lines = last + b"\n"
            self._offer(self._greet(lines, ended=False) if self._first else lines, None)
        elif not (self._stopped and self._acks is not None):
            self._offer(b"", Cut("truncated", sample(last)))

    def _offer(self, lines: bytes, cut: Cut | None) -> None:
        if not lines and cut is None:
            return
        if lines:
            self._source.shortage.heard(self)
        read = Read(lines, self._source.clock.now(), cut, self._origin)
        offered = self._pass_on(read, urgent=self._acks is not None)
        if self._acks is not None:
            self._offered.append(offered)
            self._more.set()

    def _pass_on(self, read: Read, *, urgent: bool, admitted: bool = False) -> Offered:
        tell = None if self._acks is None else self._acks.add
        return self._source.putter.offer(
            read, client=self, user=self._user, tell=tell, urgent=urgent, admitted=admitted
        )

    async def _fold(self, connection: trio.CancelScope) -> None:
        """See the reads arrive, whether or not the client listens."""
        while True:
            while self._offered:
                await self._offered[0].settled.wait()
                self._offered.popleft()
                self._settled_at = trio.current_time()
            if self._ended:
                if self._acks is not None:
                    self._acks.end()
                connection.deadline = trio.current_time() + self._farewell
                return
            self._more = trio.Event()
            await self._more.wait()

    async def _write_acknowledgements(self) -> None:
        """The newest totals, as fast as the client takes them."""
        if self._acks is None:
            await self._asked.wait()
        if self._acks is None:
            return
        try:
            if self._peer.unsent:  # the process before this one left an answer in the middle
                await self._peer.send(b"")
            while text := await self._acks.next():
                crash.point("ack.due")
                await self._peer.send(text)
                crash.point("ack.written")
        except trio.BrokenResourceError:
            return


def _asks(line: bytes) -> bool:
    """Whether a first line asks for acknowledgements."""
    try:
        return bool(msgspec.json.decode(line, type=dict[str, bool]) == {"ack": True})
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
