"""Reads the structured data of RFC 5424 (section 6.3), which stands in front of the message."""

import re
from functools import lru_cache

import msgspec
from msgspec import Raw

StructuredData = dict[str, dict[str, str | list[str]]]

_NAME = r'([^ =\]"]+)'
_ELEMENT = re.compile(r"\[" + _NAME)
_PARAM = re.compile(" +" + _NAME + r'="([^"\\]*)')
_END = re.compile(" *]")
# What ends a value, and what may look as if it did.
_MARK = re.compile(r'\\.|"', re.DOTALL)
_ESCAPED = re.compile(r'\\(["\\\]])')

# How many shapes of data are remembered, and the longest: 2 MiB at most, more than a host's programs write.
_SHAPES, _LONGEST_SHAPE = 256, 2048

_encode = msgspec.json.Encoder().encode


def structured(text: str) -> tuple[StructuredData | Raw, str] | None:
    """The elements at the beginning of a text and the message behind them; None where they break the grammar.

    More is taken than the RFC allows, where it cannot be misread: spaces, and a bare `]` inside quotes.
    """
    end = text.find('"] ')
    if end < 0:
        end = len(text) - 2 if text.endswith('"]') else 0
    if 0 < end <= _LONGEST_SHAPE and (told := _filled(text[:end])) is not None:
        return told, text[end + 3 :]
    return _elements(text)


def _filled(data: str) -> Raw | None:
    """Data without its last quote and bracket, where it differs from others only in its values.

    Programs write the same names again and again: with nothing escaped, what stands between the quotes is put
    into the JSON that was made for these names.
    """
    if "\\" in data:
        return None
    parts = _encode(data)[1:-1].split(b'\\"')
    # Where the last quote is one that begins a value, the parts are odd.
    if len(parts) % 2 or (around := _around(tuple(parts[::2]))) is None:
        return None
    parts.append(b"")
    parts[::2] = around
    return Raw(b"".join(parts))


@lru_cache(maxsize=_SHAPES)
def _around(shape: tuple[bytes, ...]) -> tuple[bytes, ...] | None:
    """Of data with these parts around its values, the JSON around them; None where it cannot be so simple."""
    text = (b'""'.join(shape) + b'""]').decode()
    found = _elements(text)
    if "\\" in text or found is None or found[1]:
        return None
    # Values are filled in in their order: no element may be merged with an earlier one, nor a parameter.
    elements = found[0].values()
    if len(elements) != text.count("[") or sum(map(len, elements)) != len(shape):
        return None
    # Two quotes stand only for a value, as no name is empty.
    return tuple(_encode(found[0]).replace(b'""', b'"\0"').split(b"\0"))


def _elements(text: str) -> tuple[StructuredData, str] | None:
    """The elements and the message, by the grammar."""
    found: StructuredData = {}
    at = 0
    while (element := _ELEMENT.match(text, at)) is not None:
        params = found.setdefault(element[1], {})
        at = element.end()
        while (param := _PARAM.match(text, at)) is not None:
            name, value = param.groups()
            at = param.end()
            if text[at : at + 1] != '"':
                quote = _quote(text, at)
                if quote < 0:
                    return None
                value = _ESCAPED.sub(r"\1", value + text[at:quote])
                at = quote
            at += 1
            if name in params:
                _add(params, name, value)
            else:
                params[name] = value
        end = _END.match(text, at)
        if end is None:
            return None
        at = end.end()
    if not found or text[at : at + 1] not in {"", " "}:
        return None
    return found, text[at + 1 :]


def _quote(text: str, at: int) -> int:
    """Where the quote stands that ends a value; -1 where none does."""
    for mark in _MARK.finditer(text, at):
        if mark[0] == '"':
            return mark.start()
    return -1


def _add(params: dict[str, str | list[str]], name: str, value: str) -> None:
    """One more value of a parameter that is there already."""
    known = params[name]
    if isinstance(known, list):
        known.append(value)
    else:
        params[name] = [known, value]
