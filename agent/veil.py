"""Takes secrets out of texts that others wrote: what PostHog or a proxy answers, what a person mistyped."""

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import suppress
from urllib.parse import quote, unquote, urlsplit

import msgspec

from agent.config import Delivery

HIDDEN = "***"
# PostHog's keys, wherever a text repeats one (docs: project, personal, secret and OAuth keys).
KEYS = re.compile(r"\bph[acsx]_[\w-]+")
# A shorter one is no secret, and may be any word.
LEAST = 8


def without_keys(text: str) -> str:
    """The text without what looks like a key of PostHog's."""
    return KEYS.sub(HIDDEN, text)


def without(text: bytes, secrets: Iterable[str]) -> bytes:
    """The text without these secrets, in whichever of the usual ways it writes them."""
    for secret in secrets:
        if len(secret) >= LEAST:
            for form in _forms(secret):
                text = text.replace(form, HIDDEN.encode())
    return text


def _forms(secret: str) -> Iterator[bytes]:
    """As it is, as JSON or a URL write it, and as basic authentication does."""
    plain = secret.encode()
    yield from {plain, msgspec.json.encode(secret)[1:-1], quote(secret, safe="").encode()}
    yield b64encode(plain).rstrip(b"=")


def sent_by(delivery: Delivery, proxies: Iterable[str] = ()) -> tuple[str, ...]:
    """What goes out beside the key: configured headers, and passwords of proxies (also the environment's)."""
    found: list[str] = []
    for header in delivery.headers.values():
        found += (header.reveal(), *header.reveal().split())  # also what stands behind "Bearer"
    for url in (delivery.proxy.reveal(), *proxies):
        with suppress(ValueError):
            parts = urlsplit(url)
            if parts.password:
                password = unquote(parts.password)
                found += (f"{unquote(parts.username or '')}:{password}", password)
    return tuple(found)
