"""Asks PostHog one call, and tells every way in which that can fail as a value.

It promises to come back within the time given, whatever the other side does, and to hold no more than
`REPLY_BYTES` of an answer: what is longer is left to be read piece by piece.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import NamedTuple, Self
from urllib.request import getproxies

import httpx
import trio

from agent.accept.flags.calls import Call
from agent.accept.flags.replies import Headers
from agent.config import Project
from agent.httpc import open_client, why
from agent.pack import GZIP, open_stream
from agent.veil import sent_by, without

# The definitions of some thousand flags.
REPLY_BYTES = 4 * 1024 * 1024
# Connections to PostHog: with its 0.1 s a call, 160 calls a second; it takes 50 a second from one address
# (`rust/feature-flags/src/config.rs`).
CONCURRENCY = 16
# Who answers with what he was asked does so in some kilobytes; searching them takes 4 ms for each secret.
REFLECTED_BYTES = 16 * 1024
# As for deliveries: half of what common load balancers allow.
KEEP_ALIVE = 30.0


class Rest:
    """What is left to be read of a long answer; `whole` once that was all of it, and not cut off."""

    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        self._parts = parts
        self.whole = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with suppress(httpx.HTTPError, OSError):
            async for part in self._parts:
                yield part
            self.whole = True


class Answer(NamedTuple):
    """What came back: header names in small letters; of a long body the beginning, and the `rest`."""

    status: int
    headers: Headers
    body: bytes
    rest: Rest | None


class Failed(NamedTuple):
    """No answer came, and why; not an `outage` where the call itself cannot be sent."""

    reason: str
    outage: bool = True


class Upstream:
    """The flag endpoints of one project's host; the connections are open for an `async with`."""

    def __init__(self, project: Project) -> None:
        self._host = project.host.rstrip("/")
        self._configured = [
            (name.lower().encode(), secret.reveal().encode())
            for name, secret in project.delivery.headers.items()
        ]
        self._secrets = sent_by(project.delivery, getproxies().values())
        self._http = open_client(project.delivery, connections=CONCURRENCY, idle=KEEP_ALIVE)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def asked(self, call: Call, seconds: float) -> AsyncIterator[Answer | Failed]:
        """Ask it once; redirects are not followed. The answer may be read during the block."""
        response = None
        try:
            with trio.move_on_after(seconds) as patience:
                try:
                    response = await self._http.send(self._request(call, seconds), stream=True)
                    answer: Answer | Failed = await _begin(response)
                except (httpx.LocalProtocolError, httpx.InvalidURL):
                    answer = Failed("the call cannot be sent as HTTP", outage=False)
                except (httpx.HTTPError, OSError, ValueError) as error:
                    answer = Failed(why(error))
            yield Failed(f"no answer within {seconds:g} s") if patience.cancelled_caught else answer
        finally:
            if response is not None:
                await response.aclose()

    def repeats_a_secret(self, answer: Answer) -> bool:
        """Whether it says what was sent along, as proxies do that answer with what they were asked.

        Anybody on this host may ask, so that such an answer is not passed on.
        """
        if not self._secrets:
            return False
        body = answer.body
        if (b"content-encoding", b"gzip") in answer.headers:
            body = open_stream(body, GZIP, REFLECTED_BYTES) or b""
        said = b"\n".join((*(value for _, value in answer.headers), body[:REFLECTED_BYTES]))
        return without(said, self._secrets) != said

    def _request(self, call: Call, seconds: float) -> httpx.Request:
        """The call for PostHog; configured headers are added where the client says nothing itself."""
        named = {name for name, _ in call.headers}
        headers = [*call.headers, *(header for header in self._configured if header[0] not in named)]
        if call.client:
            headers.append((b"x-forwarded-for", call.client.encode()))
        if call.if_none_match:
            headers.append((b"if-none-match", call.if_none_match))
        url = self._host + call.path + ("?" + call.query.decode("latin-1") if call.query else "")
        timeout = httpx.Timeout(seconds).as_dict()
        return httpx.Request(
            call.method, url, headers=headers, content=call.body, extensions={"timeout": timeout}
        )


async def _begin(response: httpx.Response) -> Answer:
    """The whole answer, or its beginning where it is long."""
    start = bytearray()
    parts = response.aiter_raw()
    headers = tuple((name.lower(), value) for name, value in response.headers.raw)
    async for part in parts:
        start += part
        if len(start) > REPLY_BYTES:
            return Answer(response.status_code, headers, bytes(start), Rest(parts))
    return Answer(response.status_code, headers, bytes(start), None)
