"""Tells what a source would do with one event, and which of its settings say so; nothing is taken."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Raw

from agent.accept.source import door_of
from agent.config import Project, Secret, Source
from agent.events import Instant, Read
from agent.pack import inflate
from agent.patterns import REDACTED
from agent.shape import shape_of
from agent.shape_checks import PROPERTY
from agent.vouch import Decoded, Door

# JSON, its numbers as their texts: any.
Event = dict[str, Any]


class Change(msgspec.Struct, frozen=True):
    """One thing that was done to an event, and where in it."""

    where: str
    what: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an event: why it was refused, or what was changed and how it would be stored."""

    source: str
    accepted: bool
    reason: str = ""
    why: str = ""
    changes: list[Change] = []
    event: Raw | None = None


def explain(settings: Source, project: Project, text: bytes, at: Instant) -> Explanation | None:
    """What a source would make of an example; None where there is no event in it."""
    # A newline ends an event; within JSON it is a space like any other.
    line = text.strip().replace(b"\n", b" ") + b"\n"
    stays = _vouch(door_of(settings, project), line, at)
    if not stays.tally.received:
        return None
    before, after = _text(_vouch(door_of(_plain(settings), project), line, at)), _text(stays)
    if not after:
        why = _why(settings, _read(before)) if before else ""
        reason = stays.rejects[0].reason
        return Explanation(source=settings.name, accepted=False, reason=reason, why=why)
    changes = [*_mended(stays), *_changes(settings.rename, _read(before), _read(after))]
    return Explanation(source=settings.name, accepted=True, changes=changes, event=Raw(after))


def _plain(settings: Source) -> Source:
    """The source as if it took its events as they come."""
    return msgspec.structs.replace(
        settings, drop=(), keep=(), sample=1.0, rename={}, redact=(), hash=(), hash_key=Secret("")
    )


def _vouch(door: Door, line: bytes, at: Instant) -> Decoded:
    return door.vouch([Read(line, at)], 0)


def _text(decoded: Decoded) -> bytes:
    """The event as it would be stored; empty where it was refused."""
    return b"".join(inflate(chunk.packed, chunk.size, chunk.crc) for chunk in decoded.chunks)


def _read(text: bytes) -> Event:
    event: Event = json.loads(text, parse_int=str, parse_float=str)
    return event


def _why(settings: Source, event: Event) -> str:
    shape = shape_of(settings)
    return shape.why(event["event"], event["distinct_id"]) if shape is not None else ""


def _mended(decoded: Decoded) -> Iterator[Change]:
    if decoded.tally.truncated:
        yield Change("event, distinct_id", "cut at 200 characters")
    if decoded.tally.restamped:
        yield Change("timestamp", "cannot be read: it is the time of receipt, and kept as $agent_timestamp")


def _changes(rename: Mapping[str, str], before: Event, after: Event) -> Iterator[Change]:
    """What shaping did, by what is different."""
    if before["event"] != after["event"]:
        yield Change("event", f"renamed from {before['event']!r}")
    if before["distinct_id"] != after["distinct_id"]:
        yield Change("distinct_id", "hashed")
    came = before["properties"]
    moves = {old.removeprefix(PROPERTY): new for old, new in rename.items() if old.startswith(PROPERTY)}
    moves = {old: new for old, new in moves.items() if old in came}
    stayed = {name: value for name, value in came.items() if name not in moves}
    for old, new in moves.items():
        lost = new in stayed
        yield Change(f"properties.{old}", f"gives way to {new!r}" if lost else f"renamed to {new!r}")
        stayed.setdefault(new, came[old])
    yield from _hidden(stayed, after["properties"], "properties")


def _hidden(before: Any, after: Any, where: str) -> Iterator[Change]:
    """The places at which something was hidden. `Any`: they are JSON."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, value in before.items():
            if name in after:
                yield from _hidden(value, after[name], f"{where}.{name}")
            else:
                yield Change(where, "a name in it redacted")
    elif isinstance(before, list) and isinstance(after, list):
        for number, (value, shown) in enumerate(zip(before, after, strict=True)):
            yield from _hidden(value, shown, f"{where}[{number}]")
    elif before != after:
        yield Change(where, "redacted" if REDACTED in str(after) else "hashed")
