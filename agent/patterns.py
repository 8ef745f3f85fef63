"""What e-mail addresses, card numbers and IP addresses look like: a text without them.

Each pattern knows what is found in every JSON text that holds one (`finds`, cheap), and how it is taken out
of a plain text. All of it takes time in proportion to the text, whatever the text is.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from agent.scan import Find, escape_of, pattern, piece

REDACTED = "[redacted]"


class Pattern(NamedTuple):
    """One kind of thing that is found by its looks."""

    finds: Sequence[Find]
    without: Callable[[str], str]
    # Whether a number's digits are one, where they may be.
    is_number: Callable[[str], bool] | None = None


# --- e-mail addresses --------------------------------------------------------------------------------

# RFC 5321's local part, in any script, without "/", "=", "?" and "&", which belong to the URL around it; and
# the "@" as a URL writes it. An address begins where no such character is before it, so that each is tried
# once.
_LOCAL = r"\w.!#$*+'^`|~\-"
_EMAIL = re.compile(
    rf'(?:"[^"\n]{{1,64}}"|(?:(?<![{_LOCAL}%])|(?<=%40))(?:[{_LOCAL}]|%(?!40))++)(?:@|%40)'
    r"(?:[\w\-]++(?:\.[\w\-]++)++|\[(?:IPv6:)?[0-9A-Fa-f:.]{2,45}\])"
)


def _without_email(text: str) -> str:
    return _EMAIL.sub(REDACTED, text) if "@" in text or "%40" in text else text


# --- IP addresses ------------------------------------------------------------------------------------

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9]{1,2}+)"
_V4 = re.compile(rf"(?<![0-9])(?:{_OCTET}\.){{3}}{_OCTET}(?![0-9])")
# RFC 4291, 2.2: eight groups, or fewer around "::"; the last two may be written as in v4.
_GROUP = r"[0-9A-Fa-f]{1,4}+"
_V6 = re.compile(
    rf"(?<![0-9A-Za-z])(?:(?:{_GROUP}:){{7}}{_GROUP}|(?:{_GROUP}:){{1,7}}+(?::{_GROUP}){{1,7}}"
    rf"|(?:{_GROUP}:){{1,7}}+:|:(?::{_GROUP}){{1,7}})(?:(?:\.[0-9]{{1,3}}){{3}})?(?![0-9A-Za-z])"
)
_IN_V4 = re.compile(rb"\.[0-9]{1,3}\.[0-9]")
_IN_V6 = re.compile(rb":[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{1,4}:")


def _without_ip(text: str) -> str:
    if "::" in text or text.count(":") >= 7:
        text = _V6.sub(REDACTED, text)
    return _V4.sub(REDACTED, text) if text.count(".") >= 3 else text


# --- card numbers ------------------------------------------------------------------------------------

# ISO/IEC 7812: up to 19 digits, 13 at least on any card in use. Payment cards begin with 2 to 6; those with 2
# are Mastercard's of 16 digits. So a time is none: 1795000000123456, 20261124135206.
_FEWEST, _MOST = 13, 19
_FIRST = frozenset("23456")
_FROM_2, _TO_2, _SIZE_2 = "2221", "2720", 16
# Between groups of digits people and programs write one or two of these.
_BETWEEN = " .+_\\-\u00a0\u2010-\u2015"
# Every group but the last has three digits at least on all cards (4-4-4-4, 4-6-5, 4-4-4-1, 6-13).
_SMALLEST = 3
# Groups from the first one on, with as many digits as a card has. It begins with a set, for which the regex
# engine looks quickly; what is before it is looked at then.
_RUN = re.compile(
    rf"[0-9](?<![0-9][0-9])(?=[0-9]{{{_SMALLEST - 1}}})(?=(?:[{_BETWEEN}]{{0,2}}[0-9]){{{_FEWEST - 1}}})"
    rf"[0-9]{{{_SMALLEST - 1},}}+(?:[{_BETWEEN}]{{1,2}}[0-9]++)*+"
)
_DIGITS = re.compile(r"[0-9]+")
# The same over bytes: two characters have six at most.
_IN_CARD = re.compile(rb"[2-6](?:[ .+_\-\x80-\xff]{0,6}+[0-9]){12}")
_search_card = pattern(_IN_CARD)
# Thirteen digits with nothing between them, once every digit is a zero and what may be between them is gone.
_ZEROS, _SAME = b"0" * _FEWEST, bytes.maketrans(b"123456789", b"0" * 9)
_LEFT_OUT = b" .+_-" + bytes(range(0x80, 0x100))
# What a digit counts where Luhn's formula doubles it.
_DOUBLED = bytes.maketrans(b"0123456789", bytes([0, 2, 4, 6, 8, 1, 3, 5, 7, 9]))
_PLAIN = bytes.maketrans(b"0123456789", bytes(range(10)))


def is_card(digits: str) -> bool:
    """Whether these digits are a card's number: as many as it has, and Luhn's check digit at the end."""
    if not (_FEWEST <= len(digits) <= _MOST and digits[0] in _FIRST):
        return False
    if digits[0] == "2" and not (len(digits) == _SIZE_2 and _FROM_2 <= digits[:4] <= _TO_2):
        return False
    last_first = digits.encode()[::-1]
    return (sum(last_first[::2].translate(_PLAIN)) + sum(last_first[1::2].translate(_DOUBLED))) % 10 == 0


def _find_card(text: bytes, start: int) -> int:
    """As `_IN_CARD`, which costs ten times as much as to see that there is none in most texts."""
    if not start and _ZEROS not in text.translate(_SAME, _LEFT_OUT):
        return -1
    return _search_card(text, start)


def _without_card(text: str) -> str:
    return _RUN.sub(_run_without_cards, text) if len(text) >= _FEWEST else text


def _run_without_cards(run: re.Match[str]) -> str:
    """Groups of digits without those that together are a card's number; more groups may stand around it."""
    text = run[0]
    groups = list(_DIGITS.finditer(text))
    parts: list[str] = []
    done = first = 0
    while first < len(groups):
        last = _end_of_card(text, groups, first)
        if last is not None:
            parts += (text[done : groups[first].start()], REDACTED)
            done = groups[last].end()
            first = last
        first += 1
    return "".join((*parts, text[done:]))


def _end_of_card(text: str, groups: list[re.Match[str]], first: int) -> int | None:
    """Which group is the last of a card's number that begins with this one; the longest number wins."""
    digits, found = "", None
    if text[groups[first].start()] not in _FIRST:
        return None
    for number in range(first, len(groups)):
        group = groups[number][0]
        if len(digits) + len(group) > _MOST:
            break
        digits += group
        if is_card(digits):
            found = number
        if len(group) < _SMALLEST:
            break
    return found


# What takes some microseconds each: groups of digits that may be a card's, and what is in an address.
_WEIGHTY = re.compile(rf"[0-9]{{{_SMALLEST},}}+|@|%40|::")


def weight(text: str) -> int:
    """How much in a text takes time to be looked at; it is told in a small part of that time."""
    return len(_WEIGHTY.findall(text))


_ESCAPED = escape_of("@.:0")

PATTERNS = {
    "@email": Pattern([_ESCAPED, piece(b"@"), piece(b"%40")], _without_email),
    # A space that does not break, or a dash, may be an escape.
    "@card": Pattern([piece(rb"\u"), _find_card], _without_card, is_card),
    "@ip": Pattern([_ESCAPED, pattern(_IN_V4), piece(b"::"), pattern(_IN_V6)], _without_ip),
}
