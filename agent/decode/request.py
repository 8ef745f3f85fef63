"""What an SDK's HTTP request is, what it may hold for the door, and what a client may be told."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from agent.decode.shards import MOST_BRACKETS
from agent.events import Instant, Reason

TEXT, JSON = "text/plain; charset=utf-8", "application/json"


class Request(NamedTuple):
    """One request that is whole; header names are in small letters.

    `limit` is how many bytes its body may have when it is unpacked, `brackets` how many of those where each
    has to be looked at. `near` says that it came from this host or its private network, so that the address
    tells nothing of where its events happened.
    """

    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    at: Instant
    limit: int
    near: bool = False
    brackets: int = MOST_BRACKETS


class Answer(NamedTuple):
    """What a client is told; `again` that it should come again soon.

    Where a request is refused as a whole for what it holds, `events` says how many events the books lose with
    it, as far as is known, and `reason` why.
    """

    status: int
    text: bytes = b""
    kind: str = TEXT
    again: bool = False
    reason: Reason = "malformed_json"
    events: int = 0


# What can keep a request's events from being taken, beside what is in it.
Trouble = Literal["too_large", "stalled", "busy", "unknown_key", "rate_limited"]

# Why the door may refuse events that nobody need mend: the configuration wants it.
WANTED = {"filtered", "sampled", "forbidden"}


class Posted(NamedTuple):
    """The events of a request, each on a line that a newline ends, in their order.

    `key` is the project's that the SDK names. `defaults` are properties for events that have none of that
    name. `uuids` has one text for each event where the answer tells them apart (v1), empty where an event
    has none. `historical` says that the SDK asks for PostHog's pipeline for old events, `beacon` that it
    wants an answer without a body, `placed` that each event says itself whether its place may be looked up.
    """

    key: str
    lines: bytes
    events: int
    defaults: Mapping[str, str] = {}
    uuids: Sequence[str] = ()
    historical: bool = False
    beacon: bool = False
    placed: bool = False
