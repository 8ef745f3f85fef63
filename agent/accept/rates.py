"""How many events a source and each user may send: what is over it is refused, so the others have room."""

from collections import OrderedDict
from typing import NamedTuple

# Users whose rate is remembered; of one that is forgotten the burst is full again.
USERS = 4096


class Rate(NamedTuple):
    """Events a second, and how many at once after a silence; 0 a second is no limit."""

    per_second: float
    burst: float


class Bucket:
    """The events that may come now: they grow with time up to the burst."""

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._level = rate.burst
        self._at = now

    @property
    def burst(self) -> int:
        """How many come at once after a silence."""
        return int(self._rate.burst)

    def level(self, now: float) -> int:
        """How many may come."""
        self._level = min(self._rate.burst, self._level + max(0.0, now - self._at) * self._rate.per_second)
        self._at = now
        return int(self._level)

    def take(self, events: int) -> None:
        """So many came."""
        self._level -= events


class Rates:
    """A source's limits: one for all of it, one for each user. Whoever is not known is one user together."""

    def __init__(self, source: Rate, user: Rate, now: float) -> None:
        self._source = Bucket(source, now) if source.per_second else None
        self._user = user
        self._users: OrderedDict[int | None, Bucket] = OrderedDict()

    def admit(self, uid: int | None, events: int, now: float) -> int:
        """How many of a user's events may come now (s); they are counted as come."""
        buckets = self._buckets(uid, now)
        admitted = max(0, min([events, *(bucket.level(now) for bucket in buckets)]))
        for bucket in buckets:
            bucket.take(admitted)
        return admitted

    def admit_all(self, uid: int | None, events: int, now: float) -> bool:
        """Whether all of these events may come now (s); more than a burst come at the cost of the next."""
        buckets = self._buckets(uid, now)
        if any(bucket.level(now) < min(events, bucket.burst) for bucket in buckets):
            return False
        for bucket in buckets:
            bucket.take(events)
        return True

    def _buckets(self, uid: int | None, now: float) -> list[Bucket]:
        buckets = [self._source] if self._source else []
        return [*buckets, self._of(uid, now)] if self._user.per_second else buckets

    def _of(self, uid: int | None, now: float) -> Bucket:
        bucket = self._users.pop(uid, None) or Bucket(self._user, now)
        self._users[uid] = bucket
        if len(self._users) > USERS:
            self._users.popitem(last=False)
        return bucket
