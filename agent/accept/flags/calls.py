"""Flag calls and their answers: what is passed on of each, which calls are the same, what an answer means.

It promises that a key holds nothing of the secrets that it was made of, and that only what PostHog itself
would answer alike has one key. The facts are those of `PostHog/posthog`, `rust/feature-flags/src`, and of
PostHog's SDKs.
"""

import hashlib
import zlib
from collections.abc import Collection, Iterable
from enum import Enum
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from agent.accept.flags.replies import CORS, Headers, Reply
from agent.accept.whence import plain
from agent.envelope import DECODE_ERRORS
from agent.portal import is_html

EVALUATIONS = frozenset({"/flags", "/decide"})
DEFINITIONS = frozenset({"/flags/definitions", "/api/feature_flag/local_evaluation"})
# Each with and without a slash at its end.
PATHS = EVALUATIONS | DEFINITIONS
METHODS = ("GET", "POST", "OPTIONS")

# Of a request everything that PostHog's answer depends on, and nothing that belongs to the connection, nor a
# cookie: SDKs have none, and a browser's would be for another host. `User-Agent` says whether flags for
# servers or for browsers are wanted.
PASSED_ON = frozenset(
    {b"authorization", b"content-type", b"content-encoding", b"accept", b"user-agent", b"origin"}
)
# Of an answer what a client can use; how it was framed and who may keep a cookie is between PostHog and us.
PASSED_BACK = frozenset(
    {b"content-type", b"content-encoding", b"etag", b"cache-control", b"vary", b"location", b"allow"}
    | {b"retry-after", b"www-authenticate", b"x-request-id"}
)
PASSED_BACK_FAMILIES = (b"x-posthog-", b"x-ratelimit-", b"ratelimit-")
ORIGIN = b"origin"

# Times of sending, which make every call look new: in the query of posthog-js (`request.ts`), with the count
# of its attempts, and in the body of posthog-python (`posthog/request.py`; older ones write it otherwise).
MOMENTS_IN_QUERY = frozenset({b"_", b"retry_count"})
MOMENTS_IN_BODY = ("sent_at", "sentAt")

# Bodies of flag calls are some kilobytes; what is longer once opened is compared as it came.
OPENED_BYTES = 1024 * 1024
# How gzip begins (RFC 1952); 31 has zlib read that.
GZIP, GZIP_ONLY = b"\x1f\x8b", 31


class Call(NamedTuple):
    """One call: all that is passed on, apart from what says who asks and what it has already."""

    method: str
    path: str
    query: bytes
    headers: Headers
    if_none_match: bytes
    client: str
    body: bytes

    @property
    def cors(self) -> bool:
        """Whether it comes from a web page that may ask."""
        return any(name == ORIGIN for name, _ in self.headers)


def read_call(
    method: str,
    path: str,
    query: bytes,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    *,
    client: str = "",
    origins: Collection[str] = (),
) -> Call:
    """What is passed on of a request; header names in small letters, `client` is an address or empty.

    A page's `Origin` only where it is among `origins`, or "*" is: without, no browser shows it the answer.
    """
    headers = list(headers)
    allowed = any(
        name == ORIGIN and (value.decode("latin-1") in origins or "*" in origins) for name, value in headers
    )
    passed = [
        (name, value)
        for name, value in headers
        if (name in PASSED_ON and (allowed or name != ORIGIN)) or (allowed and name.startswith(CORS))
    ]
    packed = any(name == b"accept-encoding" and _takes_gzip(value) for name, value in headers)
    passed.append((b"accept-encoding", b"gzip" if packed else b"identity"))
    tags = b", ".join(value for name, value in headers if name == b"if-none-match" and method == "GET")
    return Call(method, path, query, tuple(passed), tags, _public(client), body)


def _takes_gzip(accepted: bytes) -> bool:
    """Whether a client reads gzip (RFC 9110, 12.5.3); PostHog's SDKs do, and nothing else is asked for."""
    for choice in accepted.lower().split(b","):
        name, _, weight = choice.replace(b" ", b"").partition(b";q=")
        if name in (b"gzip", b"*"):
            return weight.strip(b"0.") != b"" or not weight
    return False


def _public(client: str) -> str:
    """An address by which PostHog may know the client; empty for one that many networks have.

    PostHog takes the first of `X-Forwarded-For` for the limit of calls per address and for the place on the
    map. Of a client in this network it had better take ours, which it sees itself, than one that means
    somebody else's network.
    """
    try:
        address = plain(client)
    except ValueError:
        return ""
    return str(address) if address.is_global else ""


def key_of(call: Call) -> bytes:
    """What calls have in common that PostHog would answer alike; a hash, as there are secrets among it."""
    digest = hashlib.blake2b(digest_size=32)
    parts = [call.method.encode(), call.path.removesuffix("/").encode(), _steady_query(call.query)]
    for header in sorted(call.headers):
        parts += header
    for part in (*parts, _steady_body(call.body)):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _steady_query(query: bytes) -> bytes:
    fields = query.split(b"&")
    return b"&".join(field for field in fields if field.partition(b"=")[0] not in MOMENTS_IN_QUERY)


def _steady_body(body: bytes) -> bytes:
    """The body without its time of sending, in one form however it was packed; as it came, if unreadable."""
    try:
        fields = msgspec.json.decode(_opened(body), type=dict[str, msgspec.Raw])
    except DECODE_ERRORS:
        return body
    for name in MOMENTS_IN_BODY:
        fields.pop(name, None)
    return msgspec.json.encode(fields, order="sorted")


def _opened(body: bytes) -> bytes:
    """What was packed by gzip, whatever the headers say (the SDKs of browsers name it in the query).

    Empty where it is broken or too long, plain or not.
    """
    if not body.startswith(GZIP):
        return body if len(body) <= OPENED_BYTES else b""
    inflate = zlib.decompressobj(GZIP_ONLY)
    try:
        text = inflate.decompress(body, OPENED_BYTES)
    except zlib.error:
        return b""
    return text if inflate.eof else b""


class Meaning(Enum):
    """What an answer means for who asked."""

    GOOD = "flags, to be remembered"
    SAME = "nothing new since the reply that the client has"
    FINAL = "PostHog's word on this call"
    BUSY = "PostHog cannot answer this call now"
    AWAY = "it was not PostHog who answered"


class Evaluation(msgspec.Struct):
    """What tells an evaluation that has all flags from one that has not."""

    errors: bool = msgspec.field(name="errorsWhileComputingFlags", default=False)
    over_quota: list[str] | None = msgspec.field(name="quotaLimited", default=None)


def read_answer(call: Call, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Meaning:
    """What an answer means, header names in small letters; of a long one the beginning of its body is enough.

    A client can bring about a redirect within the host, a 4xx or a 500 by what it asks; they say nothing of
    the others' calls. Everything else that PostHog would not say comes from something before it: a gateway
    that does not reach it, a proxy, a captive portal.
    """
    told = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    html = is_html(told, body)
    match status:
        case 304:
            return Meaning.SAME
        case 200 | 204 if call.method == "OPTIONS" and not html:
            return Meaning.GOOD
        case 408 | 429 | 500 | 501:
            return Meaning.BUSY
        case 401 | 403 if html:  # a firewall: PostHog's own are JSON, and have SDKs forget their flags
            return Meaning.BUSY
    if status == 407 or status > 501 or (status < 300 and html):
        return Meaning.AWAY
    if 300 <= status < 400:
        return Meaning.FINAL if _within(told.get("location", "")) else Meaning.AWAY
    return Meaning.GOOD if status == 200 and _is_whole(call, told, body) else Meaning.FINAL


def _within(location: str) -> bool:
    """Whether it leads to a path of the host that the client knows, that is to us."""
    try:
        parts = urlsplit(location)
    except ValueError:
        return False
    return not parts.scheme and not parts.netloc and location.startswith("/")


def _is_whole(call: Call, told: dict[str, str], body: bytes) -> bool:
    """Whether it is worth more than the one before: flags, all of them, and not a quota's empty hands."""
    if told.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return False
    if call.path.removesuffix("/") in DEFINITIONS:
        return True
    try:
        evaluation = msgspec.json.decode(_opened(body), type=Evaluation)
    except DECODE_ERRORS:
        return False
    return not evaluation.errors and not evaluation.over_quota


def passed_back(call: Call, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Reply:
    """The answer as the client is to see it."""
    kept = (
        (name, value)
        for name, value in headers
        if name in PASSED_BACK
        or name.startswith(PASSED_BACK_FAMILIES)
        or (call.cors and name.startswith(CORS))
    )
    return Reply(status, tuple(kept), body)
