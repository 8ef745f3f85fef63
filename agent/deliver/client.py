"""One POST to PostHog over pooled connections, and every way in which it can fail as a value.

It promises to come back within the timeout, whatever the other side does; that no more than the beginning
of a reply is ever held; and that neither a reason nor a log line holds a header, a body or a password. What
a reply means is left to `wire`.
"""

import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import httpx
import trio

from agent import crash
from agent.deliver.verdict import Refused, Retry
from agent.httpc import NOT_HTTP, WayOut, open_client, why

# PostHog answers in a line; of anything longer (a portal's page) the beginning says what it is.
BODY_START = 64 * 1024

# An idle connection is kept for half of the 60 s after which common load balancers close theirs, so that a
# request seldom meets one that is being closed, and a quiet host still spares most TLS handshakes.
KEEP_ALIVE = 30.0

# 47: zlib's 15 bits of window, and let it find out whether it reads gzip or zlib.
GZIP_OR_ZLIB = 47


class Terms(WayOut, Protocol):
    """What of the `[delivery]` settings the client is made of; the timeout in seconds."""

    @property
    def timeout(self) -> float: ...
    @property
    def concurrency(self) -> int: ...


class Reply(NamedTuple):
    """What came back: header names in lower case, and the beginning of the body."""

    status: int
    headers: Mapping[str, str]
    body_start: bytes


class _Body:
    """A request's body; `begun` once there was a connection to send it over, `sent` once the kernel has it.

    httpcore forgives a body that could not be written where an answer came all the same. Each request is a
    cycle of objects that only the collector ends, and seldom: the bytes are not left in it.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces
        self.begun = self.sent = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        for piece in self.pieces:
            yield piece
        self.sent = True
        crash.point("post.sent")


class Client:
    """One project's connections, open for the length of an `async with`.

    A connection that the server closed while it was idle is noticed before it is used again (httpcore looks
    whether its socket is readable). Between that look and the request a moment remains: then the request
    fails as `Retry`, one short wait and no outage. Connections that died in silence fail by the timeout, and
    as none is kept idle for longer than that, the next attempt opens a new one and asks DNS again.
    """

    def __init__(self, terms: Terms) -> None:
        self._timeout = terms.timeout
        self._extensions = {"timeout": httpx.Timeout(terms.timeout).as_dict()}
        self._http = open_client(terms, connections=terms.concurrency, idle=min(KEEP_ALIVE, terms.timeout))

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def post(
        self, url: str, body: Sequence[bytes], headers: Mapping[str, str], *, most: int = BODY_START
    ) -> Reply | Retry | Refused:
        """Send it once; redirects are not followed. Only cancellation comes out as an exception.

        The timeout is for all of it: httpx's own count for each read, which a byte now and then would please.
        Of the reply's body the first `most` bytes are read.
        """
        content = _Body(body)
        del body
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
                reason = why(error)
                return Retry(None, reason, cut=content.begun and reason != NOT_HTTP)
            finally:
                content.pieces = ()
        return Retry(None, f"no answer within {self._timeout:g} s", cut=content.begun)

    async def _post(self, url: str, content: _Body, headers: Mapping[str, str], most: int) -> Reply | Retry:
        # A request of our own: the client's would be merged with defaults at a fifth of what a request costs.
        size = {"Content-Length": str(sum(map(len, content.pieces)))}
        request = httpx.Request(
            "POST", url, content=content, headers={**headers, **size}, extensions=self._extensions
        )
        response = await self._http.send(request, stream=True)
        crash.point("post.answered")
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
