"""What the admin socket and address serve: the status page, metrics, health; on the socket alone events too.

What changes anything, and what events contained, is on the socket only.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import ip_address
from math import inf
from typing import Any, NamedTuple

import msgspec
import trio
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from agent import contents, letters, page, tail
from agent.accept.tap import Tap
from agent.buffer import Kept
from agent.httpd import App, Message, Receive, Send
from agent.page.figures import figures

# Who accepts it gets it; anybody else Prometheus' own text format.
OPENMETRICS = "application/openmetrics-text"

# On the address: as many as sixteen people ask for who look at the status page, three times over. The metrics
# cost 5 ms each, so whoever asks on and on takes an eighth of one core.
PAGES_A_SECOND = 25


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


class ForThisHost:
    """Answers only who asks by an address or by localhost.

    On loopback nobody else can ask but a web page in a browser of this host, whose own name was made to lead
    here (DNS rebinding): it asks by that name, as browsers tell no other.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request; it may have no Host where it is not a browser's (HTTP/1.0)."""
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        app = self._app if not host or _is_this_host(host) else STRANGER
        await app(scope, receive, send)


STRANGER = PlainTextResponse("ask by an address or by localhost: this name could be anybody's\n", 421)


def _is_this_host(host: str) -> bool:
    """Whether no DNS server could have said where that is."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    with suppress(ValueError):
        ip_address(name.removeprefix("[").removesuffix("]"))
        return True
    return name.lower() == "localhost"


class Paced:
    """So many requests a second and no more, in the order in which they came: others wait.

    A page costs milliseconds of the loop that takes events, and on the address anybody may ask.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._turn = trio.StrictFIFOLock()
        self._free_at = -inf

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, when it is its turn."""
        async with self._turn:
            await trio.sleep_until(self._free_at)
            self._free_at = trio.current_time() + 1 / PAGES_A_SECOND
        await self._app(scope, receive, send)


def make_app(view: View, *, private: bool, local: bool = False) -> Starlette:
    """The ASGI app; `private` where only the socket's group can ask, `local` on a loopback address."""

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
        ],
        middleware=[
            *([] if private else [Middleware(Paced)]),
            *([Middleware(ForThisHost)] if local else []),
        ],
    )


def _for_page(document: Mapping[str, Any]) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json", headers=page.headers())


def _private(view: View) -> list[Route]:
    """What only the socket's group may see and do."""
    return [*letters.routes(view.buffer), *contents.routes(view.buffer), *tail.routes(view.taps)]
