"""Reads a syslog message that is an event itself: a JSON object, bare or behind `@cee:`."""

from copy import copy

from agent.envelope import Envelope, Flaws, Stamp, complete, examine, has_roots

# What a message that may be JSON begins with, and what marks it as such (https://github.com/CEE).
OPENERS = frozenset(("{", "@", " "))
_COOKIE = "@cee:"
# The only property for whose value an event is refused.
_REFUSABLE = "$cookieless_mode"


def embedded(message: str, who: str, max_event: int, flaws: Flaws) -> Envelope | None:
    """The event that a message is, `who`'s if it says nobody's; None where the door would not let it in."""
    text = message.lstrip(" ").removeprefix(_COOKIE).lstrip(" ")
    if not text.startswith("{") or '"event"' not in text:
        return None
    truncated = flaws.truncated
    # A newline is white space in JSON; an event is one line.
    envelope = examine(text.replace("\n", " ").encode(), max_event, flaws)
    if isinstance(envelope, str):
        return None
    if envelope.distinct_id is None or not str(envelope.distinct_id).strip():
        envelope.distinct_id = who
    if _is_refused(envelope, text):
        flaws.truncated = truncated  # the text is told whole
        return None
    return envelope


def _is_refused(envelope: Envelope, text: str) -> bool:
    """Whether it breaks a rule that only the completing of an event looks at; most texts cannot hide that."""
    if (
        envelope.uuid is None
        and "\\" not in text
        and _REFUSABLE not in text
        and bytes(envelope.properties)[:1] == b"{"
        and not has_roots(envelope)
    ):
        return False
    return isinstance(complete(copy(envelope), {}, {}, "", Stamp("", ""), Flaws()), str)
