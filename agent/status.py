"""The status document: what a person or a script is told about a running agent, as JSON-able values."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from agent import __version__
from agent.accept.source import Source
from agent.buffer import Books, Buffer, Stats
from agent.config import Config
from agent.deliver.worker import Delivery
from agent.events import OTHER, SHED_AT_THE_DOOR
from agent.units import format_time

Document = dict[str, Any]


class AboutClock(NamedTuple):
    """This boot, how often the host's clock was set since the start, when last (µs) and by how much (µs)."""

    boot: str
    steps: int
    last_at: int | None
    last_by: int


class Reloaded(NamedTuple):
    """The last reload: when (µs), and why it was refused; empty where it was not."""

    at: int
    error: str


def describe(
    config: Config,
    buffer: Buffer,
    sources: Sequence[Source],
    deliveries: Sequence[Delivery],
    *,
    state: str,
    uptime: float,
    clock: AboutClock,
    wall: int,
    monotonic: float,
    private: bool,
    reloaded: Reloaded | None = None,
) -> Document:
    """Everything there is to tell; what events contained, and PostHog's words on them, only where `private`.

    `wall` is in microseconds; `monotonic` in seconds, of the clock that the paces are told.
    """
    books = buffer.books()
    stats = buffer.stats()
    return {
        "version": __version__,
        "pid": os.getpid(),
        "uptime_seconds": round(uptime, 3),
        "state": state,
        "reload": reloaded
        and {
            "at": format_time(reloaded.at),
            "refused": bool(reloaded.error),
            "error": (reloaded.error or None) if private else None,
        },
        "sources": [_source(source, books) for source in sources],
        "buffer": {
            "kind": config.buffer.kind,
            "path": config.buffer.path if config.buffer.kind == "sqlite" else None,
            "events": stats.events,
            "bytes": stats.bytes,
            "disk_bytes": stats.disk_bytes,
            "limit_bytes": stats.limit_bytes,
            "free_bytes": stats.free_bytes,
            "filled": round(stats.filled, 3),
            "oldest_seconds": None if stats.oldest is None else max(0, wall - stats.oldest) / 1_000_000,
            "when_full": config.buffer.when_full,
            "durability": config.buffer.durability,
            "dead_letters": stats.dead_letters,
            "waiting": stats.waiting,
            "dropping": stats.dropping,
            "trouble": buffer.trouble or None,
        },
        "projects": [
            *(_project(delivery, books, monotonic, private=private) for delivery in deliveries),
            *_unconfigured(config, stats, books),
        ],
        "other": _others(deliveries, books) if has_others(config, books, deliveries) else None,
        "clock": {
            "now": format_time(wall),
            "boot": clock.boot or None,
            "steps": clock.steps,
            "last_step": clock.last_at
            and {"at": format_time(clock.last_at), "seconds": clock.last_by / 1_000_000},
        },
        "books": balance(books, stats.events),
        "rejects": _rejects(sources) if private else [],
    }


def _source(source: Source, books: Books) -> Document:
    settings = source.settings
    name = settings.name
    return {
        "name": name,
        "kind": settings.__struct_config__.tag,
        "address": source.address,
        "format": settings.format,
        "project": settings.project,
        "received": _total(books, "received", name),
        "accepted": _total(books, "accepted", name),
        "rejected": _by_reason(books, "rejected", name),
        "truncated": _total(books, "truncated", name),
        "restamped": _total(books, "restamped", name),
        "connections": source.connections,
        "turned_away": source.turned_away,
        "flag_calls": source.flag_calls,
        "http_answers": None if source.answers is None else _by_status(+Counter(source.answers)),
        "receive_buffer": source.granted,
        "dropped": _total(books, "dropped", name) if source.drops_known else None,
    }


def _project(delivery: Delivery, books: Books, monotonic: float, *, private: bool) -> Document:
    name, hold, trouble = delivery.project.name, delivery.hold, delivery.trouble
    ahead = delivery.courier.ahead
    return {
        "name": name,
        "host": delivery.project.host,
        "held": hold
        and {
            "reason": hold.reason,
            "why": hold.why if private else _status_in(hold.why),
            "since_seconds": round(monotonic - hold.since, 3),
            "next_probe_seconds": _until(hold.probe_at, monotonic),
        },
        "held_keys": [
            {
                "reason": held.reason,
                "keys": held.keys,
                "since_seconds": round(monotonic - held.since, 3),
                "next_probe_seconds": _until(held.probe_at, monotonic),
            }
            for held in delivery.keys.clients()
        ],
        "protocol": delivery.courier.protocol,
        "clock_ahead_seconds": ahead and round(ahead / 1_000_000, 1),
        "concurrency": delivery.pace.concurrency,
        "failures": delivery.pace.failures,
        "next_try_seconds": _until(delivery.pace.ready_at, monotonic) if delivery.pace.waiting else None,
        "delivered": _total(books, "delivered", name),
        "dead": _by_reason(books, "dead", name),
        "requests": _by_status(delivery.courier.statuses),
        "last_error": {"text": trouble.text, "at": format_time(trouble.at)} if trouble and private else None,
    }


def _status_in(why: str) -> str:
    """What everybody may be told of an answer: its words may be what was sent."""
    found = re.match(r"HTTP \d+", why)
    return found.group() if found else ""


def _until(moment: float, now: float) -> float:
    return max(0.0, round(moment - now, 3))


def _unconfigured(config: Config, stats: Stats, books: Books) -> list[Document]:
    """Projects that have events in the buffer, but no place in the configuration any more."""
    configured = {project.name for project in config.projects}
    why = "events wait for a project that is not configured"
    return [
        {
            "name": name,
            "host": None,
            "held": {"reason": "unconfigured", "why": why, "since_seconds": None, "next_probe_seconds": None},
            "held_keys": [],
            "protocol": None,
            "clock_ahead_seconds": None,
            "concurrency": 0,
            "failures": 0,
            "next_try_seconds": None,
            "delivered": _total(books, "delivered", name),
            "dead": _by_reason(books, "dead", name),
            "requests": {},
            "last_error": None,
        }
        for name in sorted(stats.unleased.keys() - configured)
    ]


def has_others(config: Config, books: Books, deliveries: Sequence[Delivery]) -> bool:
    """Whether there is anything to tell of events that carry another key than their project's."""
    return (
        config.any_key
        or any(delivery.courier.other_statuses for delivery in deliveries)
        or any(entry.label == OTHER for entry in books)
    )


def _others(deliveries: Sequence[Delivery], books: Books) -> Document:
    """Events with keys that clients sent, of all projects: such a key has no name to be told by."""
    requests: Counter[int] = sum((delivery.courier.other_statuses for delivery in deliveries), Counter())
    return {
        "delivered": _total(books, "delivered", OTHER),
        "dead": _by_reason(books, "dead", OTHER),
        "requests": _by_status(requests),
    }


def _by_status(statuses: Counter[int]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(statuses.items())}


def _rejects(sources: Sequence[Source]) -> list[Document]:
    """The last refusals of all sources, the newest first."""
    recent = sorted((refusal for source in sources for refusal in source.putter.recent), reverse=True)
    return [{**refusal._asdict(), "at": format_time(refusal.at)} for refusal in recent]


def balance(books: Books, buffered: int) -> Document:
    """The totals over all sources and projects, and whether both identities hold."""
    shed = _by_reason(books, "shed")
    document: Document = {
        "received": _total(books, "received"),
        "accepted": _total(books, "accepted"),
        "rejected": _total(books, "rejected"),
        "shed": shed,
        "delivered": _total(books, "delivered"),
        "dead": _total(books, "dead"),
        "replayed": _total(books, "replayed"),
        "buffered": buffered,
    }
    at_the_door = sum(shed.get(reason, 0) for reason in SHED_AT_THE_DOOR)
    later = sum(shed.values()) - at_the_door
    came_in = document["received"] == document["accepted"] + document["rejected"] + at_the_door
    went_out = document["accepted"] + document["replayed"] == (
        document["delivered"] + document["dead"] + later + buffered
    )
    return {**document, "balanced": came_in and went_out}


def _total(books: Books, joint: str, label: str | None = None) -> int:
    return sum(
        total for entry, total in books.items() if entry.joint == joint and label in (None, entry.label)
    )


def _by_reason(books: Books, joint: str, label: str | None = None) -> dict[str, int]:
    totals: dict[str, int] = {}
    for entry, total in books.items():
        if entry.joint == joint and label in (None, entry.label) and total:
            totals[entry.reason] = totals.get(entry.reason, 0) + total
    return totals
