"""What PostHog says to a flag call of a project that has no flags, as strict with its key as with events'."""

from contextlib import suppress

import msgspec

from agent.sink.judge import check_key
from agent.sink.payload import Refusal, Reply, Request

PATH = "/flags"
JSON = {"content-type": "application/json"}


class _Call(msgspec.Struct):
    """What of a call decides (`rust/feature-flags/src/flags/flag_request.rs`)."""

    token: str = ""
    api_key: str = ""
    distinct_id: str | int | float | None = None


def flags(request: Request) -> Reply:
    """The answer to `POST /flags?v=2`."""
    call = None
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        call = msgspec.json.decode(request.body, type=_Call)
    if call is None or call.distinct_id is None:
        return _told(
            400, {"type": "validation_error", "code": "invalid", "detail": "no call, or no distinct_id"}
        )
    try:
        check_key(call.token or call.api_key)
    except Refusal as refusal:
        detail = refusal.reply.body.decode()
        return _told(401, {"type": "authentication_error", "code": "not_authenticated", "detail": detail})
    return _told(200, {"flags": {}, "errorsWhileComputingFlags": False, "requestId": request.number})


def _told(status: int, document: object) -> Reply:
    return Reply(status, msgspec.json.encode(document), JSON)
