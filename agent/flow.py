"""An answer whose body is made while it leaves, and whose maker is ended with the connection."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import NamedTuple

import trio
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from agent import AgentError

# How much there will be, in the body's own unit, for who shows how far it is.
TOTAL = "capture-agent-total"
NDJSON = "application/x-ndjson"


class Body(NamedTuple):
    """What comes, a part at a time, and how much that will be, where it is known."""

    parts: AsyncIterator[bytes]
    total: int | None = None


class Flow(Response):
    """Sends a body that is open for as long as it is sent.

    An `AgentError` from opening it is told as JSON with status 503; later the connection is cut, so that what
    came is not taken for all there is. Who does not read holds up only the body's own maker.
    """

    def __init__(self, opened: Callable[[], AbstractAsyncContextManager[Body]], media_type: str) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]  # it would be 0
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            nursery.start_soon(_end_when_gone, receive, nursery.cancel_scope)
            try:
                body = await stack.enter_async_context(self._opened())
            except AgentError as error:
                told = {"error": str(error), "hint": error.hint, "exit_code": error.exit_code}
                await JSONResponse(told, 503)(scope, receive, send)
            else:
                await self._send(body, send)
            nursery.cancel_scope.cancel()

    async def _send(self, body: Body, send: Send) -> None:
        if body.total is not None:
            self.headers[TOTAL] = str(body.total)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for part in body.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _end_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
