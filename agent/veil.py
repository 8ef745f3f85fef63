"""Takes secrets out of texts that others wrote: what PostHog or a proxy answers, what a person mistyped."""

import re
from base64 import b64encode
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from html.entities import codepoint2name
from urllib.parse import unquote, urlsplit

from agent.config import Delivery

HIDDEN = "***"
# PostHog's keys, wherever a text repeats one (docs: project, personal, secret and OAuth keys).
KEYS = re.compile(r"\bph[acsx]_[\w-]+")
# By which JSON, URLs and HTML begin to write a character in another way.
ESCAPES = re.compile(rb"[\\%&]")
# A shorter one is no secret, and may be any word.
LEAST = 8


def without_keys(text: str) -> str:
    """The text without what looks like a key of PostHog's."""
    return KEYS.sub(HIDDEN, text)


def without(text: bytes, secrets: Iterable[str]) -> bytes:
    """The text without these secrets, in whichever of the usual ways it writes them.

    It takes half a millisecond for a secret and 2,000 bytes where something is escaped, else nearly nothing.
    """
    plainly = text.lower() if ESCAPES.search(text) is None else None
    for secret in secrets:
        if len(secret) < LEAST:
            continue
        forms = (secret.encode(), _packed(secret))
        if plainly is None or any(form.lower() in plainly for form in forms):
            text = _written(secret).sub(HIDDEN.encode(), text)
    return text


def _packed(secret: str) -> bytes:
    """A secret as basic authentication has it."""
    return b64encode(secret.encode()).rstrip(b"=")


@lru_cache(256)  # those of the configuration, and of the clients whose keys are refused
def _written(secret: str) -> re.Pattern[bytes]:
    """A secret with its bytes as they are or as JSON, a URL or HTML writes them; or as a password."""
    plain = b"".join(map(_ways, secret.encode()))
    return re.compile(b"%b|%b" % (plain, re.escape(_packed(secret))), re.IGNORECASE)


def _ways(byte: int) -> bytes:
    """One byte, in any way; as it is last, since the others may begin with it."""
    named = codepoint2name.get(byte, f"#{byte}").encode()
    coded = rb"%%%02x|\\u00%02x|&#0{,5}%d;|&#x0{,5}%x;|&%b;" % (byte, byte, byte, byte, named)
    return rb"(?:%b|\\?%b)" % (coded, re.escape(bytes([byte])))


def sent_by(delivery: Delivery, proxies: Iterable[str] = ()) -> tuple[str, ...]:
    """What goes out beside the key: configured headers, and passwords of proxies (also the environment's)."""
    found: list[str] = []
    for header in delivery.headers.values():
        words = header.reveal().split()
        found += (" ".join(words), *words)  # also what stands behind "Bearer"
    for url in (delivery.proxy.reveal(), *proxies):
        with suppress(ValueError):
            parts = urlsplit(url)
            if parts.password:
                password = unquote(parts.password)
                found += (f"{unquote(parts.username or '')}:{password}", password)
    return tuple(found)
