"""Who leaves when all places of a Unix stream are taken and somebody comes, so that no user keeps others out.

Of the user with the most places it is the client that was silent longest. Nothing is lost by it: what it has
written is read to its end, and what it writes from then on fails. A TCP client would write into the void,
and nobody knows whose it is, so none of those loses its place.
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

log = structlog.get_logger("accept")


class Client(Protocol):
    """One that has a place."""

    def give_way(self) -> bool:
        """Leave, unless the agent owes it something."""


class Shortage:
    """The clients of a source by user, in the order in which they last said something."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._users: dict[int, OrderedDict[Client, float]] = {}
        self._uids: dict[Client, int] = {}
        self._since = self._asked = -inf

    def came(self, client: Client, uid: int) -> None:
        """A client of this user has a place."""
        self._uids[client] = uid
        self._users.setdefault(uid, OrderedDict())[client] = trio.current_time()

    def heard(self, client: Client) -> None:
        """A client has said something."""
        if (uid := self._uids.get(client)) is not None:
            clients = self._users[uid]
            clients[client] = trio.current_time()
            clients.move_to_end(client)

    def left(self, client: Client) -> None:
        """A client has no place any more, or will have none in a moment."""
        if (uid := self._uids.pop(client, None)) is not None:
            del self._users[uid][client]
            if not self._users[uid]:
                del self._users[uid]

    def make_room(self) -> None:
        """Somebody wants a place and there is none; this is called until there is one."""
        now = trio.current_time()
        if now > self._asked + SHORTAGE_SECONDS:
            self._since = now
        self._asked = now
        if now < self._since + SHORTAGE_SECONDS or not self._users:
            return
        uid, clients = max(self._users.items(), key=lambda user: len(user[1]))
        for client, heard in clients.items():
            if now < heard + SILENT_SECONDS:
                return
            if client.give_way():
                log.warning(
                    "all places are taken; who was silent longest of the user with most has to leave",
                    source=self._source,
                    uid=uid,
                    connections=len(clients),
                    hint="see what holds them, or raise max_connections",
                )
                self.left(client)
                return
