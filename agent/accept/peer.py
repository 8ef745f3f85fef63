"""One client's end of a stream, in the clear or in TLS: read, written to, and asked to end."""

import errno
import os
import socket
import ssl
from contextlib import suppress
from typing import Protocol

import trio

from agent import AgentError
from agent.accept.turns import Turns

# A Unix stream's kernel buffer holds 208 KiB by default: one read empties it.
READ_BYTES = 256 * 1024
# TLS gives at most a record at once (RFC 8446, 5.1); its buffer stays as large as the most it was fed with.
RECORD_BYTES = 16 * 1024
WIRE_BYTES = 4 * RECORD_BYTES
# A client has so long to agree on TLS; it takes two exchanges.
HANDSHAKE_SECONDS = 10.0
# After so long without a word from a TCP peer the kernel asks whether it is still there, this often, so many
# times: then dead clients are gone after two minutes (tcp(7); the kernel's own default is two hours).
KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


class CertificateError(AgentError):
    """A source's certificates cannot be used."""


class Peer(Protocol):
    """A connected client."""

    async def ready(self) -> None:
        """Return when there is something to read, or the connection has ended."""

    async def receive(self) -> bytes | None:
        """What has come, empty at its clean end; None where nothing has.

        Raises OSError where it was cut off.
        """

    async def send(self, text: bytes) -> None:
        """Raises `trio.BrokenResourceError` where nobody takes it any more."""

    def stop(self) -> None:
        """What was sent can be read to its end; nothing more is taken."""

    def part(self) -> None:
        """Tell the client, if it can be told at once, that nothing more comes."""

    @property
    def knows(self) -> bool:
        """Whether, after `stop`, all that the client writes fails at once; over TCP the first does not."""

    @property
    def unsent(self) -> bytes:
        """What a cancelled `send` has left; the next one begins with it."""


class PlainPeer:
    """A client in the clear."""

    def __init__(self, sock: trio.socket.SocketType, unsent: bytes = b"") -> None:
        self._sock = sock
        self.knows = sock.family == socket.AF_UNIX
        self.unsent = unsent

    async def ready(self) -> None:
        """See `Peer.ready`."""
        await trio.lowlevel.wait_readable(self._sock)

    async def receive(self) -> bytes | None:
        """See `Peer.receive`."""
        return await self._sock.recv(READ_BYTES)

    async def send(self, text: bytes) -> None:
        """See `Peer.send`."""
        self.unsent += text
        try:
            while self.unsent:
                sent = await self._sock.send(self.unsent)
                self.unsent = self.unsent[sent:]
        except OSError as error:
            raise trio.BrokenResourceError from error

    def stop(self) -> None:
        """See `Peer.stop`."""
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # the client has gone already
                raise

    def part(self) -> None:
        """See `Peer.part`: that it is closed tells it."""


class TlsPeer(PlainPeer):
    """A client in TLS. One that ends without saying so, as TLS wants it, was cut off (RFC 8446, 6.1).

    Each step to an agreement is a turn of its user's: a signature takes a millisecond of everybody's time,
    and a thousand clients may come at once.
    """

    def __init__(
        self, sock: trio.socket.SocketType, context: ssl.SSLContext, turns: Turns, user: object
    ) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._turns, self._user = turns, user
        self._agreed = self._cut = False
        self._more = True  # than was received, of what the kernel gave, or its end

    async def ready(self) -> None:
        """See `Peer.ready`; the first time it agrees on TLS before. Raises OSError where it cannot."""
        if not self._agreed:
            try:
                with trio.fail_after(HANDSHAKE_SECONDS):
                    await self._agree()
            except (trio.BrokenResourceError, trio.TooSlowError) as error:
                raise OSError(errno.ECONNABORTED, "no agreement on TLS") from error
        if not self._more:
            await super().ready()

    async def _agree(self) -> None:
        while not self._agreed:
            await super().ready()
            async with self._turns.step(self._user):
                self._feed()
                try:
                    self._tls.do_handshake()
                    self._agreed = True
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError:
                    self._write()  # why not, where TLS has a word for it
                    raise
            # What TLS 1.3 has left to say is session tickets, which go before the first answer: a client that
            # asks for none, and goes without reading them, would reset the connection.
            if not (self._agreed and self._tls.version() == "TLSv1.3"):
                await super().send(self._outgoing.read())

    def _feed(self) -> bool:
        """Give TLS what has come; False where nothing has.

        Raises OSError at the end, of which TLS is not told: it could say nothing more to the client.
        """
        try:
            some = os.read(self._sock.fileno(), WIRE_BYTES)
        except BlockingIOError:
            return False
        if not some:
            raise OSError(errno.ECONNABORTED, "cut off")
        self._incoming.write(some)
        return True

    async def receive(self) -> bytes | None:
        """See `Peer.receive`."""
        # Who wants new keys again and again, which go with the next acknowledgement, and wants none of those.
        if self._cut or self._outgoing.pending > WIRE_BYTES:
            raise OSError(errno.ECONNABORTED, "cut off")
        got = bytearray()
        self._more = True
        try:
            while self._more and len(got) < READ_BYTES:
                try:
                    some = self._tls.read(RECORD_BYTES)
                except ssl.SSLWantReadError:
                    self._more = self._feed()
                    continue
                if not some:
                    return bytes(got)
                got += some
        except OSError:
            if not got:
                raise
            self._cut = True  # it is told next time
        await trio.lowlevel.checkpoint()
        return bytes(got) or None

    async def send(self, text: bytes) -> None:
        """See `Peer.send`."""
        try:
            self._tls.write(text)
        except OSError as error:
            raise trio.BrokenResourceError from error
        await super().send(self._outgoing.read())

    def part(self) -> None:
        """See `Peer.part`."""
        if self._agreed and not self.unsent:
            with suppress(OSError):  # it says that the client has not said it too
                self._tls.unwrap()
            self._write()

    def _write(self) -> None:
        """Send what TLS has to say if the kernel takes it at once: nobody waits for it."""
        with suppress(OSError):
            os.write(self._sock.fileno(), self._outgoing.read())


def stay_awake(listener: socket.socket) -> None:
    """Have the kernel find dead clients, and send small answers at once; what is accepted inherits it."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        listener.setsockopt(socket.IPPROTO_TCP, option, value)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def server_context(cert: str, key: str, client_ca: str) -> ssl.SSLContext | None:
    """TLS with this certificate, and only for clients of that authority where one is given; None without
    both.

    Raises `CertificateError` where a file cannot be used.
    """
    if not cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    # As OpenSSL 3 has it by default: nobody needs it, and it costs a signature.
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        # A password is given so that an encrypted key is an error, not a question on the terminal.
        context.load_cert_chain(cert, key or None, password="")
        if client_ca:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        files = ", ".join(filter(None, (cert, key, client_ca)))
        hint = "tls_cert, tls_key and tls_client_ca are PEM files that the agent's user can read"
        why = error.strerror or error
        raise CertificateError(f"cannot use the certificates in {files}: {why}", hint) from error
    return context
