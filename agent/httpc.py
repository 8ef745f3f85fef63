"""Opens HTTP connections out of the host, by the configured proxy and with the configured certificates.

It promises that what cannot work as configured is told before anything is sent, and that neither a log line
nor `why` holds a header, an address or a password. What is sent, and what an answer means, is left to
others.
"""

import logging
import os
import ssl
from collections.abc import Iterator
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Protocol

import httpx

from agent import AgentError
from agent.config import Secret

# httpx logs a line for every request, httpcore every header, at levels that a person might turn on.
CHATTY = ("httpx", "httpcore")

NOT_HTTP = "the answer was not HTTP"


class WayOutError(AgentError):
    """The way out cannot be set up as configured."""


class WayOut(Protocol):
    """What of the `[delivery]` settings says how the host is left."""

    @property
    def proxy(self) -> Secret: ...
    @property
    def ca_file(self) -> str: ...
    @property
    def client_cert(self) -> str: ...
    @property
    def client_key(self) -> str: ...


def open_client(way_out: WayOut, *, connections: int, idle: float) -> httpx.AsyncClient:
    """A client of at most so many connections, each kept for `idle` seconds without a request."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return httpx.AsyncClient(
            verify=_tls(way_out),
            proxy=way_out.proxy.reveal() or None,  # None: HTTPS_PROXY and NO_PROXY decide
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=idle
            ),
            follow_redirects=False,
            # None is sent, which would bind us to one of a load balancer's servers; none is kept either.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        hint = "set delivery.proxy or HTTPS_PROXY to an address like http://proxy.example:3128"
        raise WayOutError("the proxy's address is not one that can be used", hint) from error


def why(error: Exception) -> str:
    """Why a request failed, in one short line; of foreign text only what the system and OpenSSL say."""
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
    text = _cause(error)
    return f"{what}: {text}" if text else what


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
        raise WayOutError(f"cannot use the certificates in {files}: {_cause(error)}", hint) from error
    return context


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
