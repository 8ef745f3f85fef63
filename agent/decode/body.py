"""What the bodies of PostHog's protocols have in common: keys, clocks, and how events become lines."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec
from msgspec import Raw

from agent.decode.shards import MOST_EVENTS

KEY_BYTES = 64  # `token.rs`
# The latency of a local request is no difference of clocks; and so a resend keeps its instant.
SAME_CLOCK = 1_000_000  # µs
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# What Rust's `trim` takes off a key (Unicode White_Space); Python's `strip` takes more.
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)

_ADDRESS = re.compile(rb'"\$ip"')
_BLANK_ADDRESS = re.compile(rb'"\$ip"\s*:\s*(?:null|"")')


class Placed(msgspec.Struct, gc=False):
    """Properties that say whether the place of their event may be looked up."""

    geoip_disable: bool = msgspec.field(name="$geoip_disable")


def trimmed(key: str) -> str:
    """A key as PostHog looks at it."""
    return key.strip(_WHITESPACE)


def wrong_key(key: str) -> bytes:
    """Why this is no project's key, in PostHog's words; empty where it may be one: `token.rs`."""
    checks = (
        (not key, b"empty"),
        (len(key.encode("utf-8", "surrogatepass")) > KEY_BYTES, b"too_long"),
        (not key.isascii(), b"not_ascii"),
        (key.startswith("phx_"), b"personal_api_key"),
        ("\0" in key, b"null_byte"),
    )
    return next((why for wrong, why in checks if wrong), b"")


def ahead_of(told: str, now: int) -> int | None:
    """By how much an instant that a client's clock told is ahead of `now` (µs), 0 where it is about the same.

    None for what is no instant.
    """
    try:
        sent = datetime.fromisoformat(told)
        if sent.tzinfo is None:
            return None
        ahead = (sent - _EPOCH) // _MICROSECOND - now
    except (ValueError, OverflowError):
        return None
    return ahead if abs(ahead) > SAME_CLOCK else 0


def crowded(text: bytes) -> bool:
    """Whether it may hold more events than are parted before they are counted."""
    return len(text) > MOST_EVENTS and text.count(b",") >= MOST_EVENTS


def has_address(text: bytes, *, near: bool) -> bool:
    """Whether an event may say where it was, or that it was nowhere, so that it has to be looked at.

    An address matters in a text that came from this host; one that is blank matters everywhere.
    """
    return (_ADDRESS if near else _BLANK_ADDRESS).search(text) is not None


def joined(text: bytes, events: Sequence[Raw | bytes]) -> bytes:
    """The events of a text, each on a line of its own.

    A newline in one is white space: JSON has none in its texts.
    """
    if b"\n" in text:
        events = [bytes(event).replace(b"\n", b" ") for event in events]
    return b"\n".join((*events, b""))
