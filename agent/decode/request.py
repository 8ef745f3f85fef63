"""What an SDK's HTTP request is, and what may come of it: events for the door, or words that refuse it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msgspec import Raw

from agent.events import Instant

TEXT, JSON = "text/plain; charset=utf-8", "application/json"


class Request(NamedTuple):
    """One request that is whole; header names are in small letters.

    `limit` is how many bytes its body may have when it is unpacked. `near` says that it came from this host
    or its private network, so that the address tells nothing of where its events happened.
    """

    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    at: Instant
    limit: int
    near: bool = False


class Refused(NamedTuple):
    """A request of which nothing is taken; the status and text are those that PostHog would answer."""

    status: int
    text: bytes
    kind: str = TEXT


class Posted(NamedTuple):
    """The events of a request, each on a line that a newline ends, in their order.

    `key` is the project's that the SDK names. `defaults` are properties for events that have none of that
    name. `uuids` has one text for each event where the answer tells them apart (v1), empty where an event
    has none. `historical` says that the SDK asks for PostHog's pipeline for old events, `beacon` that it
    wants an answer without a body.
    """

    key: str
    lines: bytes
    events: int
    defaults: Mapping[str, Raw] = {}
    uuids: Sequence[str] = ()
    historical: bool = False
    beacon: bool = False
