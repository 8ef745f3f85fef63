"""The status page: one HTML document that needs nothing but itself, and the headers that hold it to that.

The browser is told to run this script and style alone, by their hashes, and to fetch from the agent alone.
The files are read when somebody looks for the first time.
"""

from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template
from typing import NamedTuple


class _Parts(NamedTuple):
    template: Template
    style: str
    script: str


@cache
def _parts() -> _Parts:
    folder = files("agent.page")
    read = [(folder / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")]
    return _Parts(Template(read[0]), read[1], read[2])


@cache
def edition() -> str:
    """Tells this page from another version's: a page that is still open then asks for the new one."""
    template, style, script = _parts()
    return sha256("\0".join((template.template, style, script)).encode()).hexdigest()[:16]


@cache
def headers() -> Mapping[str, str]:
    """For the page, and for what its script asks for."""
    parts = _parts()
    policy = (
        "default-src 'none'",
        f"script-src '{_hash(parts.script)}'",
        f"style-src '{_hash(parts.style)}'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def whole(figures: Mapping[str, str]) -> str:
    """The page with the present figures; all of them are HTML but the title."""
    template, style, script = _parts()
    values = {**figures, "title": escape(figures["title"])}
    return template.substitute(values, style=style, script=script, edition=edition())


def _hash(text: str) -> str:
    return "sha256-" + b64encode(sha256(text.encode()).digest()).decode()
