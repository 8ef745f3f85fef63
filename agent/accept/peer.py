"""One client's end of a stream, in the clear or in TLS: read, written to, and asked to end."""

import errno
import socket
import ssl
from typing import Protocol

import trio

from agent import AgentError

# A Unix stream's kernel buffer holds 208 KiB by default: one read empties it.
READ_BYTES = 256 * 1024
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

    async def receive(self) -> bytes:
        """What has come, empty at its clean end. Raises OSError where it was cut off."""

    async def send(self, text: bytes) -> None:
        """Raises `trio.BrokenResourceError` where nobody takes it any more."""

    def stop(self) -> None:
        """What was sent can be read to its end; nothing more is taken."""

    @property
    def unsent(self) -> bytes:
        """What a cancelled `send` has left; the next one begins with it."""


class PlainPeer:
    """A client in the clear."""

    def __init__(self, sock: trio.socket.SocketType, unsent: bytes = b"") -> None:
        self._sock = sock
        self.unsent = unsent

    async def ready(self) -> None:
        """See `Peer.ready`."""
        await trio.lowlevel.wait_readable(self._sock)

    async def receive(self) -> bytes:
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


class TlsPeer(PlainPeer):
    """A client in TLS. One that ends without saying so, as TLS wants it, was cut off (RFC 8446, 6.1)."""

    def __init__(self, sock: trio.socket.SocketType, context: ssl.SSLContext) -> None:
        super().__init__(sock)
        self._tls = trio.SSLStream(trio.SocketStream(sock), context, server_side=True)
        self._agreed = False
        self._got = b""

    async def ready(self) -> None:
        """See `Peer.ready`; the first time it agrees on TLS before. A client that cannot has ended."""
        try:
            if not self._agreed:
                with trio.fail_after(HANDSHAKE_SECONDS):
                    await self._tls.do_handshake()
                self._agreed = True
            self._got = bytes(await self._tls.receive_some(READ_BYTES))
        except (trio.BrokenResourceError, trio.TooSlowError) as error:
            raise OSError(errno.ECONNABORTED, "not TLS, or cut off") from error

    async def receive(self) -> bytes:
        """See `Peer.receive`."""
        got, self._got = self._got, b""
        return got

    async def send(self, text: bytes) -> None:
        """See `Peer.send`."""
        await self._tls.send_all(text)


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
