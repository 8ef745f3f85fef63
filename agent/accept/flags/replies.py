"""Remembers the last good replies, bounded in age and in bytes, the longest unused forgotten first.

It promises never to hold more than it may, nor to give a reply that is older. Which replies are good, and
which calls are the same, is left to `calls`. Times are seconds of one steady clock, given as arguments.
"""

from typing import NamedTuple

# As they came, in the order in which they came; names in small letters.
Headers = tuple[tuple[bytes, bytes], ...]

# What CPython takes for an entry beside its bytes (measured: 330), and for each header (170).
ENTRY_BYTES = 400
HEADER_BYTES = 180

# What a 304 repeats of the reply that it stands for (RFC 9110, 15.4.5), and what browsers need.
REPEATED = frozenset({b"etag", b"cache-control", b"vary"})
CORS = b"access-control-"


class Reply(NamedTuple):
    """An answer to a call, complete; a body is as it came, also where it is packed."""

    status: int
    headers: Headers
    body: bytes = b""

    def header(self, name: bytes) -> bytes:
        """The first header of that name; empty where there is none."""
        return next((value for header, value in self.headers if header == name), b"")


class Kept(NamedTuple):
    """A reply that is remembered, and since when it is known to be right; None where it was too large."""

    reply: Reply | None
    at: float
    size: int


class Replies:
    """The last good replies by the key of their calls; none is kept where `max_size` is 0."""

    def __init__(self, max_age: float, max_size: int) -> None:
        self._max_age = max_age
        self._max_size = max_size
        self._kept: dict[bytes, Kept] = {}  # the longest unused first
        self.size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def remember(self, key: bytes, reply: Reply | None, now: float) -> None:
        """The last good reply to this call; None of one that is too large, so that nobody hopes for it."""
        self.forget(key)
        size = ENTRY_BYTES + (
            sum(HEADER_BYTES + len(name) + len(value) for name, value in reply.headers) + len(reply.body)
            if reply is not None
            else 0
        )
        if size > self._max_size:
            return
        self._kept[key] = Kept(reply, now, size)
        self.size += size
        while self.size > self._max_size:
            self.forget(next(iter(self._kept)))

    def forget(self, key: bytes) -> None:
        """What was remembered is known to be wrong."""
        if (kept := self._kept.pop(key, None)) is not None:
            self.size -= kept.size

    def confirm(self, key: bytes, etag: bytes, now: float) -> None:
        """PostHog said that its reply is still the one with this tag: ours is new again, or out of date."""
        kept = self._kept.get(key)
        if kept is None or kept.reply is None:
            return
        if _same(kept.reply.header(b"etag"), etag):
            del self._kept[key]
            self._kept[key] = kept._replace(at=now)
        else:
            self.forget(key)

    def find(self, key: bytes, now: float) -> tuple[Reply, float] | None:
        """The reply to fall back on, and its age."""
        kept = self._kept.pop(key, None)
        if kept is None:
            return None
        if now - kept.at > self._max_age:
            self.size -= kept.size
            return None
        self._kept[key] = kept
        return (kept.reply, now - kept.at) if kept.reply is not None else None

    def lacks(self, key: bytes, now: float) -> bool:
        """Whether a reply to this call could be remembered, and none is."""
        kept = self._kept.get(key)
        return self._max_size >= ENTRY_BYTES and (kept is None or now - kept.at > self._max_age)


def conditional(reply: Reply, if_none_match: bytes) -> Reply:
    """The reply for a client that may have it already: then a 304 (RFC 9110, 13.1.2)."""
    etag = reply.header(b"etag")
    wanted = [tag.strip() for tag in if_none_match.split(b",")] if if_none_match else []
    if reply.status != 200 or not any(tag == b"*" or _same(tag, etag) for tag in wanted):
        return reply
    repeated = tuple(
        (name, value) for name, value in reply.headers if name in REPEATED or name.startswith(CORS)
    )
    return Reply(304, repeated)


def _same(one: bytes, other: bytes) -> bool:
    """Whether two tags name the same reply, weak or not (RFC 9110, 8.8.3.2); none is the same as none.

    PostHog takes them without quotation marks too (`rust/feature-flags/src/api/flag_definitions.rs`).
    """
    one, other = (tag.removeprefix(b"W/").strip(b'"') for tag in (one, other))
    return one == other != b""
