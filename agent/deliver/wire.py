"""How a batch is written for PostHog's `/batch`, and what its reply means.

It promises that a reply is taken for an acceptance only where it can be nothing else, that every reply has
exactly one verdict, and that no verdict's text holds a key. When to send, and what becomes of the events,
is left to `pace` and `shipment`. The facts are those of `PostHog/posthog`, `rust/capture/src`.
"""

import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from agent import __version__, pack
from agent.events import Chunk, Instant

Compression = Literal["gzip", "none"]
Refusal = Literal["key", "billing", "host"]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What one POST carries: events of one project and key, whose clocks agree."""

    project: str
    key: str | None
    pieces: tuple[Chunk, ...]
    events: int
    size: int


class Accepted(msgspec.Struct, frozen=True):
    """PostHog has taken the batch."""


class Split(msgspec.Struct, frozen=True):
    """The batch is too large."""

    reason: str


class Rejected(msgspec.Struct, frozen=True):
    """PostHog will never take this batch as it is; `reason` is its own text."""

    reason: str


class Retry(msgspec.Struct, frozen=True):
    """The same batch may be taken later, but not before `after` seconds have passed."""

    after: float | None
    reason: str


class Refused(msgspec.Struct, frozen=True):
    """It is not about this batch: somebody must mend the key, the bill or the host."""

    hold: Refusal
    why: str


Verdict = Accepted | Split | Rejected | Retry | Refused


class Damaged(msgspec.Struct, frozen=True):
    """Not a reply: a chunk that cannot be opened, so that its batch cannot be built."""

    chunk: Chunk
    why: str


# ---- the request

# A chunk of few events packs badly, since it may not refer to its neighbours. Joined as they are, batches of
# 50 to 1000 events of 300 bytes come to 4.8 times gzip's bytes in chunks of 1 event, to 2.1 in chunks of 5,
# to 1.25 in chunks of 32, and to at most 1.17 in chunks of 64; the agent is to stay under 1.2.
FEW_EVENTS = 64
# Up to here zlib's level 6 repacks a batch (4 µs an event, 8 % smaller); beyond, there are so many small
# chunks that the host is busy after all, and isal's level 1 (0.4 µs) is what it can afford.
TIGHT_SIZE = 128 * 1024
TIGHT_LEVEL = 6


def body(
    batch: Batch, api_key: str, sent_at: str, *, historical_migration: bool, compression: Compression
) -> bytes | Damaged:
    """The batch as `/batch` takes it; packed, it is one gzip member.

    Chunks are laid end to end unopened, unless they hold few events each. `Damaged` can therefore only
    come of small chunks or of `compression = "none"`; another broken chunk shows when PostHog refuses it
    and the shipment opens it.
    """
    encode = msgspec.json.encode
    historical = b',"historical_migration":true' if historical_migration else b""
    head = b'{"api_key":%b,"sent_at":%b%b,"batch":[' % (encode(api_key), encode(sent_at), historical)
    tail = b"]}"
    if compression == "gzip" and batch.events >= FEW_EVENTS * len(batch.pieces):
        return pack.member(head, batch.pieces, tail)
    opened = []
    for piece in batch.pieces:
        try:
            opened.append(pack.inflate(piece.packed, piece.size, piece.crc))
        except ValueError as error:
            return Damaged(piece, str(error))
    data = b",".join(opened)
    if compression == "none":
        return head + data + tail
    if len(data) <= TIGHT_SIZE:
        return zlib.compress(head + data + tail, TIGHT_LEVEL, wbits=31)  # 31: a gzip member
    return pack.member(head, [Repacked(pack.deflate(data), len(data), pack.crc32(data))], tail)


class Repacked(NamedTuple):
    """Several chunks' events packed together, for one request."""

    packed: bytes
    size: int
    crc: int


# What configured headers may not set: where the body ends, how it is coded and whose it is (RFC 9112, 6) ...
FRAMING = frozenset({"content-encoding", "content-length", "content-type", "host", "transfer-encoding"})
# ... and what belongs to the connection rather than to the request (RFC 9110, 7.6.1 and 10.1).
CONNECTION = frozenset({"connection", "expect", "keep-alive", "te", "trailer", "upgrade"})


def headers(configured: Mapping[str, str], compression: Compression) -> dict[str, str]:
    """The request's headers: the configured ones, and ours where they would change how the body is read."""
    # An answer is a line, and read without being opened.
    ours = {"User-Agent": f"capture-agent/{__version__}", "Accept-Encoding": "identity"}
    named = {name.lower() for name in configured}
    chosen = {name: value for name, value in ours.items() if name.lower() not in named}
    chosen |= {name: value for name, value in configured.items() if name.lower() not in FRAMING | CONNECTION}
    chosen["Content-Type"] = "application/json"
    if compression == "gzip":
        chosen["Content-Encoding"] = "gzip"
    return chosen


# ---- clocks

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# PostHog moves a batch's events by one offset; two chunks further apart than this need two batches. Within
# it are the readings of one clock that was never stepped, which differ by microseconds.
AGREEMENT = 1_000_000


def told(chunk: Chunk, now: Instant) -> int:
    """The present moment in the clock in which the chunk was stamped, in microseconds.

    In the same boot that clock is continued by the monotonic one, so that a step of the wall clock since
    then does not move the events. Of another boot, or one without a name, nothing is known: the wall clock
    stands for it.
    """
    if chunk.boot and chunk.boot == now.boot and now.monotonic >= chunk.monotonic:
        return chunk.received_at + now.monotonic - chunk.monotonic
    return now.wall


def sent_at(chunk: Chunk, now: Instant) -> str:
    """`told` as PostHog reads it (RFC 3339): it takes the event's time less `sent_at` less its own clock."""
    moment = EPOCH + timedelta(microseconds=told(chunk, now))
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def agree(one: Chunk, other: Chunk) -> bool:
    """Whether one `sent_at` is true for both: the same boot, and no step of the clock between them."""
    step = (one.received_at - one.monotonic) - (other.received_at - other.monotonic)
    return one.boot == other.boot and abs(step) <= AGREEMENT


# ---- the reply

# What a person reads in one look, and what is kept with every dead event.
REASON_BYTES = 500
# One hour: the longest window in PostHog's own rate limits (`posthog/rate_limit.py` counts by the minute and
# by the hour). What asks for more is a mistake, and obeying it would look like an agent that died.
LONGEST_AFTER = 3600.0

# The beginnings by which browsers know HTML (WHATWG MIME Sniffing, 7.1), and `<meta`, with which portals'
# redirecting pages begin. PostHog answers in JSON or plain text that begins like none of them.
HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?[\t\n\x0c\r ]*<(?:!--|(?:!doctype html|html|head|script|iframe|h1|div|font|table|a"
    rb"|style|title|b|body|br|p|meta)(?:[\s/>]|$))",
    re.IGNORECASE,
)
SECONDS = re.compile(r"[+-]?\d+(?:\.\d*)?")
# PostHog's keys, wherever a reply repeats one (docs: project, personal, secret and OAuth keys).
KEYS = re.compile(r"\bph[acsx]_[\w-]+")


def read_reply(status: int, headers: Mapping[str, str], body_start: bytes, now: int) -> Verdict:
    """What a reply means; header names in lower case, `now` by the wall clock in microseconds.

    HTML with a 2xx or a 400 did not come from PostHog but from a captive portal or a proxy on the way.
    With 413, 408, 429 and 5xx it is what load balancers say in PostHog's stead, and means the same.
    """
    html = _is_html(headers, body_start)
    text = "" if html else _text(body_start)
    reason = f"HTTP {status}: {text}" if text else f"HTTP {status}"
    match status:
        case 413:
            return Split(text or reason)
        case 400 if not html:
            return Rejected(text or reason)
        case 401 | 403:
            return Refused("key", reason)
        case 402:
            return Refused("billing", reason)
    if status in (408, 429) or 500 <= status <= 599:
        return Retry(_retry_after(headers, now), reason)
    if 200 <= status <= 299 and not html:
        return Accepted()
    if html:
        return Refused("host", f"HTTP {status} with a page of HTML: a portal or proxy, not PostHog")
    if 300 <= status <= 399:
        return Refused("host", f"HTTP {status}: redirected to {_origin(headers.get('location', ''))}")
    return Refused("host", reason)


def _is_html(headers: Mapping[str, str], body_start: bytes) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml") or HTML.match(body_start) is not None


def _text(body_start: bytes) -> str:
    """PostHog's plain text on one printable line, without any key."""
    words = " ".join(body_start[: 4 * REASON_BYTES].decode("utf-8", "replace").split())
    text = KEYS.sub("***", "".join(char if char.isprintable() else "\ufffd" for char in words))
    return text.encode()[:REASON_BYTES].decode("utf-8", "ignore")


def _origin(location: str) -> str:
    """Where a redirect leads, without the query or user that could hold a secret."""
    with suppress(ValueError):
        parts = urlsplit(location)
        if parts.hostname:
            return f"{parts.scheme or 'http'}://{parts.hostname}"
    return "another path of the same host" if location else "nowhere"


def _retry_after(headers: Mapping[str, str], now: int) -> float | None:
    """Seconds to wait by `Retry-After` (RFC 9110, 10.2.3), between 0 and the cap; None where it says none.

    A date is measured by the server's own clock where it tells that, so that ours may be wrong.
    """
    value = headers.get("retry-after", "").strip()
    if SECONDS.fullmatch(value):
        return min(max(float(value), 0.0), LONGEST_AFTER)
    until = _date(value)
    if until is None:
        return None
    here = _date(headers.get("date", "")) or EPOCH + timedelta(microseconds=now)
    return min(max((until - here).total_seconds(), 0.0), LONGEST_AFTER)


def _date(value: str) -> datetime | None:
    """An HTTP date in any of its three forms (RFC 9110, 5.6.7), all of which are UTC."""
    try:
        return parsedate_to_datetime(value).replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
