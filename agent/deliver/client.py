"""One POST to PostHog over pooled connections, and every way in which it can fail as a value.

It promises to come back within the timeout, whatever the other side does; that no more than the beginning
of a reply is ever held; and that neither a reason nor a log line holds a header, a body or a password. What
a reply means is left to `wire`.
"""

import logging
import os
import ssl
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import httpx
import trio

from agent import AgentError
from agent.config import Secret
from agent.deliver.verdict import Refused, Retry

# PostHog answers in a line; of anything longer (a portal's page) the beginning says what it is.
BODY_START = 64 * 1024

# An idle connection is kept for half of the 60 s after which common load balancers close theirs, so that a
# request seldom meets one that is being closed, and a quiet host still spares most TLS handshakes.
KEEP_ALIVE = 30.0

# httpx logs a line for every request, httpcore every header, at levels that a person might turn on.
CHATTY = ("httpx", "httpcore")

NOT_HTTP = "the answer was not HTTP"

# 47: zlib's 15 bits of window, and let it find out whether it reads gzip or zlib.
GZIP_OR_ZLIB = 47


class ClientError(AgentError):
    """The way out cannot be set up as configured."""


class WayOut(Protocol):
    """What of the `[delivery]` settings the client is made of; the timeout in seconds."""

    @property
    def timeout(self) -> float: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def proxy(self) -> Secret: ...
    @property
    def ca_file(self) -> str: ...
    @property
    def client_cert(self) -> str: ...
    @property
    def client_key(self) -> str: ...


class Reply(NamedTuple):
    """What came back: header names in lower case, and the beginning of the body."""

    status: int
    headers: Mapping[str, str]
    body_start: bytes


class _Body:
    """A request's body; `begun` once there was a connection to send it over, `sent` once the kernel has it.

    httpcore forgives a body that could not be written where an answer came all the same.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.begun = self.sent = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        yield self.data
        self.sent = True


class Client:
    """One project's connections, open for the length of an `async with`.

    A connection that the server closed while it was idle is noticed before it is used again (httpcore looks
    whether its socket is readable). Between that look and the request a moment remains: then the request
    fails as `Retry`, one short wait and no outage. Connections that died in silence fail by the timeout, and
    as none is kept idle for longer than that, the next attempt opens a new one and asks DNS again.
    """

    def __init__(self, way_out: WayOut) -> None:
        self._timeout = way_out.timeout
        self._extensions = {"timeout": httpx.Timeout(way_out.timeout).as_dict()}
        self._http = _http(way_out)

    async def __aenter__(self) -> Self:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, most: int = BODY_START
    ) -> Reply | Retry | Refused:
        """Send it once; redirects are not followed. Only cancellation comes out as an exception.

        The timeout is for all of it: httpx's own count for each read, which a byte now and then would please.
        Of the reply's body the first `most` bytes are read.
        """
        content = _Body(body)
        with trio.move_on_after(self._timeout):
            try:
                return await self._post(url, content, headers, most)
            except httpx.ProxyError as error:
                return _by_proxy(str(error))
            except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL, ValueError):
                # Without its text: h11's names the header's value, which may be a secret.
                return Refused("host", "the address or a configured header cannot be sent as HTTP")
            except (httpx.HTTPError, OSError) as error:
                # httpx reads a redirect's address though it does not go there.
                if isinstance(error, httpx.RemoteProtocolError) and "location header" in str(error):
                    return Refused("host", "redirected to what is no address")
                reason = _reason(error)
                return Retry(None, reason, cut=content.begun and reason != NOT_HTTP)
        return Retry(None, f"no answer within {self._timeout:g} s", cut=content.begun)

    async def _post(self, url: str, content: _Body, headers: Mapping[str, str], most: int) -> Reply | Retry:
        # A request of our own: the client's would be merged with defaults at a fifth of what a request costs.
        size = {"Content-Length": str(len(content.data))}
        request = httpx.Request(
            "POST", url, content=content, headers={**headers, **size}, extensions=self._extensions
        )
        response = await self._http.send(request, stream=True)
        start = bytearray()
        async with aclosing(response):
            # A server that refuses a body early may reset the connection behind its answer.
            with suppress(httpx.HTTPError):
                async for part in response.aiter_raw():
                    start += part
                    if len(start) >= most:
                        break
        if response.is_success and not content.sent:
            return Retry(None, "answered before the batch was sent, which it then cannot have taken")
        told = {name.lower(): value for name, value in response.headers.items()}
        return Reply(response.status_code, told, _readable(bytes(start[:most]), told, most))


def _http(way_out: WayOut) -> httpx.AsyncClient:
    limits = httpx.Limits(
        max_connections=way_out.concurrency,
        max_keepalive_connections=way_out.concurrency,
        keepalive_expiry=min(KEEP_ALIVE, way_out.timeout),
    )
    try:
        return httpx.AsyncClient(
            verify=_tls(way_out),
            proxy=way_out.proxy.reveal() or None,  # None: HTTPS_PROXY and NO_PROXY decide
            limits=limits,
            follow_redirects=False,
            # None is sent, which would bind us to one of a load balancer's servers; none is kept either.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        hint = "set delivery.proxy or HTTPS_PROXY to an address like http://proxy.example:3128"
        raise ClientError("the proxy's address is not one that can be used", hint) from error


def _tls(way_out: WayOut) -> ssl.SSLContext:
    """Trust in `ca_file` alone, else in the host's own store, where operators put their authorities."""
    try:
        paths = ssl.get_default_verify_paths()
        if way_out.ca_file or paths.cafile or paths.capath:
            context = ssl.create_default_context(cafile=way_out.ca_file or None)
        else:  # a host without a store: httpx brings Mozilla's
            context = httpx.create_ssl_context()
        if way_out.client_cert:
            # A password is given so that an encrypted key is an error, not a question on the terminal.
            context.load_cert_chain(way_out.client_cert, way_out.client_key or None, password="")
    except OSError as error:
        files = ", ".join(filter(None, (way_out.ca_file, way_out.client_cert, way_out.client_key)))
        hint = "delivery.ca_file, client_cert and client_key are PEM files that the agent's user can read"
        raise ClientError(f"cannot use the certificates in {files}: {_cause(error)}", hint) from error
    return context


def _readable(start: bytes, headers: Mapping[str, str], most: int) -> bytes:
    """The beginning of a body that was packed although we asked for it plain; as it came, if unreadable."""
    if headers.get("content-encoding", "").strip().lower() in ("gzip", "x-gzip", "deflate"):
        with suppress(zlib.error):
            return zlib.decompressobj(GZIP_OR_ZLIB).decompress(start, most)
    return start


def _by_proxy(text: str) -> Retry | Refused:
    """What it means that the proxy would not connect us; httpcore's text begins with its status."""
    status = int(text[:3]) if text[:3].isdecimal() else 0
    if 400 <= status < 500 and status not in (408, 429):
        return Refused("host", f"the proxy would not connect: HTTP {status}")
    return Retry(None, "the proxy could not connect" + (f": HTTP {status}" if status else ""))


def _reason(error: Exception) -> str:
    """One short line; of foreign text only what the system and OpenSSL say."""
    match error:
        case httpx.ConnectError():
            what = "cannot connect"
        case httpx.TimeoutException():
            what = "no answer in time"
        case httpx.RemoteProtocolError() if "disconnected" in str(error):
            what = "connection closed without an answer"
        case httpx.RemoteProtocolError():
            what = NOT_HTTP
        case _:
            what = "connection broken"
    cause = _cause(error)
    return f"{what}: {cause}" if cause else what


def _cause(error: BaseException) -> str:
    """What the operating system or OpenSSL said first, at the bottom of the chain."""
    text = ""
    for link in _chain(error):
        if isinstance(link, ssl.SSLCertVerificationError):
            text = f"certificate verify failed: {link.verify_message}"
        elif isinstance(link, OSError) and link.strerror:
            text = link.strerror
            if link.errno and link.errno > 0 and not isinstance(link, ssl.SSLError):
                text = os.strerror(link.errno)  # trio's own text holds an address
    return text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            error = error.__cause__ or error.__context__
