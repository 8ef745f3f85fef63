"""Which keys' events are held, why and until when: a wrong key stops its own events, and nobody else's.

It promises that a held key is asked about one lease at a time, at most about once a minute, and that
neither memory nor requests grow with the number of keys that clients make up. Times are seconds of one steady
clock, given as arguments. No text of it ever holds a key.
"""

from collections.abc import Container, Iterator
from collections.abc import Set as AbstractSet
from math import inf
from typing import NamedTuple

from agent.buffer import NOBODY
from agent.deliver.pace import Held, Hold, Uniform, silence

# The project's own is None.
Key = str | None

# Half as many as the buffer has lanes, so that there is always one for a key that may work; one takes 0.4 KB.
MOST_HELD = 1024
# Keys that worked last; as many as the buffer has lanes.
MOST_WORKED = 2048

# So many shipments in a row may find no witness while the key works: two of each worker by default, as all of
# them may be busy with one program's bad events.
MOST_MISSED = 16

# Clients' keys that do not work take turns: a probe each so many seconds asks 200 of them in a minute.
PROBE_SPACING = 0.25
# And one at a time, or they would fill the way where answers are slow. One that takes longer than this, as
# its batch has to be tried again, holds up no other.
PROBE_LONGEST = 10.0


class HeldKeys(NamedTuple):
    """How many keys that clients sent are held for one reason, since when, and when the next one is asked."""

    reason: Held
    keys: int
    since: float
    probe_at: float


class _Held:
    """One held key; `asked` while a probe is out, `unwitnessed` counts shipments that found no witness."""

    __slots__ = ("asked", "hold", "unwitnessed")

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.asked = False
        self.unwitnessed = 0


class _AllBut(Container[Key]):
    """All clients' keys but the open ones, and these."""

    def __init__(self, shut: AbstractSet[Key], open_: AbstractSet[Key]) -> None:
        self._shut = shut
        self._open = open_

    def __contains__(self, key: object) -> bool:
        return key in self._shut or (key is not None and key not in self._open)


class Early(Container[Key]):
    """The keys of which nothing is to be leased now: those that are closed, and those that are not due."""

    def __init__(self, due: Container[Key], closed: Container[Key]) -> None:
        self._due = due
        self._closed = closed

    def __contains__(self, key: object) -> bool:
        return key not in self._due or key in self._closed


class Keys:
    """The keys of one project's events: its own, and those that clients sent.

    What PostHog refuses for its key (`key`, `billing`), or a shipment gives up for want of a witness
    (`rejected`), says nothing of other keys, so it holds only this one's events. When its time is over one
    lease of them goes out as a probe, and only the probe's acceptance ends the hold: whatever else comes back
    was sent before.

    **Many.** The clients' keys that are due take turns, one probe at a time and one in `PROBE_SPACING`, so
    that what cannot be delivered takes few requests from what can. A new key is asked at once.

    **Too many.** While `MOST_HELD` clients' keys are held, only keys that worked lately are asked at once,
    beside the project's own. Any other takes turns with those that are due. So keys that do not work cost
    `MOST_HELD` requests and then one each `PROBE_SPACING`, however many there are, and no key that works
    waits for them.
    """

    def __init__(self, cooldown: float) -> None:
        self._cooldown = cooldown
        self._held: dict[Key, _Held] = {}
        self._worked: dict[Key, float] = {}  # when last
        self._missed: dict[Key, int] = {}  # so many shipments found no witness since
        self._probed_at = self._next_turn = -inf  # of clients' keys

    @property
    def own(self) -> Hold | None:
        """Why the events of the project's own key are held."""
        return self._held[None].hold if None in self._held else None

    @property
    def reasons(self) -> list[Held]:
        """Why any keys that clients sent are held."""
        return sorted({hold.reason for hold in self._clients()})

    def clients(self) -> list[HeldKeys]:
        """The held keys that clients sent, by reason."""
        found: dict[Held, HeldKeys] = {}
        for hold in self._clients():
            one = HeldKeys(hold.reason, 1, hold.since, hold.probe_at)
            if (so_far := found.get(hold.reason)) is not None:
                since, probe_at = min(so_far.since, one.since), min(so_far.probe_at, one.probe_at)
                one = HeldKeys(hold.reason, so_far.keys + 1, since, probe_at)
            found[hold.reason] = one
        return sorted(found.values())

    def _clients(self) -> Iterator[Hold]:
        return (held.hold for key, held in self._held.items() if key is not None)

    def is_held(self, key: Key) -> bool:
        """Whether nothing of this key goes out but probes."""
        return key in self._held

    def closed(self, now: float) -> Container[Key]:
        """The keys of which nothing may be leased now."""
        if not self._held:
            return NOBODY
        wait = now < self._next_turn
        shut = frozenset(
            key
            for key, held in self._held.items()
            if held.asked or held.hold.probe_at > now or (wait and key is not None)
        )
        if len(shut) - (None in shut) < MOST_HELD:
            return shut
        return _AllBut(shut, frozenset(self._worked))

    def next_probe(self, now: float) -> float:
        """Seconds until fewer keys are closed than now, if nothing else happens."""
        later = (at - now for at in map(self._due_at, self._held) if at > now)
        return min(later, default=inf)

    def _due_at(self, key: Key) -> float:
        """When a held key may be probed."""
        return max(self._held[key].hold.probe_at, -inf if key is None else self._next_turn)

    def unwitnessed(self, key: Key) -> int:
        """How many shipments of a key found no witness, one after the other."""
        return self._held[key].unwitnessed if key in self._held else 0

    def need_company(self, now: float) -> bool:
        """Whether a key may be leased whose last shipment found no witness."""
        return any(key not in self._held for key in self._missed) or any(
            held.unwitnessed and not held.asked and self._due_at(key) <= now
            for key, held in self._held.items()
        )

    def ask(self, key: Key, now: float) -> bool:
        """Events of a key were leased: whether they may go out as a probe, which ends with `done`."""
        held = self._held.get(key)
        if held is None:
            if self._is_full and key is not None and key not in self._worked:
                self._next_turn = now + PROBE_SPACING
            return False
        if held.asked or self._due_at(key) > now:
            return False
        held.asked = True
        if key is not None:
            self._probed_at, self._next_turn = now, now + PROBE_LONGEST
        return True

    def done(self, key: Key) -> None:
        """A probe is over. Where it brought nothing the next may follow in its turn."""
        if key in self._held:
            self._held[key].asked = False
        if key is not None:
            self._next_turn = self._probed_at + PROBE_SPACING

    def accept(self, key: Key, now: float, *, probe: bool) -> bool:
        """Events of a key were taken: whether fewer keys are closed now."""
        news = key in self._held
        if news:
            if not probe:
                return False
            del self._held[key]
        news = news or (key is not None and key not in self._worked)
        self._forget(key)
        self._worked[key] = now
        if len(self._worked) > MOST_WORKED:
            self._forget(next(iter(self._worked)))
        return news

    def miss(self, key: Key, now: float) -> bool:
        """A shipment found no witness: whether that is a reason to hold its key.

        Not where the key has just worked, and the events of one program may all be bad: others do not wait.
        """
        if now - self._worked.get(key, -inf) > self._cooldown:
            return True
        self._missed[key] = self._missed.get(key, 0) + 1
        return self._missed[key] >= MOST_MISSED

    def hold(self, key: Key, reason: Held, why: str, now: float, uniform: Uniform) -> None:
        """Hold a key's events, or go on holding them; a reason that stays keeps its `since`.

        `why` is kept of the project's own only: what is said of another key may name it.
        """
        held = self._held.get(key)
        probe_at = now + silence(reason, self._cooldown, uniform)
        if held is None:
            self._make_place(key)
            held = self._held[key] = _Held(Hold(reason, "", now, now))
        since = held.hold.since if held.hold.reason == reason else now
        held.hold = Hold(reason, why if key is None else "", since, max(probe_at, held.hold.probe_at))
        held.unwitnessed += reason == "rejected"

    def _make_place(self, key: Key) -> None:
        """A key that did not work is forgotten as one that did, and the one that is due first as held."""
        if key is None:
            return
        self._forget(key)
        if self._is_full:
            first = min((key for key in self._held if key is not None), key=self._probe_at)
            del self._held[first]

    def _forget(self, key: Key) -> None:
        """That it worked, and what became of it since."""
        self._worked.pop(key, None)
        self._missed.pop(key, None)

    @property
    def _is_full(self) -> bool:
        return len(self._held) - (None in self._held) >= MOST_HELD

    def _probe_at(self, key: Key) -> float:
        return self._held[key].hold.probe_at
