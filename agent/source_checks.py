"""Which values the settings of a source may have, beyond their types."""

import math
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address, ip_network

from agent import shape_checks
from agent.bounds import PATH_BYTES, Wrong, between, named, path, wrong_address
from agent.config import GIB, KIB, MIB, Common, Http, Source, Tcp, Udp, UnixDatagram, UnixStream

# PostHog's limit on one event with its envelope is 1,000,000 bytes (`rust/capture/src/config.rs`).
LARGEST_EVENT = 976 * KIB
# One body is unpacked at a time, and held a few times over.
LARGEST_BODY = 100 * MIB
# As browsers write it (RFC 6454, 6.2): no path, in small letters.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\sA-Z]+")
# What is replaced in the names and ids of events; all but the first in syslog only.
FIELDS = ("hostname", "app", "severity")
_FIELD = re.compile(r"\{(\w+)\}")
# What a .socket unit says of a socket that systemd opens, so that the source does not.
SOCKET_UNIT = {
    "path": "ListenStream= or ListenDatagram=",
    "listen": "ListenStream= or ListenDatagram=",
    "mode": "SocketMode=",
    "group": "SocketGroup=",
}
# The name of the admin socket, where systemd opens that too.
ADMIN_SOCKET = "admin"

# What FileDescriptorName= takes (systemd's `fdname_is_valid`): printable ASCII without the colon.
_SOCKET_NAME = re.compile(r"[ -9;-~]{1,255}")


def of_source(source: Source) -> Iterator[Wrong]:
    """What is wrong with one source."""
    yield from named(source.name)
    yield from between("max_event", source.max_event, KIB, LARGEST_EVENT, size=True)
    if source.distinct_id and not source.distinct_id.strip():
        yield "distinct_id", "is blank, which PostHog refuses"
    for name, value in source.properties.items():
        if not _is_json(value):
            yield f"properties.{name}", "cannot be told in JSON (nan and inf are not in it)"
        if name == "$cookieless_mode" and not isinstance(value, bool):
            yield f"properties.{name}", "must be true or false: PostHog refuses a whole batch for another"
    yield from _of_syslog(source)
    yield from _of_rates(source)
    yield from shape_checks.of(source)
    yield from _of_socket(source)
    if isinstance(source, Http):
        yield from _of_http(source)


def _of_syslog(source: Source) -> Iterator[Wrong]:
    for name in ("event", "time_zone"):
        if getattr(source, name) and source.format != "syslog":
            yield name, 'is of no use without format = "syslog"'
    for name, text in (("event", source.event), ("distinct_id", source.distinct_id)):
        known = FIELDS if source.format == "syslog" else FIELDS[:1]
        if unknown := [field for field in _FIELD.findall(text) if field not in known]:
            yield name, f"{{{unknown[0]}}} is not one of {', '.join(f'{{{field}}}' for field in known)}"


def _of_rates(source: Source) -> Iterator[Wrong]:
    """What is wrong with how many events may come, and from whom."""
    for name, burst in (("max_events_per_second", "burst"), ("uid_events_per_second", "uid_burst")):
        rate, most = getattr(source, name, 0), getattr(source, burst, 0)
        yield from between(name, rate, 0, 1e9)
        yield from between(burst, most, 0, 10**9)
        if most and not rate:
            yield burst, f"is of no use without {name}"
    for uid in getattr(source, "allow_uids", ()):
        if not 0 <= uid < 2**32:
            yield "allow_uids", f"{uid} is no user id"


def of_passed(given: Mapping[str, object]) -> Iterator[Wrong]:
    """What may not be said of a source whose socket systemd opens."""
    for name, unit in SOCKET_UNIT.items():
        if given.get("socket") and given.get(name) not in (None, ""):
            yield name, f"does not go with `socket`: systemd opens it, as {unit} in the .socket unit says"


def _of_socket(source: Source) -> Iterator[Wrong]:
    match source:
        case Common(socket=str(name)) if name:
            if _SOCKET_NAME.fullmatch(name) is None:
                yield "socket", f"{name!r} is no name that FileDescriptorName= takes: ASCII without a colon"
            elif name == ADMIN_SOCKET:
                yield "socket", f'"{name}" is the name of the admin socket: give this one another'
        case Udp() | Tcp() | Http():
            if wrong := wrong_address(source.listen):
                yield "listen", wrong
        case _:
            yield from path(source.path, "path", PATH_BYTES)
            if not 0 <= source.mode <= 0o777:
                yield "mode", f"{source.mode:#o} is no file mode, such as 0o660"
    if isinstance(source, UnixStream | Tcp | Http):
        yield from between("max_connections", source.max_connections, 1, 1_000_000)
    if isinstance(source, Tcp):
        yield from between("idle_timeout", source.idle_timeout, 1, 30 * 86400, seconds=True)
        for name, text in (("tls_key", source.tls_key), ("tls_client_ca", source.tls_client_ca)):
            if text and not source.tls_cert:
                yield name, "is of no use without tls_cert"
    if isinstance(source, UnixDatagram | Udp):
        yield from between("receive_buffer", source.receive_buffer, 4 * KIB, GIB, size=True)


def _of_http(source: Http) -> Iterator[Wrong]:
    yield from between("max_body", source.max_body, KIB, LARGEST_BODY, size=True)
    yield from between("flags_timeout", source.flags_timeout, 0.05, 60, seconds=True)
    yield from between("flags_max_age", source.flags_max_age, 0, 365 * 86400, seconds=True)
    yield from between("flags_cache", source.flags_cache, 0, GIB, size=True)
    if source.format != "json":
        yield "format", "is not for http, which takes what PostHog's SDKs send"
    for network in source.trusted_proxies:
        try:
            ip_network(network)
        except ValueError as error:
            yield "trusted_proxies", f'{error}: write a network, such as "10.0.0.0/8", or an address'
    for origin in source.cors:
        if origin != "*" and _ORIGIN.fullmatch(origin) is None:
            yield "cors", f'{origin!r} is not an origin, such as "https://app.example.com", nor "*"'


def is_loopback(listen: str) -> bool:
    """Whether only this host reaches an address."""
    host = listen.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_json(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return True
