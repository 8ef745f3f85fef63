"""A setting's value: from how a file or the environment writes it to what the program computes with."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from agent.config import Secret
from agent.units import parse_duration, parse_size

# What msgspec calls the types of values, as a person would.
WORDS = {
    "str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false", "null": "nothing",
    "array": "a list", "object": "a table", "datetime": "a date", "date": "a date", "time": "a time of day",
}  # fmt: skip
_TYPES = re.compile(r"Expected `(\w+)`, got `(\w+)`.*")


def _secret(kind: type, value: object) -> object:
    """A secret of what should be a text, any other value as it is."""
    if kind is not Secret:
        return value
    if not isinstance(value, str):
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    return Secret(value)


def suggestion(name: str, known: Sequence[str]) -> str:
    """The known name that was probably meant."""
    close = get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def unit_of(kind: object) -> str:
    """`size` or `duration` for a type that is written with a unit."""
    if get_origin(kind) is not Annotated:
        return ""
    return next((meta.extra["unit"] for meta in get_args(kind)[1:] if meta.extra), "")


def written_as_text(kind: object) -> bool:
    """Whether a value of this type is a text in the file."""
    return bool(unit_of(kind)) or kind in (str, Secret) or bool(_choices(kind))


def _choices(kind: object) -> tuple[str, ...]:
    """The texts that a setting may have, where only some are possible."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def converted(value: object, kind: Any) -> object:
    """The value as its setting's type. Each argument of a ValueError says something that is wrong with it.

    `Any`: what msgspec says is a field's type may be any annotation.
    """
    if wrong := [
        f"{place} {why}" for place, entry, of in _entries(value, kind) for why in _wrongs(entry, of)
    ]:
        raise ValueError(*wrong)
    if unit := unit_of(kind):
        if not isinstance(value, str):
            example = '"5 MiB"' if unit == "size" else '"250 ms"'
            raise ValueError(f"must be a text with a unit, such as {example}")
        return parse_size(value) if unit == "size" else parse_duration(value)
    try:
        return msgspec.convert(value, kind, dec_hook=_secret)
    except msgspec.ValidationError as error:
        if isinstance(value, str) and (choices := _choices(kind)):
            close = suggestion(value, choices)
            raise ValueError(f"{value!r} is not one of {', '.join(choices)}{close}") from error
        raise ValueError(_TYPES.sub(_in_words, str(error))) from error


def _entries(value: object, kind: Any) -> Iterator[tuple[str, object, Any]]:
    """What a list or a table holds: where it stands there, the value, and the type that it should have."""
    if isinstance(value, list) and get_origin(kind) is tuple:
        yield from ((f"entry {number}", entry, get_args(kind)[0]) for number, entry in enumerate(value, 1))
    elif isinstance(value, dict) and get_origin(kind) is Mapping:
        yield from ((repr(name), entry, get_args(kind)[1]) for name, entry in value.items())


def _wrongs(value: object, kind: Any) -> Sequence[str]:
    try:
        converted(value, kind)
    except ValueError as error:
        return error.args
    return ()


def _in_words(types: re.Match[str]) -> str:
    wanted, got = (WORDS.get(word, word) for word in types.groups())
    return f"must be {wanted}, not {got}"
