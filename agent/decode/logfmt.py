"""Decodes logfmt: `event=signup distinct_id=user-42 plan=pro amount=12.5`, one line an event.

There is no standard; this follows what Go's libraries write (go-logfmt, and `strconv.Quote` for texts) and
people type. A value in quotes is a text. One without is a number, `true`, `false` or `null` where it looks
like JSON's, else a text; a key alone is true. Of a key that is there twice the last value counts. White space
between pairs is ASCII's alone; any other is part of a key or value.
"""

import re
from collections.abc import Sequence
from itertools import repeat

import msgspec
from msgspec import Raw

from agent.decode.lines import Lines
from agent.envelope import LONGEST, Envelope, Flaws
from agent.events import Read, Reason, Reject, sample

# A key, its "=", a value in quotes or bare; the last group is the rest of a line that is none of this.
# Nothing is matched twice (the possessive quantifiers), so that no line costs more than its length.
_PAIR = re.compile(
    r'([^\s="]++)(?:(=)(?:"([^"\\]*+(?:\\.[^"\\]*+)*+)"|([^\s"]*+)))?+(?=\s|\Z)|(\S.*)', re.ASCII | re.DOTALL
)
# What is a number without quotes. A double holds 15 digits exactly, before and behind the point together;
# more are an id or an amount, which must not be rounded. Exponents of three digits can leave its range.
_DIGITS = r"-?(?:0(?:\.[0-9]{1,14})?|[1-9](?!(?:\.?[0-9]){15})[0-9]*(?:\.[0-9]+)?)(?:[eE][+-]?[0-9]{1,2})?"
_NUMBER = re.compile(_DIGITS)
# The event's own fields are texts; only `timestamp` may be a number.
_ROOTS = ("event", "distinct_id", "uuid")
_WORDS = {"true": True, "false": False, "null": None}
# A value without quotes where all pairs are JSON's, and it is no text.
_ODD = re.compile(r'":"(%s|true|false|null)"(?=[,}])' % _DIGITS)  # noqa: UP031 - it has braces
# Stands before a value that is a text whatever it looks like; where it stands already, lines are read singly.
_TEXT = "\x7f"
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_CONTROLS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
# Two escapes that are one character, as Java and JavaScript write it.
_PAIRED = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
_LONE = re.compile(r"[\ud800-\udfff]")

_decode_lines = msgspec.json.Decoder(dict[str, str | int | float | bool | None]).decode_lines
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
            whole = [line for line in map(bytes.strip, read.lines.split(b"\n")) if line]
            lines.append(len(whole))
            if len(read.lines) > self._max_event and max(map(len, whole), default=0) > self._max_event:
                at_once = None
            else:
                at_once = _pairs_at_once(whole)
            for place, line in enumerate(whole):
                found = at_once[place] if at_once is not None else self._pairs(line)
                envelope = found if isinstance(found, str) else _envelope(found, flaws)
                if isinstance(envelope, str):
                    rejects.append(Reject(number, place, envelope, sample(line)))
                elif not isinstance(found, str):
                    places.append((number, place))
                    envelopes.append(envelope)
                    properties.append(found)
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
        return _pairs(text)


def _pairs_at_once(lines: Sequence[bytes]) -> list[dict[str, Value]] | None:
    """The pairs of ordinary lines, made JSON all at once; None where one of them wants a closer look.

    Outside of quotes a space ends a pair and "=" a key. What is no pair of a key and a value then is no JSON,
    and what could be JSON by mistake is looked for. Measured: half of what line by line takes.
    """
    try:
        text = b"\n".join(lines).decode()
    except UnicodeDecodeError:
        return None
    if "\\" in text or _TEXT in text:
        return None
    outside, inside = text.split('"')[::2], text.split('"')[1::2]
    if len(inside) != len(outside) - 1 or any(map(str.count, inside, repeat("\n"))):
        return None
    # A value in quotes stands behind its key's "=", and before a space or the end of its line.
    if not all(map(str.endswith, outside[:-1], repeat("="))):
        return None
    if not all(map(str.startswith, outside[1:-1], repeat((" ", "\n")))):
        return None
    if inside and outside[-1] and not outside[-1].startswith((" ", "\n")):
        return None
    pairs = _TEXT.join(outside).replace("=", '":"').replace(" ", '","').replace("\n", '"}\n{"')
    parts = [""] * (2 * len(outside) - 1)
    parts[::2], parts[1::2] = pairs.split(_TEXT), map(_TEXT.__add__, inside)
    whole = f'{{"{"".join(parts)}"}}'
    for root in _ROOTS:
        whole = whole.replace(f'"{root}":"', f'"{root}":"{_TEXT}')
    told = _ODD.split(whole)
    told[1::2] = map('":'.__add__, told[1::2])
    try:
        found = _decode_lines("".join(told).replace(_TEXT, ""))
    except msgspec.DecodeError:
        return None
    return found if len(found) == len(lines) and not any("" in one for one in found) else None


def _pairs(text: str) -> dict[str, Value] | Reason:
    """The pairs of any line."""
    found: dict[str, Value] = {}
    for key, equals, quoted, bare, odd in _PAIR.findall(text):
        if bare:
            found[key] = bare if key in _ROOTS else _value(bare)
        elif quoted:
            found[key] = _unescaped(quoted) if "\\" in quoted else quoted
        elif odd:
            return "malformed_logfmt"
        else:
            found[key] = "" if equals else True
    return found


def _value(bare: str) -> Value:
    """A value without quotes."""
    if bare in _WORDS:
        return _WORDS[bare]
    if _NUMBER.fullmatch(bare) is None:
        return bare
    return int(bare) if bare.lstrip("-").isdecimal() else float(bare)


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
