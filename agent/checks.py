"""Which values a setting may have, beyond its type; each answer says what is wrong with one that may not."""

import math
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from agent import shape_checks
from agent.bounds import PATH_BYTES, Wrong, between, named, path, wrong_address
from agent.config import (
    KIB,
    MIB,
    Admin,
    Buffer,
    Config,
    Delivery,
    Http,
    Project,
    Settings,
    Tcp,
    Udp,
    UnixDatagram,
    UnixStream,
)
from agent.events import CHUNK_EVENTS, OTHER
from agent.source_checks import is_loopback, of_source

# PostHog's own limit on a key (`rust/capture/src/token.rs`).
KEY_BYTES = 64
# Keys that open other doors than the one for events.
OTHER_KEYS = {"phx_": "a personal API key", "phs_": "a project secret key", "pha_": "an OAuth access token"}
# Where people look at their events (posthog-python `posthog/request.py` rewrites the same hosts).
APP_HOSTS = {"app.posthog.com": "us", "us.posthog.com": "us", "eu.posthog.com": "eu"}

# What PostHog takes in one request, uncompressed (`rust/capture/src/setup.rs`).
LARGEST_BATCH = 100 * MIB
SMALLEST_BUFFER = 16 * MIB

_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, token
# These say how the body is to be read or whose connection it is; the agent sets them.
_OWN_HEADERS = {
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}

# These say whose a request by v1 is and which try (`rust/capture/src/v1/constants.rs`).
_V1_HEADERS = {
    "authorization",
    "posthog-attempt",
    "posthog-request-id",
    "posthog-request-timestamp",
    "posthog-sdk-info",
}


def of(settings: Settings) -> Iterator[Wrong]:
    """What is wrong with one table."""
    match settings:
        case Project():
            yield from named(settings.name)
            if settings.name == OTHER:
                yield "name", f"{OTHER!r} is the label of events with keys of their own: choose another"
            if wrong := wrong_host(settings.host):
                yield "host", wrong
        case Delivery():
            yield from _of_delivery(settings)
        case UnixStream() | UnixDatagram() | Udp() | Tcp() | Http():
            yield from of_source(settings)
        case Buffer():
            yield from path(settings.path, "path", math.inf)
            yield from between("max_size", settings.max_size, SMALLEST_BUFFER, 2**60, size=True)
        case Admin():
            if settings.socket:
                yield from path(settings.socket, "socket", PATH_BYTES)
            if settings.listen and (wrong := wrong_address(settings.listen)):
                yield "listen", wrong


def _of_delivery(delivery: Delivery) -> Iterator[Wrong]:
    yield from between("max_batch_events", delivery.max_batch_events, 1, CHUNK_EVENTS)
    yield from between("max_batch_size", delivery.max_batch_size, KIB, LARGEST_BATCH, size=True)
    yield from between("linger", delivery.linger, 0, 3600, seconds=True)
    yield from between("concurrency", delivery.concurrency, 1, 256)
    yield from between("timeout", delivery.timeout, 0.1, 3600, seconds=True)
    yield from between("backoff_base", delivery.backoff_base, 0.01, 3600, seconds=True)
    yield from between("backoff_max", delivery.backoff_max, delivery.backoff_base, 86400, seconds=True)
    yield from between("max_attempts", delivery.max_attempts, 0, 1_000_000)
    yield from between("cooldown", delivery.cooldown, 1, 86400, seconds=True)
    for number, (name, secret) in enumerate(delivery.headers.items(), 1):
        value = secret.reveal()
        if _HEADER.fullmatch(name) is None:  # it may be the value, and secret
            yield f"headers[{number}]", "has no name that an HTTP header can have"
        elif name.lower() in _OWN_HEADERS:
            yield f"headers.{name}", "is set by the agent itself"
        elif delivery.protocol != "batch" and name.lower() in _V1_HEADERS:
            yield f"headers.{name}", f'is set by the agent itself with protocol = "{delivery.protocol}"'
        elif not (value.isascii() and value.isprintable()) or value != value.strip():
            yield f"headers.{name}", "may only hold printable ASCII, with no space at its ends"
    proxy = delivery.proxy.reveal()
    if proxy and (wrong := _wrong_url(proxy, password=True)):
        yield "proxy", wrong
    if delivery.client_key and not delivery.client_cert:
        yield "client_key", "is of no use without client_cert"


def of_whole(config: Config) -> Iterator[Wrong]:
    """What does not fit together."""
    for section, names in (
        ("project", [project.name for project in config.projects]),
        ("source", [source.name for source in config.sources]),
    ):
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{section}[{name}].name", f"there are several {section}s of this name; each needs its own"
    taken: dict[str, str] = {}
    for where, place in _places(config):
        if place in taken and not place.endswith(":0"):
            yield where, f"{place} is that of {taken[place]} already"
        taken.setdefault(place, where)


def _places(config: Config) -> Iterator[Wrong]:
    """Every path and address that is opened, and the setting that says it."""
    for source in config.sources:
        if source.socket:
            yield f"source[{source.name}].socket", f'"{source.socket}"'
        elif isinstance(source, Udp | Tcp | Http):
            transport = "UDP" if isinstance(source, Udp) else "TCP"
            yield f"source[{source.name}].listen", f"{transport} {source.listen}"
        elif source.path:
            yield f"source[{source.name}].path", source.path
    if config.admin.socket:
        yield "admin.socket", config.admin.socket
    if config.buffer.path:
        yield "buffer.path", config.buffer.path


def warnings(config: Config) -> Iterator[Wrong]:
    """What is allowed, but a person should know."""
    for source in config.sources:
        for setting, what in shape_checks.warnings(source):
            yield f"source[{source.name}].{setting}", what
        if isinstance(source, Tcp) and source.listen and not (source.tls_cert or is_loopback(source.listen)):
            why = f"{source.listen} is reached from other hosts, and what they send can be read on the way"
            yield f"source[{source.name}].listen", f"{why}: set tls_cert and tls_key, or use 127.0.0.1"
        if isinstance(source, Http) and source.listen and not is_loopback(source.listen):
            why = f"{source.listen} is reached from other hosts, and what they send can be read on the way"
            yield f"source[{source.name}].listen", f"{why}: put a proxy with TLS before it"


def wrong_key(key: str) -> str:
    """Why PostHog would not take events with this key; empty where it may."""
    if not key:
        return "is empty"
    if kind := OTHER_KEYS.get(key[:4]):
        return f"is {kind} ({key[:4]}...), which cannot send events: use the project's key (phc_...)"
    if len(key.encode()) > KEY_BYTES:
        return f"is longer than {KEY_BYTES} bytes: no project's key is"
    if not key.isascii() or not key.isprintable() or " " in key:
        return "holds characters that no project's key has"
    return ""


def wrong_host(host: str) -> str:
    """Why events cannot be sent to this host; empty where they can."""
    if wrong := _wrong_url(host, password=False):
        return wrong
    parts = urlsplit(host)
    if region := APP_HOSTS.get(parts.hostname or ""):
        return f"is where people look at events (did you mean https://{region}.i.posthog.com?)"
    if parts.query or parts.fragment:
        return 'must end before "?" and "#"'
    return ""


def _wrong_url(url: str, *, password: bool) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is no URL: its port or its brackets are wrong"
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        return 'must be a URL, such as "https://us.i.posthog.com"'
    if not (url.isascii() and url.isprintable()) or " " in url:
        return "holds characters that no URL has"
    if "@" in parts.netloc and not password:
        return "must not hold a user or a password"
    return ""
