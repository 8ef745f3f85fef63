"""Finds the events of a body that is not JSON as a whole, so that one broken event does not take the others.

Python's own encoder writes `NaN` and half surrogate pairs; PostHog refuses the whole batch for one. Brackets
outside of texts tell where each event begins and ends, also where one of them is missing or too many; whether
it is an event, the door says. Memory is bounded by the body, whatever it holds.
"""

import re
from typing import Literal, NamedTuple

# An event costs some 200 bytes and, where it must be written anew, 20 µs: 250,000 of them are 50 MiB and 5 s.
# In 20 MiB so many have 80 bytes each, less than an event with a uuid and a time.
MOST_EVENTS = 250_000
# Brackets are looked at one by one, a million in 0.4 s: that many are one at every tenth byte of 20 MiB.
MOST_BRACKETS = 2_000_000

# All up to a bracket or the end. A text is possessive and may end with the body: no quote is looked at twice.
_NEXT = re.compile(
    rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+(?:"|\\?\Z))*+(?:([\[\]{}])|\Z)',
    re.DOTALL,
)
_BATCH = re.compile(rb'(?<!\\)"batch"[ \t\r\n]*:[ \t\r\n]*\[\Z')
_SPACE = b" \t\r\n"
_BETWEEN = _SPACE + b","
_BRACKETS = (b"[", b"]", b"{", b"}")
_OPENS = {b"}": b"{", b"]": b"["}


class Shards(NamedTuple):
    """A body taken apart: its root with an empty list for the events, and each event's own bytes."""

    root: bytes
    events: list[bytes]


TOO_MANY = f"more than {MOST_EVENTS} events or {MOST_BRACKETS} brackets"
# Why nothing was found: the brackets make no sense, or there are too many of them or of the events.
Senseless = Literal["malformed_json", "too_large"]


def shatter(text: bytes, most: int = MOST_BRACKETS) -> Shards | Senseless:
    """The events of an array, or of an object's `batch`, if it has no more than `most` brackets.

    For less than the most that there may be, those in texts count too: who may take longer looks closer.
    """
    if most < MOST_BRACKETS and sum(map(text.count, _BRACKETS)) > most:
        return "too_large"
    opened = _list_of(text, most)
    if isinstance(opened, str):
        return opened
    events: list[bytes] = []
    inside: list[bytes] = []  # the brackets that are open in the event
    end = opened  # where the last event ended
    for number, token in enumerate(_NEXT.finditer(text, opened)):
        kind, place = token[1], token.start(1)
        if number > most or len(events) > MOST_EVENTS:
            return "too_large"
        if kind is None:
            break
        if kind in (b"{", b"["):
            # In an object a comma comes before a name: the event before lacks its end.
            if not inside or (inside[-1] == b"{" and token[0][:-1].rstrip(_SPACE).endswith(b",")):
                _add(events, text[end:place])
                inside.clear()
                end = place
            inside.append(kind)
        elif inside:
            while inside and inside.pop() != _OPENS[kind]:
                pass  # what was open in what ends here, and has no end of its own
            if not inside and text[end : end + 1] == _OPENS[kind]:
                _add(events, text[end : token.end()])
                end = token.end()
            elif not inside and kind == b"]":
                _add(events, text[end:place])
                return Shards(text[:opened] + text[place:], events)
        elif kind == b"]":
            _add(events, text[end:place])
            return Shards(text[:opened] + text[place:], events)
    return "malformed_json"


def _list_of(text: bytes, most: int) -> int | Senseless:
    """Where the list of events begins, or why there is none."""
    array = text.lstrip()[:1] == b"["
    depth = 0
    for number, token in enumerate(_NEXT.finditer(text)):
        kind = token[1]
        if number > most:
            return "too_large"
        if kind is None:
            break
        if array or (depth == 1 and kind == b"[" and _BATCH.search(token[0]) is not None):
            return token.end()
        depth += 1 if kind in (b"{", b"[") else -1
        if depth <= 0:
            break
    return "malformed_json"


def _add(events: list[bytes], text: bytes) -> None:
    """Add one event, or what else is between two, on a line of its own.

    A carriage return is white space as well, and no more allowed inside a text than a newline.
    """
    if bare := text.strip(_BETWEEN):
        events.append(bare.replace(b"\n", b"\r"))
