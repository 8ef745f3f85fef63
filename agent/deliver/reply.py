"""What a reply means: who speaks, what PostHog says, and when to come back.

It promises that a reply is taken for an acceptance only where it can be nothing else, that every reply has
exactly one verdict, and that no verdict's text holds a secret. The facts are those of `PostHog/posthog`,
`rust/capture/src`.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from agent.deliver.clocks import EPOCH
from agent.deliver.verdict import Accepted, Refused, Rejected, Retry, Split, Verdict
from agent.portal import is_html
from agent.veil import without, without_keys

# What a person reads in one look, and what is kept with every dead event.
REASON_BYTES = 500
# Enough for these when a secret or two were taken out; the last of it may be part of one, escaped.
LOOKED_AT = 4 * REASON_BYTES
LONGEST_SECRET = REASON_BYTES
# One hour: the longest window in PostHog's own rate limits (`posthog/rate_limit.py` counts by the minute and
# by the hour). What asks for more is a mistake, and obeying it would look like an agent that died.
LONGEST_AFTER = 3600.0

SECONDS = re.compile(r"[+-]?\d+(?:\.\d*)?")


def read_reply(
    status: int, headers: Mapping[str, str], body_start: bytes, now: int, *, secrets: Sequence[str] = ()
) -> Verdict:
    """What a reply means; header names in lower case, `now` by the wall clock in microseconds.

    `secrets` are what was sent and is not to be repeated: the key, and what configured headers say.

    HTML with a 2xx or a 400 did not come from PostHog but from a captive portal or a proxy on the way.
    With 413, 408, 429 and 5xx it is what load balancers say in PostHog's stead, and means the same.
    """
    html = is_html(headers, body_start)
    if 200 <= status <= 299 and not html:
        return Accepted()
    text = "" if html else words(body_start, secrets)
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
        case 511:  # Network Authentication Required (RFC 6585): what a captive portal says that owns up to it
            return Refused("host", f"HTTP {status}: a network that wants a person to log in, not PostHog")
    if status in (408, 429) or 500 <= status <= 599:
        return Retry(retry_after(headers, now), reason, cut=status == 408)
    if html:
        return Refused("host", f"HTTP {status} with a page of HTML: a portal or proxy, not PostHog")
    if 300 <= status <= 399:
        return Refused("host", f"HTTP {status}: redirected to {_origin(headers.get('location', ''))}")
    return Refused("host", reason)


def words(body_start: bytes, secrets: Sequence[str] = ()) -> str:
    """PostHog's plain text on one printable line, without any key."""
    beginning = b" ".join(body_start.split())
    told = without(beginning[:LOOKED_AT], secrets).decode("utf-8", "replace")
    if len(beginning) > LOOKED_AT:  # a secret may have been cut off
        told = told[:-LONGEST_SECRET]
    words = " ".join(told.split())
    text = without_keys("".join(char if char.isprintable() else "\ufffd" for char in words))
    return text.encode()[:REASON_BYTES].decode("utf-8", "ignore")


def _origin(location: str) -> str:
    """Where a redirect leads, without the query or user that could hold a secret."""
    with suppress(ValueError):
        parts = urlsplit(location)
        if parts.hostname:
            return f"{parts.scheme or 'http'}://{parts.hostname}"
    return "another path of the same host" if location else "nowhere"


def retry_after(headers: Mapping[str, str], now: int) -> float | None:
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


def server_clock(headers: Mapping[str, str]) -> int | None:
    """What the server's clock showed (µs), within half a second; None where it does not tell."""
    date = _date(headers.get("date", ""))
    return None if date is None else (date - EPOCH) // timedelta(microseconds=1) + 500_000


def _date(value: str) -> datetime | None:
    """An HTTP date in any of its three forms (RFC 9110, 5.6.7), all of which are UTC."""
    try:
        return parsedate_to_datetime(value).replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
