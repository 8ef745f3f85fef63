"""What the admin socket and address serve: the status page, metrics, health; on the socket alone events too.

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

from agent import contents, letters, page, tail
from agent.accept.tap import Tap
from agent.buffer import Kept
from agent.page.figures import figures

# Who accepts it gets it; anybody else Prometheus' own text format.
OPENMETRICS = "application/openmetrics-text"


class View(NamedTuple):
    """What the pages show: the status (with event content or without), why it is not ready, the last hour.

    `taps` are the sources', by their names.
    """

    status: Callable[[bool], Mapping[str, Any]]
    unready: Callable[[], str]
    registry: CollectorRegistry
    buffer: Kept
    history: Callable[[], Mapping[str, Any]]
    taps: Mapping[str, Tap] = {}


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

    async def index(_request: Request) -> Response:
        whole = page.whole(figures(view.status(private), view.history()))
        return Response(whole, media_type="text/html", headers=page.headers())

    async def parts(_request: Request) -> Response:
        return _for_page({"edition": page.edition(), "parts": figures(view.status(private), view.history())})

    async def history(_request: Request) -> Response:
        return _for_page(view.history())

    return Starlette(
        routes=[
            Route("/", index),
            Route("/figures", parts),
            Route("/history", history),
            Route("/metrics", metrics),
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/status", status),
            *(_private(view) if private else ()),
        ]
    )


def _for_page(document: Mapping[str, Any]) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json", headers=page.headers())


def _private(view: View) -> list[Route]:
    """What only the socket's group may see and do."""
    return [*letters.routes(view.buffer), *contents.routes(view.buffer), *tail.routes(view.taps)]
