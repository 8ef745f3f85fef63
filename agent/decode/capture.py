"""Reads the requests of PostHog's capture endpoints (the v0 family), as lines for the door.

The shapes, keys and words are PostHog's (`rust/capture/src/v0_request.rs`, `api.rs`). More lenient than
PostHog: only a body that cannot be read at all, names no key or holds no event is refused; what is wrong with
an event, the door says of that event alone. Ordinary events pass as the bytes that came.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from agent.decode.body import Placed, ahead_of, crowded, has_address, joined, trimmed, wrong_key
from agent.decode.mend import Manner, mend
from agent.decode.request import JSON, WANTED, Answer, Posted, Request, Trouble
from agent.decode.shards import TOO_MANY, Shards, shatter
from agent.decode.unpack import unpack
from agent.envelope import DECODE_ERRORS

PATHS = ("/batch", "/i/v0/e", "/e", "/track", "/capture", "/engage")
SENT_AT_YEAR = 2020  # a `_` up to then was in seconds and is ignored: `payload/types.rs`
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DIGITS = re.compile(rb"[0-9]{1,18}")
_WORDS = b"data did not match any variant of untagged enum RawRequest"  # serde's
_OK, _NO_CONTENT = Answer(200, b'{"status":"Ok"}', JSON), Answer(204)
_TROUBLES: Mapping[Trouble, Answer] = {
    "too_large": Answer(
        413, b"maximum event size exceeded: Request body exceeds the limit", reason="too_large", events=1
    ),
    "stalled": Answer(408, b"client stopped sending data"),
    "busy": Answer(503, b"transient error, please retry", again=True),
    "unknown_key": Answer(
        401,
        b"API key is not valid: no project of this agent has this project API key",
        reason="unknown_key",
        events=1,
    ),
    "rate_limited": Answer(429, b"rate limited", again=True),
}
# What PostHog says of a request with an event that has this flaw: `api.rs`.
_FLAWS = {
    "missing_event": b"event submitted with an empty event name",
    "missing_distinct_id": b"event submitted without a distinct_id",
    "too_large": b"maximum event size exceeded",
}


class _Root(msgspec.Struct):
    """The root of an object, without its events."""

    api_key: Raw = Raw(b"null")
    token: Raw = Raw(b"null")
    sent_at: Raw = Raw(b"null")
    historical_migration: Raw = Raw(b"null")


class _Batch(_Root):
    """With its events, which stay sealed."""

    batch: list[Raw] | UnsetType = UNSET


class _Parted(NamedTuple):
    """A body's root and events; `batched` where the events are the root's `batch`."""

    root: _Root
    events: Sequence[Raw]
    batched: bool


class _Ordinary(msgspec.Struct, kw_only=True, gc=False):
    """The root of an event that the door understands as it is: it has the one, and none of the others."""

    distinct_id: str | int | float
    dollar_distinct_id: None = msgspec.field(name="$distinct_id", default=None)
    offset: None = None


class _OrdinaryBatch(msgspec.Struct):
    batch: list[_Ordinary]


class _Settled(_Ordinary, kw_only=True, gc=False):
    """An ordinary event to whose properties nothing needs to be added."""

    properties: Placed


class _SettledBatch(msgspec.Struct):
    batch: list[_Settled]


_root = msgspec.json.Decoder(_Root).decode
_batch = msgspec.json.Decoder(_Batch).decode
_array = msgspec.json.Decoder(list[Raw]).decode
_ordinary = msgspec.json.Decoder(_OrdinaryBatch).decode
_settled = msgspec.json.Decoder(_SettledBatch).decode
_text = msgspec.json.Decoder(str).decode


def trouble(what: Trouble) -> Answer:
    """What a client is told that meets with this."""
    return _TROUBLES[what]


def answer(posted: Posted, refused: Mapping[int, str]) -> Answer:
    """What a client is told once its events are taken, but for those that the door `refused`, and why.

    An SDK throws all of a batch away for a 400, so there is one only where nothing was taken.
    """
    reasons = list(dict.fromkeys(refused.values()))
    if "buffer_full" in reasons:
        return trouble("busy")
    if len(refused) < posted.events or WANTED.issuperset(reasons):
        return _NO_CONTENT if posted.beacon else _OK
    if "rate_limited" in reasons:
        return trouble("rate_limited")
    status = 413 if reasons[0] == "too_large" else 400
    return Answer(status, _FLAWS.get(reasons[0], b"failed to parse request: " + _WORDS))


def read_request(request: Request) -> Posted | Answer:
    """The events of a request, or why PostHog would refuse all of it."""
    unpacked = unpack(request)
    if isinstance(unpacked, Answer):
        return unpacked
    text = unpacked.text
    parted = _part(text, request.brackets)
    if isinstance(parted, Answer):
        return parted
    root, events, batched = parted
    if not events:
        return Answer(400, b"request holds no event")
    key = _first_text(root.api_key, root.token)
    ahead = _ahead(root, unpacked.query.get("_"), request.at.wall)
    manner = Manner(request.at.wall, ahead, request.near, request.path.removesuffix("/") == "/engage")
    plain = placed = False
    if key is not None and batched:
        plain, placed = _look(text, manner)
    if plain:
        lines = joined(text, events)
    else:
        mended = [mend(raw, manner) for raw in events]
        lines = joined(text, [event.line for event in mended])
        if key is None:
            keys = {event.key for event in mended if event.key is not None}
            if len(keys) > 1:
                return _keyless(b"batch submitted with inconsistent api_key values", events)
            key = keys.pop() if keys else None
    if key is None:
        return _keyless(b"event submitted without an api_key", events)
    key = trimmed(key)
    if why := wrong_key(key):
        return _keyless(b"API key is not valid: " + why, events)
    return Posted(
        key,
        lines,
        len(events),
        historical=bytes(root.historical_migration) == b"true",
        beacon=unpacked.query.get("beacon") == b"1",
        placed=placed,
    )


def _keyless(why: bytes, events: Sequence[Raw]) -> Answer:
    return Answer(401, why, reason="unknown_key", events=len(events))


def _unreadable(why: bytes = _WORDS) -> Answer:
    return Answer(400, b"failed to parse request: " + why, events=1)


def _part(text: bytes, brackets: int) -> _Parted | Answer:
    """The root and the events, in whichever shape they came."""
    if crowded(text):
        return _part_slowly(text, brackets)
    try:
        if text.lstrip()[:1] == b"[":
            return _Parted(_Root(), _array(text), batched=False)
        root = _batch(text)
    except msgspec.ValidationError:
        return _unreadable()
    except DECODE_ERRORS as error:
        parted = _part_slowly(text, brackets)
        if isinstance(parted, _Parted) or parted.status != 400 or not isinstance(error, msgspec.DecodeError):
            return parted
        return _unreadable(str(error).encode())
    if root.batch is UNSET:
        return _Parted(root, [Raw(text)], batched=False)
    return _Parted(root, root.batch, batched=True)


def _part_slowly(text: bytes, brackets: int) -> _Parted | Answer:
    """What is whole of a body with a broken event in it, or of one that may hold too many of them."""
    shards = shatter(text, brackets)
    if shards == "too_large":
        words = f"maximum event size exceeded: {TOO_MANY}".encode()
        return Answer(413, words, reason="too_large", events=1)
    batched = text.lstrip()[:1] == b"{"
    try:
        if isinstance(shards, Shards):
            root = _root(shards.root) if batched else _Root()
            return _Parted(root, [Raw(event) for event in shards.events], batched)
        return _Parted(_root(text), [Raw(text)], batched=False)
    except DECODE_ERRORS:
        return _unreadable()


def _look(text: bytes, manner: Manner) -> tuple[bool, bool]:
    """Whether all events of a batch are ordinary, and whether they are `placed` besides."""
    if manner.ahead or manner.engage or has_address(text, near=manner.near):
        return False, False
    if manner.near and b'"$geoip_disable"' in text:
        with suppress(*DECODE_ERRORS):
            _settled(text)
            return True, True
    with suppress(*DECODE_ERRORS):
        _ordinary(text)
        return True, False
    return False, False


def _first_text(*values: Raw) -> str | None:
    """The first of them that is a text."""
    return next((text for text in map(_as_text, values) if text is not None), None)


def _as_text(raw: Raw) -> str | None:
    """The text in sealed bytes; None where they hold anything else."""
    try:
        return _text(raw)
    except DECODE_ERRORS:
        return None


def _ahead(root: _Root, sent: bytes | None, now: int) -> int:
    """By how much the client's clock is ahead of ours (µs); 0 where it is not, or does not tell."""
    told = _as_text(root.sent_at)
    if told is not None and (ahead := ahead_of(told, now)) is not None:
        return ahead
    if sent is None or _DIGITS.fullmatch(sent) is None:
        return 0
    try:
        moment = _EPOCH + timedelta(milliseconds=int(sent))
    except OverflowError:
        return 0
    return (ahead_of(moment.isoformat(), now) or 0) if moment.year > SENT_AT_YEAR else 0
