"""The dead letters' pages: listed, shown, sent again, forgotten; for the admin socket only.

They serve a running agent's socket and, where none runs, the command that opened the buffer itself: so there
is one way to ask. A page holds at most `LETTERS_PAGE`, so that neither side ever holds many.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent import crash
from agent.buffer import LETTERS_PAGE, DeadLetter, DeadLetters
from agent.events import is_json
from agent.units import format_time


class _Event(msgspec.Struct):
    """What of an event tells it from others. The door has vouched for it; of a damaged one it is empty."""

    event: str = ""
    distinct_id: str = ""
    uuid: str = ""


class _Wish(msgspec.Struct):
    """Which letters something is to be done to."""

    ids: list[int]


class _Purge(msgspec.Struct):
    """Which letters are to be forgotten: these, or of all up to an id as many as go at once."""

    ids: list[int] | None = None
    upto: int | None = None


_read_event = msgspec.json.Decoder(_Event).decode
_read_wish = msgspec.json.Decoder(_Wish).decode
_read_purge = msgspec.json.Decoder(_Purge).decode


def routes(letters: DeadLetters) -> list[Route]:
    """The pages, to be part of an app."""

    async def index(request: Request) -> Response:
        """`?after=ID`: the next page; `?full=1`: with the events themselves."""
        after, full = request.query_params.get("after", "0"), "full" in request.query_params
        if not _is_number(after):
            return _refused("after is not the id of a dead letter")
        kept = await letters.letters_kept()
        page = [_told(letter, full=full) for letter in await letters.letters(int(after), LETTERS_PAGE)]
        return _json({"kept": kept.letters, "newest": kept.newest, "letters": page})

    async def show(request: Request) -> Response:
        letter = await letters.letter(request.path_params["ident"])
        return _json(_told(letter, full=True)) if letter else _refused("there is no such dead letter", 404)

    async def replay(request: Request) -> Response:
        wish = await _wish(request)
        if isinstance(wish, Response):
            return wish
        replayed = await letters.replay(wish.ids)
        crash.point("replay.done")
        return _json({"done": replayed.letters, "full": replayed.full, "damaged": replayed.damaged})

    async def purge(request: Request) -> Response:
        try:
            wish = _read_purge(await request.body())
        except (msgspec.DecodeError, RecursionError):
            wish = _Purge()
        if wish.ids is not None:
            return _json({"done": await letters.purge(wish.ids)})
        if wish.upto is not None:
            return _json({"done": await letters.purge_upto(wish.upto)})
        return _refused('the body is neither {"ids": [1, 2, ...]} nor {"upto": 2}')

    return [
        Route("/dead-letters", index),
        Route("/dead-letters/replay", replay, methods=["POST"]),
        Route("/dead-letters/purge", purge, methods=["POST"]),
        Route("/dead-letters/{ident:int}", show),
    ]


def _is_number(text: str) -> bool:
    """No id has more digits than SQLite's largest integer, and `int` raises on a text of thousands."""
    return text.isascii() and text.isdecimal() and len(text) <= len(str(2**63))


async def _wish(request: Request) -> _Wish | Response:
    try:
        return _read_wish(await request.body())
    except (msgspec.DecodeError, RecursionError):
        return _refused('the body is not {"ids": [1, 2, ...]}')


def _told(letter: DeadLetter, *, full: bool) -> dict[str, Any]:
    """A letter as JSON-able values; its event as it is, only where asked for."""
    event = _event_of(letter)
    brief: dict[str, Any] = {
        "id": letter.id,
        "uuid": event.uuid,
        "event": event.event,
        "distinct_id": event.distinct_id,
        "project": letter.project,
        "other_key": letter.key is not None,
        "reason": letter.reason,
        "detail": letter.detail,
        "at": _time(letter.at),
        "received_at": _time(letter.received_at),
        "attempts": letter.attempts + sum(burial.attempts for burial in letter.burials),
        "damaged": letter.damaged,
    }
    earlier = [{**burial._asdict(), "at": _time(burial.at)} for burial in letter.burials]
    return brief | {"earlier": earlier, "body": _body(letter.event)} if full else brief


def _event_of(letter: DeadLetter) -> _Event:
    try:
        return _read_event(letter.event)
    except (msgspec.DecodeError, RecursionError):
        return _Event()


def _body(event: bytes) -> object:
    """The event byte for byte; where nobody can read that, a text with its bytes."""
    return msgspec.Raw(event) if is_json(event) else event.decode("utf-8", "backslashreplace")


def _time(wall: int) -> str:
    """Empty where no calendar has it, as a damaged letter may say anything."""
    try:
        return format_time(wall)
    except (ValueError, OverflowError, OSError):
        return ""


def _json(document: object) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


def _refused(why: str, status: int = 400) -> Response:
    return JSONResponse({"error": why}, status)
