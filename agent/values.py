"""A setting's value: from how a file or the environment writes it to what the program computes with."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from agent.config import Secret
from agent.units import parse_duration, parse_size


def _secret(kind: type, value: object) -> object:
    """A secret of what should be a text, any other value as it is."""
    if kind is not Secret:
        return value
    if not isinstance(value, str):
        raise TypeError(f"Expected str, got {type(value).__name__}")
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
    """The value as its setting's type. ValueError says what is wrong with it.

    `Any`: what msgspec says is a field's type may be any annotation.
    """
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
        raise ValueError(str(error).replace("`", "")) from error
