"""Steps that hold the loop for a moment, one at a time, the next user's after each."""

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Turns:
    """Whose step it is: of one user at a time, and of a user's own in the order in which they came."""

    def __init__(self) -> None:
        self._one = trio.StrictFIFOLock()
        self._of: defaultdict[object, trio.StrictFIFOLock] = defaultdict(trio.StrictFIFOLock)

    @asynccontextmanager
    async def step(self, user: object) -> AsyncIterator[None]:
        """A block for one step of a user's, which comes when it is his turn."""
        own = self._of[user]
        try:
            async with own, self._one:
                yield
        finally:
            if not own.locked():  # users come and go
                self._of.pop(user, None)
