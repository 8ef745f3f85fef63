"""The dead letters as the commands ask for them, a page at a time."""

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import httpx


class Burial(msgspec.Struct, kw_only=True):
    """When it was refused, and how."""

    at: str
    reason: str
    detail: str
    attempts: int


class Letter(Burial, kw_only=True, omit_defaults=True):
    """What `agent/letters.py` tells of one; `body` is the event byte for byte, where it was asked for.

    With `other_key` it is not of the project whose name is told, which its events only share the host with.
    One that is `damaged` is not what was buried; a body that is no JSON any more is a text with its bytes.
    """

    id: int
    uuid: str
    event: str
    distinct_id: str
    project: str
    other_key: bool
    received_at: str
    # By a factory, as that is told also where it is false; and an older agent does not tell it.
    damaged: bool = msgspec.field(default_factory=bool)
    earlier: list[Burial] = []
    body: msgspec.Raw = msgspec.Raw(b"")


class Page(msgspec.Struct):
    """Some letters, how many there are in all, and the newest one's id."""

    kept: int
    newest: int
    letters: list[Letter]


class Done(msgspec.Struct):
    """To how many letters it was done, whether the buffer is full, and which are damaged and were left."""

    done: int
    full: bool = False
    damaged: list[int] = []


class Shelf:
    """All dead letters, fetched a page at a time."""

    def __init__(self, client: "httpx.AsyncClient") -> None:
        self._client = client

    async def kept(self) -> Page:
        """How many there are now, and the newest one's id; without any of them."""
        return await self._page(2**62, full=False)

    async def all(self, *, full: bool) -> AsyncIterator[Letter]:
        """Each letter that there is now, the oldest first; `full` with the event itself."""
        newest = (await self.kept()).newest
        after = 0
        while after < newest and (letters := (await self._page(after, full=full)).letters):
            for letter in letters:
                if letter.id <= newest:
                    yield letter
            after = letters[-1].id

    async def pages(self, ids: Sequence[int], newest: int) -> AsyncIterator[Sequence[int]]:
        """These ids, or without any those of all letters up to the newest, in lots."""
        from agent.buffer import LETTERS_AT_ONCE

        for start in range(0, len(ids), LETTERS_AT_ONCE):
            yield ids[start : start + LETTERS_AT_ONCE]
        after = 0
        while not ids and after < newest and (letters := (await self._page(after, full=False)).letters):
            some = [letter.id for letter in letters if letter.id <= newest]
            for start in range(0, len(some), LETTERS_AT_ONCE):
                yield some[start : start + LETTERS_AT_ONCE]
            after = letters[-1].id

    async def one(self, ident: int) -> Letter | None:
        """One letter with its event; None where there is none of this id."""
        answer = await self._client.get(f"/dead-letters/{ident}")
        if answer.status_code == 404:
            return None
        return msgspec.json.decode(answer.raise_for_status().content, type=Letter)

    async def replay(self, ids: Sequence[int]) -> Done:
        """Send some again, but for those that are damaged."""
        return await self._do("replay", ids)

    async def purge(self, ids: Sequence[int]) -> Done:
        """Forget some."""
        return await self._do("purge", ids)

    async def purge_upto(self, newest: int) -> AsyncIterator[int]:
        """Forget all up to an id, in lots: how many each time."""
        while done := (await self._do("purge", newest)).done:
            yield done

    async def _do(self, verb: str, which: Sequence[int] | int) -> Done:
        wish = {"upto": which} if isinstance(which, int) else {"ids": list(which)}
        answer = await self._client.post(f"/dead-letters/{verb}", json=wish)
        return msgspec.json.decode(answer.raise_for_status().content, type=Done)

    async def _page(self, after: int, *, full: bool) -> Page:
        wanted = {"after": str(after), **({"full": "1"} if full else {})}
        answer = await self._client.get("/dead-letters", params=wanted)
        return msgspec.json.decode(answer.raise_for_status().content, type=Page)
