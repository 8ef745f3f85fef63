"""The dead letters of a buffer in memory, within their part of its bound."""

from collections.abc import Sequence
from itertools import islice

import msgspec

from agent.buffer import PURGED_AT_ONCE, DeadEvent, DeadLetter


class MemoryLetters:
    """Letters by id, the oldest first, `most` bytes of events at most; `newest` is the last id given."""

    def __init__(self, most: int) -> None:
        self.kept: dict[int, DeadLetter] = {}
        self.newest = 0
        self._most = most
        self._bytes = 0

    def bury(self, event: DeadEvent) -> int:
        """Keep one more; how many of the oldest had to go for it."""
        self.newest += 1
        self.kept[self.newest] = DeadLetter(id=self.newest, **msgspec.structs.asdict(event))
        self._bytes += len(event.event)
        before = len(self.kept)
        while self._bytes > self._most:
            self.forget(next(iter(self.kept)))
        return before - len(self.kept)

    def forget(self, ident: int) -> None:
        """One of them is gone."""
        self._bytes -= len(self.kept.pop(ident).event)

    def oldest_upto(self, newest: int) -> list[int]:
        """The ids of the oldest, as many as are forgotten at once; none beyond this."""
        return [ident for ident in islice(self.kept, PURGED_AT_ONCE) if ident <= newest]

    def of_ids(self, ids: Sequence[int]) -> list[DeadLetter]:
        """Those of these that there are, each once."""
        return [self.kept[ident] for ident in dict.fromkeys(ids) if ident in self.kept]
