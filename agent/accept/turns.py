"""Steps that hold the loop for a moment, one at a time, the next user's after each."""

from collections import defaultdict

import trio


class Turns:
    """Whose step it is: of one user at a time, and of a user's own in the order in which they came."""

    def __init__(self) -> None:
        self._one = trio.StrictFIFOLock()
        self._of: defaultdict[object, trio.StrictFIFOLock] = defaultdict(trio.StrictFIFOLock)

    async def take(self, user: object) -> None:
        """Return when it is a user's turn; the same task `give`s it back."""
        own = self._of[user]
        await own.acquire()
        try:
            await self._one.acquire()
        except BaseException:
            self._leave(user)
            raise

    def give(self, user: object) -> None:
        """It is others' turn."""
        self._one.release()
        self._leave(user)

    def _leave(self, user: object) -> None:
        own = self._of[user]
        own.release()
        if not own.locked():  # users come and go
            del self._of[user]
