"""Decodes logfmt: `event=signup distinct_id=user-42 plan=pro amount=12.5`, one line an event.

There is no standard; this follows what Go's libraries write (go-logfmt, and `strconv.Quote` for texts) and
people type. A value in quotes is a text. One without is a number, `true`, `false` or `null` where it looks
like JSON's, else a text; a key alone is true. Of a key that is there twice the last value counts.
"""

import re
from collections.abc import Sequence
from math import inf

import msgspec
from msgspec import Raw

from agent.decode.lines import Lines
from agent.envelope import LONGEST, Envelope, Flaws
from agent.events import Read, Reason, Reject, sample

# A key, its "=", a value in quotes or bare; the last group is the rest of a line that is none of this.
# Nothing is matched twice (the possessive quantifiers), so that no line costs more than its length.
_PAIR = re.compile(
    r'([^\s="]++)(?:(=)(?:"([^"\\]*+(?:\\.[^"\\]*+)*+)"|([^\s"]*+)))?+(?=\s|\Z)|(\S.*)', re.DOTALL
)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# A double holds 15 digits exactly; more are an id, which must not be rounded.
_EXACT_DIGITS = 15
# The event's own fields; `timestamp` may be a number.
_ROOTS = ("event", "distinct_id", "uuid")
# How no number and no word begins.
_TEXT = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdeghijklmopqrsuvwxyz/[{(")
_WORDS = {"true": True, "false": False, "null": None}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_CONTROLS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
# Two escapes that are one character, as Java and JavaScript write it.
_PAIRED = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
_LONE = re.compile(r"[\ud800-\udfff]")

_encode_lines = msgspec.json.Encoder().encode_lines

# A value of a property: what logfmt can say of JSON's.
Value = str | int | float | bool | None


class Logfmt:
    """The format `logfmt`. No line is larger than `max_event` bytes."""

    def __init__(self, max_event: int) -> None:
        self._max_event = max_event

    def decode(self, reads: Sequence[Read], flaws: Flaws) -> Lines:
        """See `Format.decode`."""
        lines: list[int] = []
        places: list[tuple[int, int]] = []
        envelopes: list[Envelope] = []
        rejects: list[Reject] = []
        properties: list[dict[str, Value]] = []
        for number, read in enumerate(reads):
            count = 0
            for line in read.lines.split(b"\n"):
                if not (line := line.strip()):
                    continue
                found = self._pairs(line)
                envelope = found if isinstance(found, str) else _envelope(found, flaws)
                if isinstance(envelope, str):
                    rejects.append(Reject(number, count, envelope, sample(line)))
                elif not isinstance(found, str):
                    places.append((number, count))
                    envelopes.append(envelope)
                    properties.append(found)
                count += 1
            lines.append(count)
        sealed = _encode_lines(properties).split(b"\n")
        for envelope, own in zip(envelopes, sealed, strict=False):  # behind the last newline is nothing
            envelope.properties = Raw(own)
        return Lines(lines, places if rejects else None, envelopes, rejects)

    def _pairs(self, line: bytes) -> dict[str, Value] | Reason:
        """What one line says, its own fields as texts; or why it says nothing."""
        if len(line) > self._max_event:
            return "too_large"
        try:
            text = line.decode()
        except UnicodeDecodeError:
            return "bad_utf8"
        return _plain_pairs(text) or _any_pairs(text)


def _plain_pairs(text: str) -> dict[str, Value] | None:
    """The pairs of an ordinary line, which has no escapes; None where it wants a closer look.

    Measured on lines of 13 pairs: half of what the regular expression of `_any_pairs` takes.
    """
    quoted: dict[str, str] = {}
    if '"' not in text:
        tokens = text.split()
    else:
        parts = text.split('"')
        if "\\" in text or not len(parts) % 2:
            return None
        tokens = parts[0].split()
        for value, before, after in zip(parts[1::2], parts[::2], parts[2::2], strict=False):
            # A quoted value stands behind its key's "=", and before a space or the end.
            if before[-1:] != "=" or (after and not after[0].isspace()):
                return None
            quoted[tokens.pop()[:-1]] = value
            tokens += after.split()
        if any("=" in key for key in quoted):
            return None
    try:
        found = dict([token.split("=", 1) for token in tokens])
    except ValueError:  # a key alone
        return None
    if "" in found or "" in quoted or not found.keys().isdisjoint(quoted):
        return None
    odd = {key: _value(bare) for key, bare in found.items() if bare[:1] not in _TEXT and key not in _ROOTS}
    return {**found, **quoted, **odd}


def _any_pairs(text: str) -> dict[str, Value] | Reason:
    """The pairs of any line."""
    found: dict[str, Value] = {}
    for key, equals, quoted, bare, odd in _PAIR.findall(text):
        if bare:
            found[key] = bare if bare[0] in _TEXT or key in _ROOTS else _value(bare)
        elif quoted:
            found[key] = _unescaped(quoted) if "\\" in quoted else quoted
        elif odd:
            return "malformed_logfmt"
        else:
            found[key] = "" if equals else True
    return found


def _value(bare: str) -> Value:
    """A value without quotes."""
    if bare.isdecimal() and bare.isascii() and (bare[0] != "0" or bare == "0"):
        return int(bare) if len(bare) <= _EXACT_DIGITS else bare
    if bare in _WORDS:
        return _WORDS[bare]
    if _NUMBER.fullmatch(bare) is None:
        return bare
    if bare[1:].isdecimal():
        return int(bare) if len(bare) <= _EXACT_DIGITS + 1 else bare
    number = float(bare)
    return number if abs(number) != inf else bare


def _unescaped(text: str) -> str:
    """A text as it was before it was quoted; half a surrogate pair, which JSON cannot tell, is U+FFFD."""
    text = _ESCAPE.sub(_character, text)
    if _LONE.search(text) is not None:
        text = _PAIRED.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
        text = _LONE.sub("\ufffd", text)
    return text


def _character(escape: re.Match[str]) -> str:
    two, four, eight, octal, one = escape.groups()
    if one is not None:
        return _CONTROLS.get(one, one)
    code = int(octal, 8) if octal else int(two or four or eight, 16)
    return chr(code) if code <= 0x10FFFF else "\ufffd"


def _envelope(found: dict[str, Value], flaws: Flaws) -> Envelope | Reason:
    """The event's own fields, taken out of what a line says; what is left are its properties."""
    event, who = found.pop("event", None), found.pop("distinct_id", None)
    ident, when = found.pop("uuid", None), found.pop("timestamp", None)
    if not isinstance(event, str) or not event:
        return "missing_event"
    if ident is True:  # a key alone says nothing
        return "bad_uuid"
    name, person = event[:LONGEST], who[:LONGEST] if isinstance(who, str) else None
    flaws.truncated += name != event or (person is not None and person != who)
    return Envelope(
        event=name,
        distinct_id=person or None,
        uuid=ident if isinstance(ident, str) else None,
        timestamp=str(when) if isinstance(when, bool) else when,
    )
