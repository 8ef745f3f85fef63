"""Finds, in many texts laid together, those in which something may be: one search for all of them."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

# Where in a text, from a place on, something is; -1 where it is not.
Find = Callable[[bytes, int], int]


def piece(wanted: bytes) -> Find:
    """Finds some bytes."""

    def find(text: bytes, start: int) -> int:
        return text.find(wanted, start)

    return find


def pattern(wanted: re.Pattern[bytes]) -> Find:
    """Finds what a pattern means; it begins with a literal byte or a set of bytes, or it is slow."""
    search = wanted.search

    def find(text: bytes, start: int) -> int:
        return -1 if (found := search(text, start)) is None else found.start()

    return find


def escape_of(hidden: str) -> Find:
    """Finds what is in every JSON text that writes one of these characters as an escape."""
    # The short escapes, `\\/` or `\\n`, are of few characters; the others are `\\u` and four digits.
    if any(char in '"\\/' or char < " " for char in hidden):
        return piece(b"\\")
    return pattern(re.compile(rb"\\u00[0-7]")) if hidden.isascii() else piece(rb"\u")


class Laid:
    """Texts laid together, a newline between them."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._blob = b"\n".join(texts)
        self._ends = list(accumulate(len(text) + 1 for text in texts))

    def which(self, finds: Iterable[Find]) -> set[int]:
        """The texts in which any of these finds something."""
        found: set[int] = set()
        for find in finds:
            place = find(self._blob, 0)
            while place >= 0:
                at = bisect_right(self._ends, place)
                found.add(at)
                place = find(self._blob, self._ends[at])
        return found
