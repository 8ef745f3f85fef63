"""The admin pages: metrics, health and status on a Unix socket and a TCP address, dead letters on the socket.

What changes anything, and what events contained, is on the socket only.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from agent import letters
from agent.buffer import DeadLetters

# Who accepts it gets it; anybody else Prometheus' own text format.
OPENMETRICS = "application/openmetrics-text"


class View(NamedTuple):
    """What the pages show: the status (with event content or without), and why it is not ready."""

    status: Callable[[bool], Mapping[str, Any]]
    unready: Callable[[], str]
    registry: CollectorRegistry
    letters: DeadLetters


def make_app(view: View, *, private: bool) -> Starlette:
    """The ASGI app; `private` where only the socket's group can ask."""

    async def metrics(request: Request) -> Response:
        form = openmetrics if OPENMETRICS in request.headers.get("accept", "") else exposition
        text = form.generate_latest(view.registry)
        return Response(text, headers={"Content-Type": form.CONTENT_TYPE_LATEST})

    async def livez(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        why = view.unready()
        return PlainTextResponse(f"{why}\n", 503) if why else PlainTextResponse("ok\n")

    async def status(_request: Request) -> Response:
        document = msgspec.json.encode(view.status(private))
        return Response(document, media_type="application/json")

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/status", status),
            *(letters.routes(view.letters) if private else ()),
        ]
    )
