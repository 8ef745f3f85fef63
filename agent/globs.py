"""Lists of names with `*`, `?` and `[...]`: which names they mean, and which bytes show that JSON has one."""

import re
from collections.abc import Collection, Sequence
from fnmatch import translate
from functools import lru_cache

import msgspec

from agent.scan import Find, escape_of, piece

# What a source's names are looked up in: 1,024 of them, none longer than PostHog keeps, are at most 1 MB.
CACHED_NAMES = 1024
CACHED_LENGTH = 200

_encode = msgspec.json.Encoder().encode

_WILD = re.compile(r"\*|\?|\[!?+\]?+[^\]]*\]")


def wrong_glob(glob: str) -> str:
    """Why this means no name, or hardly the one that was thought of; empty where it does."""
    if not glob:
        return "is empty"
    if "[" in _WILD.sub("", glob):
        return f'{glob!r} has a "[" without "]"; [[] is the character itself'
    return ""


class Names:
    """The names that a list means; upper and lower case are not the same."""

    def __init__(self, globs: Sequence[str]) -> None:
        self._globs = globs
        self._exact = frozenset(glob for glob in globs if _WILD.search(glob) is None)
        wild = [translate(glob) for glob in globs if glob not in self._exact]
        self._wild = re.compile("|".join(wild)) if wild else None
        self._known = lru_cache(CACHED_NAMES)(self._means)

    def __bool__(self) -> bool:
        return bool(self._globs)

    def __contains__(self, name: str) -> bool:
        if self._wild is None:
            return name in self._exact
        return self._known(name) if len(name) <= CACHED_LENGTH else self._means(name)

    def _means(self, name: str) -> bool:
        return name in self._exact or (self._wild is not None and self._wild.match(name) is not None)

    def among(self, names: Collection[str]) -> set[str]:
        """Those of the names that the list means."""
        found = set(self._exact.intersection(names))
        if self._wild is None:
            return found
        short = max(map(len, names), default=0) <= CACHED_LENGTH
        return found.union(filter(self._known if short else self._means, names))

    def which(self, name: str) -> str:
        """The first of the list that means the name; empty where none does."""
        return next((glob for glob in self._globs if name in Names((glob,))), "")


def finds(globs: Sequence[str]) -> list[Find]:
    """What finds, in every JSON text that has a key of these names, something, however the key is written."""
    if not globs:
        return []
    pieces = {max(_pieces(glob), key=len) for glob in globs}
    return [escape_of("".join(globs)), *map(piece, sorted(pieces))]


def _pieces(glob: str) -> list[bytes]:
    """What of a key is the same for all the names that a glob means, with the quotes of the key."""
    first, *others = _WILD.split(glob)
    pieces = [_encode(piece)[1:-1] for piece in (first, *others)]
    pieces[0] = b'"' + pieces[0]
    pieces[-1] += b'"'
    return pieces
