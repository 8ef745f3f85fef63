"""Tells a page for people (a captive portal's, a proxy's) from an answer of PostHog's.

It promises to look at no more than the headers and the beginning of a body.
"""

import re
from collections.abc import Mapping

# The beginnings by which browsers know HTML (WHATWG MIME Sniffing, 7.1), and `<meta`, with which portals'
# redirecting pages begin. PostHog answers in JSON or plain text that begins like none of them.
HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?[\t\n\x0c\r ]*<(?:!--|(?:!doctype html|html|head|script|iframe|h1|div|font|table|a"
    rb"|style|title|b|body|br|p|meta)(?:[\s/>]|$))",
    re.IGNORECASE,
)


def is_html(headers: Mapping[str, str], body_start: bytes) -> bool:
    """Whether it is a page for people, whatever it calls itself."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml") or HTML.match(body_start) is not None
