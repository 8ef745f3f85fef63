"""Which values a setting may have, beyond its type; each answer says what is wrong with one that may not."""

import math
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from agent.config import (
    GIB,
    KIB,
    MIB,
    Admin,
    Buffer,
    Config,
    Delivery,
    Project,
    Settings,
    Source,
    Tcp,
    Udp,
    UnixDatagram,
    UnixStream,
)
from agent.events import CHUNK_EVENTS, OTHER
from agent.units import format_duration, format_size

# What is wrong, and of which setting.
Wrong = tuple[str, str]

# PostHog's own limit on a key (`rust/capture/src/token.rs`).
KEY_BYTES = 64
# Keys that open other doors than the one for events.
OTHER_KEYS = {"phx_": "a personal API key", "phs_": "a project secret key", "pha_": "an OAuth access token"}
# Where people look at their events (posthog-python `posthog/request.py` rewrites the same hosts).
APP_HOSTS = {"app.posthog.com": "us", "us.posthog.com": "us", "eu.posthog.com": "eu"}

# unix(7): 108 bytes with the NUL at the end.
PATH_BYTES = 107
# PostHog's limit on one event with its envelope is 1,000,000 bytes (`rust/capture/src/config.rs`).
LARGEST_EVENT = 976 * KIB
# What PostHog takes in one request, uncompressed (`rust/capture/src/setup.rs`).
LARGEST_BATCH = 100 * MIB
SMALLEST_BUFFER = 16 * MIB

_FIELD = re.compile(r"\{(\w+)\}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
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
            yield from _named(settings.name)
            if settings.name == OTHER:
                yield "name", f"{OTHER!r} is the label of events with keys of their own: choose another"
            if wrong := wrong_host(settings.host):
                yield "host", wrong
        case Delivery():
            yield from _of_delivery(settings)
        case UnixStream() | UnixDatagram() | Udp() | Tcp():
            yield from _of_source(settings)
        case Buffer():
            yield from _path(settings.path, "path", math.inf)
            yield from _between("max_size", settings.max_size, SMALLEST_BUFFER, 2**60, size=True)
        case Admin():
            if settings.socket:
                yield from _path(settings.socket, "socket", PATH_BYTES)
            if settings.listen and (wrong := wrong_address(settings.listen)):
                yield "listen", wrong


def _of_delivery(delivery: Delivery) -> Iterator[Wrong]:
    yield from _between("max_batch_events", delivery.max_batch_events, 1, CHUNK_EVENTS)
    yield from _between("max_batch_size", delivery.max_batch_size, KIB, LARGEST_BATCH, size=True)
    yield from _between("linger", delivery.linger, 0, 3600, seconds=True)
    yield from _between("concurrency", delivery.concurrency, 1, 256)
    yield from _between("timeout", delivery.timeout, 0.1, 3600, seconds=True)
    yield from _between("backoff_base", delivery.backoff_base, 0.01, 3600, seconds=True)
    yield from _between("backoff_max", delivery.backoff_max, delivery.backoff_base, 86400, seconds=True)
    yield from _between("max_attempts", delivery.max_attempts, 0, 1_000_000)
    yield from _between("cooldown", delivery.cooldown, 1, 86400, seconds=True)
    for name, secret in delivery.headers.items():
        value = secret.reveal()
        if _HEADER.fullmatch(name) is None:
            yield f"headers.{name}", "is no name for an HTTP header"
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


def _of_source(source: Source) -> Iterator[Wrong]:
    yield from _named(source.name)
    yield from _between("max_event", source.max_event, KIB, LARGEST_EVENT, size=True)
    if source.distinct_id and not source.distinct_id.strip():
        yield "distinct_id", "is blank, which PostHog refuses"
    for name, value in source.properties.items():
        if not _is_json(value):
            yield f"properties.{name}", "cannot be told in JSON (nan and inf are not in it)"
        if name == "$cookieless_mode" and not isinstance(value, bool):
            yield f"properties.{name}", "must be true or false: PostHog refuses a whole batch for another"
    for name in ("event", "time_zone"):
        if getattr(source, name) and source.format != "syslog":
            yield name, 'is of no use without format = "syslog"'
    if fields := set(_FIELD.findall(source.event + source.distinct_id)) - {"app", "severity", "hostname"}:
        yield "event", f"{{{min(fields)}}} is not one of {{app}}, {{severity}} and {{hostname}}"
    for name, burst in (("max_events_per_second", "burst"), ("uid_events_per_second", "uid_burst")):
        rate, most = getattr(source, name, 0), getattr(source, burst, 0)
        yield from _between(name, rate, 0, 1e9)
        yield from _between(burst, most, 0, 10**9)
        if most and not rate:
            yield burst, f"is of no use without {name}"
    yield from _of_socket(source)


def _of_socket(source: Source) -> Iterator[Wrong]:
    match source:
        case Udp() | Tcp():
            if wrong := wrong_address(source.listen):
                yield "listen", wrong
        case _:
            yield from _path(source.path, "path", PATH_BYTES)
            if not 0 <= source.mode <= 0o777:
                yield "mode", f"{source.mode:#o} is no file mode, such as 0o660"
            if any(not 0 <= uid < 2**32 for uid in source.allow_uids):
                yield "allow_uids", "holds what is no user id"
    if isinstance(source, UnixStream | Tcp):
        yield from _between("max_connections", source.max_connections, 1, 1_000_000)
    if isinstance(source, Tcp):
        yield from _between("idle_timeout", source.idle_timeout, 1, 30 * 86400, seconds=True)
        for name, text in (("tls_key", source.tls_key), ("tls_client_ca", source.tls_client_ca)):
            if text and not source.tls_cert:
                yield name, "is of no use without tls_cert"
    if isinstance(source, UnixDatagram | Udp):
        yield from _between("receive_buffer", source.receive_buffer, 4 * KIB, GIB, size=True)


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
        if isinstance(source, Udp | Tcp):
            yield (
                f"source[{source.name}].listen",
                f"{str(source.__struct_config__.tag).upper()} {source.listen}",
            )
        elif source.path:
            yield f"source[{source.name}].path", source.path
    if config.admin.socket:
        yield "admin.socket", config.admin.socket
    if config.buffer.path:
        yield "buffer.path", config.buffer.path


def warnings(config: Config) -> Iterator[Wrong]:
    """What is allowed, but a person should know."""
    for source in config.sources:
        if isinstance(source, Tcp) and not source.tls_cert and not _is_loopback(source.listen):
            why = f"{source.listen} is reached from other hosts, and what they send can be read on the way"
            yield f"source[{source.name}].listen", f"{why}: set tls_cert and tls_key, or use 127.0.0.1"


def _is_loopback(listen: str) -> bool:
    host = listen.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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


def wrong_address(listen: str) -> str:
    """Why this is no `HOST:PORT`; empty where it is."""
    host, _, port = listen.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()):
        return f'{listen!r} is not HOST:PORT, such as "127.0.0.1:8125" or "[::1]:8125"'
    if int(port) > 65535:
        return f"there is no port {port}: the last one is 65535"
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        return f"an IPv6 address stands in brackets: [{host}]:{port}"
    return ""


def _named(name: str) -> Iterator[Wrong]:
    if _NAME.fullmatch(name) is None:
        yield "name", "1 to 64 letters, digits, dots, dashes and underscores: it is a label of the metrics"


def _path(path: str, name: str, most: float) -> Iterator[Wrong]:
    if not path.startswith("/"):
        yield name, f"{path!r} must be an absolute path"
    elif "\0" in path:
        yield name, "must not hold a NUL"
    elif (size := len(path.encode("utf-8", "surrogateescape"))) > most:
        yield name, f"is {size} bytes long, and a Unix socket's path has at most {most:.0f}: {path}"


def _between(
    name: str, value: float, least: float, most: float, *, size: bool = False, seconds: bool = False
) -> Iterator[Wrong]:
    if least <= value <= most:
        return
    bound, word = (least, "least") if value < least else (most, "most")
    text = format_size(int(bound)) if size else format_duration(bound) if seconds else str(bound)
    yield name, f"must be at {word} {text}"


def _is_json(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return True
