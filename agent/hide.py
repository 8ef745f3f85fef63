"""Hides what of an event's properties nobody is to see: redacted by name or looks, or hashed under a key.

At any depth. A value is redacted by its name first, else hashed by its name, else looked through for
patterns; so a hash is always that of the value that came, and the same for an id wherever it stands. Names of
properties are looked through for patterns too; none is lost where several become the same. To look for
patterns takes time: of an event that has too much to look at, what is left is redacted as a whole.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence

from msgspec import Raw
from msgspec.json import Encoder

from agent.envelope import OPTIONS
from agent.globs import Names, finds
from agent.patterns import PATTERNS, REDACTED, Pattern, weight

# How many names, values, addresses and groups of digits of an event are looked through for patterns: each
# takes up to 4 µs, and while one event is looked through all others wait. Real events have hundreds.
MOST = 16_384
# A text that is shorter counts once, whatever it is.
_SHORT = 64

_encode = Encoder(order="sorted").encode

# Made once: `dict | list` in a loop costs more than the question.
_CONTAINERS, _NUMBERS = (dict, list), (int, Raw)

# By these words PostHog knows that a program had no id, and merges nobody by them (`isDistinctIdIllegal` in
# its `nodejs/src/common/persons/person-utils.ts`). A hash of one would be an id like any other: whoever was
# identified by such a mistake would become one person.
_NOBODY = frozenset(
    (
        *("anonymous", "guest", "distinctid", "distinct_id", "id", "not_authenticated", "email", "undefined"),
        *("true", "false", "nan", "none", "null", "0", "[object object]", ""),
    )
)

# Properties by which PostHog merges persons, or that hold an id of theirs.
_IDS = frozenset(("alias", "distinct_id", "$distinct_id", "$anon_distinct_id", "$user_id"))

# SHA-256's block; RFC 2104 lays the key, filled up with zeros, over these bytes.
_BLOCK = 64
_INNER, _OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))


class Keyed:
    """HMAC-SHA-256 in hex, its key digested once: a third of the time that `hmac.digest` takes."""

    def __init__(self, key: bytes) -> None:
        block = (hashlib.sha256(key).digest() if len(key) > _BLOCK else key).ljust(_BLOCK, b"\0")
        self._inner = hashlib.sha256(block.translate(_INNER))
        self._outer = hashlib.sha256(block.translate(_OUTER))

    def __call__(self, text: str) -> str:
        """A text's hash."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text.encode())
        outer.update(inner.digest())
        return outer.hexdigest()


def is_nobody(distinct_id: str) -> bool:
    """Whether this is no id, but what a program says that has none."""
    return distinct_id.strip().strip("'\"").lower() in _NOBODY


class Look:
    """The patterns that may be found in one event, and how much of it may still be looked through."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self.patterns = patterns
        self._left = MOST

    def may(self, things: int, text: str) -> bool:
        """Whether so many things, and this text of theirs, may be looked through; then they are counted."""
        things += weight(text) if len(text) >= _SHORT else 0
        if things > self._left:
            return False
        self._left -= things
        return True


class Hiding:
    """What one source hides; `keyed` is for the names in `hashed`."""

    def __init__(self, redact: Sequence[str], hashed: Sequence[str], keyed: Keyed) -> None:
        names = [name for name in redact if name not in PATTERNS]
        self._redacted = Names(names)
        self._hashed = frozenset(hashed)
        self._keyed = keyed
        # What finds something in all properties in which a name is to be hidden.
        self.finds = finds([*names, *hashed])
        self.patterns = [PATTERNS[name] for name in redact if name in PATTERNS]

    def hide(
        self, properties: dict[str, object], patterns: Sequence[Pattern], without: Collection[str] = ()
    ) -> bool:
        """Leave nothing in an event's properties that is to be hidden; False where they are too many.

        `patterns` are those that may be found in them; in the values of those `without` nothing is hidden.
        """
        return self._hide(properties, Look(patterns), without)

    def _hide(self, properties: dict[str, object], look: Look, without: Collection[str] = ()) -> bool:
        """The same at any depth."""
        patterns, names = look.patterns, ""
        if patterns:
            names = "\n".join(properties)
            if not look.may(len(properties), names):
                return False
        redacted = self._redacted.among(properties)
        hashed = self._hashed.intersection(properties) - redacted
        for name, value in properties.items():
            if name in redacted or name in hashed:
                if not (isinstance(value, bool) and name in OPTIONS):
                    properties[name] = REDACTED if name in redacted else self._hash(name, value)
            elif (patterns or isinstance(value, _CONTAINERS)) and name not in without:
                properties[name] = self._shown(value, look)
        if patterns and _tells(patterns, names):
            _rename(properties, {name: _without(patterns, name) for name in properties})
        return True

    def _shown(self, value: object, look: Look) -> object:
        """What is shown of a value whose name hides nothing."""
        if isinstance(value, str):
            if len(value) >= _SHORT and look.patterns and not look.may(0, value):
                return REDACTED
            return _without(look.patterns, value)
        if isinstance(value, dict):
            return value if self._hide(value, look) else REDACTED
        if isinstance(value, list):
            if look.patterns and not look.may(len(value), ""):
                return REDACTED
            return [self._shown(inner, look) for inner in value]
        if isinstance(value, _NUMBERS) and _is_number(look.patterns, value):
            return REDACTED
        return value

    def _hash(self, name: str, value: object) -> object:
        """A text's or number's hash, as if it were the distinct id; that of anything else is of its JSON."""
        if value is None:
            return None
        match value:
            case str():
                text = value
            case Raw():
                text = str(float(bytes(value)))
            case _:
                text = _encode(value).decode()
        return value if name in _IDS and is_nobody(text) else self._keyed(text)


def _rename(properties: dict[str, object], shown: Mapping[str, str]) -> None:
    """Give properties the names that are shown of theirs; where names become equal, they get numbers."""
    numbers: dict[str, int] = {}
    for name, new in shown.items():
        if new != name:
            free = new
            while free in properties:
                numbers[new] = number = numbers.get(new, 1) + 1
                free = f"{new} {number}"
            properties[free] = properties.pop(name)


def _without(patterns: Sequence[Pattern], text: str) -> str:
    for pattern in patterns:
        text = pattern.without(text)
    return text


def _tells(patterns: Sequence[Pattern], text: str) -> bool:
    return _without(patterns, text) != text


def _is_number(patterns: Sequence[Pattern], value: int | Raw) -> bool:
    return any(pattern.is_number and pattern.is_number(_digits(value)) for pattern in patterns)


def _digits(number: int | Raw) -> str:
    """A number's digits before its point; none where there are more than a card has."""
    if isinstance(number, int):
        return str(abs(number))
    text = bytes(number).decode().lstrip("-")
    if "e" not in text.lower():
        return text.split(".")[0]
    return str(int(float(text))) if float(text) < 1e19 else ""
