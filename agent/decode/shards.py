"""Finds the events of a body that is not JSON as a whole, so that one broken event does not take the others.

Python's own encoder writes `NaN` and half surrogate pairs; PostHog refuses the whole batch for one. Brackets
outside of texts tell where each event begins and ends; whether it is one, the door says.
"""

import re
from typing import NamedTuple

# A text is possessive and may end with the body, so that no quote is looked at twice.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_BETWEEN = b" \t\r\n,"
_OPENING = b"[{"
# Texts and brackets are looked at one by one, a million a second: no client may keep the others waiting for
# longer. A batch of 100 events has some 3,000.
MOST_TOKENS = 200_000


class Shards(NamedTuple):
    """A body taken apart: its root with an empty list for the events, and each event's own bytes."""

    root: bytes
    events: list[bytes]


def shatter(text: bytes) -> Shards | None:
    """The events of an array, or of an object's `batch`; None where the brackets make no sense."""
    if text.count(b'"') // 2 + sum(map(text.count, (b"{", b"}", b"[", b"]"))) > MOST_TOKENS:
        return None
    base = 1 if text.lstrip()[:1] == b"[" else 2
    depth = opened = end = 0  # where the list was opened, where the last event ended
    name = b""
    events: list[bytes] = []
    for token in _TOKEN.finditer(text):
        kind = token[0][:1]
        if kind == b'"':
            if depth == 1 and not opened:
                name = token[0]
            continue
        opening = kind in _OPENING
        depth += 1 if opening else -1
        if not opened:
            if depth == base and kind == b"[" and (base == 1 or name == b'"batch"'):
                opened = end = token.end()
        elif opening and depth == base + 1:
            events.append(text[end : token.start()])  # what is no object: nothing, mostly
            end = token.start()
        elif not opening and depth == base:
            events.append(text[end : token.end()])
            end = token.end()
        elif depth < base:
            events.append(text[end : token.start()])
            return Shards(text[:opened] + text[token.start() :], _trimmed(events))
    return None


def _trimmed(events: list[bytes]) -> list[bytes]:
    """Those that are not empty, each on a line of its own.

    A carriage return is white space as well, and no more allowed inside a text than a newline.
    """
    bare = (event.strip(_BETWEEN) for event in events)
    return [event.replace(b"\n", b"\r") for event in bare if event]
