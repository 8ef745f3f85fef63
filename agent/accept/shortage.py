"""Who leaves when all places of a source are taken and somebody comes, so that no user keeps others out.

Of the user with the most places it is the client that was silent longest; after a while also one that is
busy, if it is not his only one. Nothing is lost by it: what it has written is read to its end, and what it
writes from then on fails. Over TCP the first of that goes into the void, so there it is only who is told what
arrived, or has never said a thing.
"""

from collections import OrderedDict
from math import inf
from typing import Protocol

import structlog
import trio

# Clients that stay for a moment make room by themselves; where they do not for so long, somebody has to.
SHORTAGE_SECONDS = 1.0
# Who has ended a line within so long is busy, and stays. What is not a whole line is no word.
SILENT_SECONDS = 1.0
# But not for ever: where nobody has left for so long, his clients take turns, as those do who connect anew.
BUSY_SECONDS = 5.0

log = structlog.get_logger("accept")


class Client(Protocol):
    """One that has a place."""

    def give_way(self, *, busy: bool) -> bool:
        """Leave, unless it would lose something by it; where it is not to be `busy`, only if it is silent."""


class Shortage:
    """The clients of a source by user, in the order in which they last said something."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._users: dict[object, OrderedDict[Client, float]] = {}
        self._user_of: dict[Client, object] = {}
        self._since = self._asked = -inf

    def came(self, client: Client, user: object) -> None:
        """A client of this user has a place."""
        self._user_of[client] = user
        self._users.setdefault(user, OrderedDict())[client] = trio.current_time()

    def heard(self, client: Client) -> None:
        """A client has said something."""
        if client in self._user_of:
            clients = self._users[self._user_of[client]]
            clients[client] = trio.current_time()
            clients.move_to_end(client)

    def left(self, client: Client) -> None:
        """A client has no place any more, or will have none in a moment."""
        if client in self._user_of:
            user = self._user_of.pop(client)
            del self._users[user][client]
            if not self._users[user]:
                del self._users[user]

    def make_room(self) -> None:
        """Somebody wants a place and there is none; this is called until there is one."""
        now = trio.current_time()
        if now > self._asked + SHORTAGE_SECONDS:
            self._since = now
        self._asked = now
        if now < self._since + SHORTAGE_SECONDS or not self._users:
            return
        user, clients = max(self._users.items(), key=lambda one: len(one[1]))
        busy = now >= self._since + BUSY_SECONDS and len(clients) > 1
        for client, heard in clients.items():
            silent = now >= heard + SILENT_SECONDS
            if not (silent or busy):
                return
            if (silent and client.give_way(busy=False)) or (busy and client.give_way(busy=True)):
                log.warning(
                    "all places are taken; who was silent longest of the user with most has to leave",
                    source=self._source,
                    user=user if isinstance(user, int | str) else None,
                    connections=len(clients),
                    hint="see what holds them, or raise max_connections",
                )
                self.left(client)
                return
