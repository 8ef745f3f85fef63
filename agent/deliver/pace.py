"""When one project's next request may go out, and how many at once.

It promises never to come back before `Retry-After`, to send one probe and no more while it is not known
whether PostHog takes anything, and that many agents never come back in the same second. What is sent, and
what becomes of it, is left to `shipment`. Times are seconds of one steady clock, given as arguments.
"""

from collections.abc import Callable
from math import inf
from typing import Literal, NamedTuple, Protocol

from agent.deliver.verdict import Accepted, Refused, Retry, Verdict

Held = Literal["key", "billing", "host", "breaker", "rejected"]

# Draws a number between two others, each as likely (`random.uniform`).
Uniform = Callable[[float, float], float]

# About a minute: PostHog remembers an unknown key for 30 s (`rust/capture/docs/token-validation.md`), so a
# new project's key works at the first probe, and a person who mends something need not wait long.
PROBE_SECONDS = (45.0, 75.0)

# A `rejected` or `breaker` silence lasts at least `cooldown`, and up to a quarter more so that agents which
# fell silent together come back apart.
COOLDOWN_SPREAD = 1.25

# An outage as long as `backoff_max` is spread by the waits themselves: agents come back over as long a time
# as it lasted. After a longer one requests go out no more often than in quiet times (one each `linger`) for
# as long as it was longer, at most this long: then a fleet that comes back in the same half minute adds up to
# no more than it always did, however much it has to tell. The rate then doubles each time that as long again
# has passed; after 12 doublings it is no bound any more.
RAMP_SECONDS = 60.0
RAMP_DOUBLINGS = 12

# So many failures without an acceptance between are an outage; fewer happen where PostHog fails now and then.
# Of a server that fails a third of all requests, one in 80 is the fourth in a row; in a true outage each
# agent asks three times more, a second or so apart.
OUTAGE = 4

# 2 to this power is beyond any `backoff_max` (a wait of 30 million years), and a float still holds it.
MOST_DOUBLINGS = 50


class Manners(Protocol):
    """What of the `[delivery]` settings the pace is made of; durations in seconds."""

    @property
    def backoff_base(self) -> float: ...
    @property
    def backoff_max(self) -> float: ...
    @property
    def max_attempts(self) -> int: ...
    @property
    def cooldown(self) -> float: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def linger(self) -> float: ...


class Pass(NamedTuple):
    """Leave for one request, to be handed back with its verdict."""

    round: int
    probe: bool


class Ramp(NamedTuple):
    """When deliveries went on after an outage, and for how long (s) they are as rare as in quiet times."""

    begun: float
    length: float


class Hold(NamedTuple):
    """Nothing is sent until something changes: why, since when, and when the next probe may go out."""

    reason: Held
    why: str
    since: float
    probe_at: float


def silence(reason: Held, cooldown: float, uniform: Uniform) -> float:
    """How long nobody asks after a hold began, or a probe failed (s)."""
    if reason in ("rejected", "breaker"):
        return uniform(cooldown, cooldown * COOLDOWN_SPREAD)
    return uniform(*PROBE_SECONDS)


class Pace:
    """One project's state: flowing, waiting between two tries, or held.

    - *Flowing*: as many requests at once as the window allows. It grows by one when it was accepted once
      over (at every acceptance up to half of what was once too much), and only while somebody waits for room.
      A `Retry` among acceptances halves it, and only the batch that met it waits.
    - *Waiting*: after `OUTAGE` of them without an acceptance between, or one that says when to come back.
      When the wait is over one request goes out as a probe; what it brings decides for all.
    - *Held*: like waiting, but a person or PostHog has to change something. Only an acceptance ends it. Of
      what is refused for its key alone it is not told: that is for `keys`.

    After waiting or being held the window begins at 1, and the rate of requests at that of quiet times.

    **Rounds.** Eight requests that fail in the same second have met one outage, not eight. Every change of
    state begins a new round, and a verdict on a request of an earlier round is an echo: it can neither count
    as a further failure nor end a wait, since it was sent before we knew. Only its `Retry-After` and its
    `Refused` are heard.
    """

    def __init__(self, manners: Manners) -> None:
        self.hold: Hold | None = None
        self.failures = 0
        self.in_flight = 0
        self._manners = manners
        self._window = 1.0
        self._once_too_much = float(manners.concurrency)
        self._ready_at = 0.0
        self._waiting = False
        self._troubled_since = 0.0
        self._ramp: Ramp | None = None
        self._last = -inf
        self._round = 0
        self._probing = False
        self._wanted = False

    @property
    def concurrency(self) -> int:
        """How many requests may be out at once."""
        return 1 if self._doubtful else int(self._window)

    @property
    def ready_at(self) -> float:
        """Before this no request goes out."""
        return self._ready_at

    @property
    def waiting(self) -> bool:
        """Whether nothing is sent but probes, though nobody has to change anything."""
        return self._waiting and self.hold is None

    @property
    def _doubtful(self) -> bool:
        return self.hold is not None or self._waiting

    def _pause(self, now: float) -> float:
        """Seconds until the next request may begin after the last one, while the rate recovers."""
        if self._ramp is None:
            return 0.0
        beyond = now - self._ramp.begun - self._ramp.length
        spacing = self._manners.linger
        if beyond > 0:
            doublings = beyond / self._ramp.length
            if doublings >= RAMP_DOUBLINGS:
                self._ramp = None
                return 0.0
            spacing *= 0.5**doublings
        return max(0.0, self._last + spacing - now)

    def wait(self, now: float) -> float:
        """Seconds after which to ask again for a request's leave; 0 where it would be given now.

        `inf` means: when somebody's verdict was recorded. A shorter wait too can be ended by a verdict, so
        whoever waits does so for whichever comes first.
        """
        if now < self._ready_at:
            return self._ready_at - now
        if self._doubtful:
            return inf if self._probing else 0.0
        self._wanted = self._wanted or self.in_flight >= int(self._window)
        return inf if self.in_flight >= int(self._window) else self._pause(now)

    def admit(self, now: float) -> Pass | float:
        """Leave for one request, or the seconds of `wait`."""
        if (wait := self.wait(now)) > 0:
            return wait
        self.in_flight += 1
        self._last = now
        self._probing = self._doubtful
        return Pass(self._round, self._doubtful)

    def record(self, leave: Pass, verdict: Verdict | None, now: float, uniform: Uniform) -> float:
        """The verdict on an admitted request; None: it was given up without one.

        Gives the seconds that the asker should let pass before it asks about the same batch again.
        """
        self.in_flight -= 1
        echo = leave.round != self._round
        if leave.probe and not echo:
            self._probing = False
        match verdict:
            case Accepted() if not echo:
                self._flow(now)
            case Accepted() if not self._doubtful:
                self.failures = 0  # PostHog takes something, whatever else was refused meanwhile
            case Retry(after=after, reason=reason) if not echo:
                return self._fail(after or 0.0, reason, now, uniform)
            case Retry(after=after):
                if after:
                    self._be_troubled(now)
                    self._waiting = True
                    self._ready_at = max(self._ready_at, now + after)
                    self.hold = self.hold and self.hold._replace(probe_at=self._ready_at)
                return self._backoff(uniform)
            case Refused(hold=reason, why=why) if not echo or self.hold is None:
                self._hold(reason, why, now, now + self._silence(reason, uniform))
        return 0.0

    def ease(self, since: float, now: float) -> None:
        """Events that were held for their key since then go out again: gently, as after an outage."""
        self._once_too_much = max(1.0, self._window / 2)
        self._window = 1.0
        self._recover(since, now)

    def _recover(self, since: float, now: float) -> None:
        beyond = now - since - self._manners.backoff_max
        self._ramp = Ramp(now, min(beyond, RAMP_SECONDS)) if beyond > 0 else None

    def _silence(self, reason: Held, uniform: Uniform) -> float:
        return silence(reason, self._manners.cooldown, uniform)

    def _hold(self, reason: Held, why: str, now: float, probe_at: float) -> None:
        if self.hold is None:
            self._once_too_much = max(1.0, self._window / 2)
            self._window = 1.0
            self._be_troubled(now)
        since = self.hold.since if self.hold is not None and self.hold.reason == reason else now
        self._ready_at = max(self._ready_at, probe_at)
        self.hold = Hold(reason, why, since, self._ready_at)
        self._turn()

    def _be_troubled(self, now: float) -> None:
        """Remember when it began, also where one trouble followed another."""
        if not self._doubtful:
            self._troubled_since = now

    def _flow(self, now: float) -> None:
        """An acceptance: what was in doubt is over, and the window grows if somebody waits for room."""
        if self._doubtful:
            self._recover(self._troubled_since, now)
            self.hold, self._waiting = None, False
            self._turn()
        self.failures = 0
        if self._wanted:
            before = int(self._window)
            step = 1.0 if self._window < self._once_too_much else 1.0 / self._window
            self._window = min(self._window + step, float(self._manners.concurrency))
            self._wanted = int(self._window) == before

    def _backoff(self, uniform: Uniform) -> float:
        manners = self._manners
        longest = min(manners.backoff_max, manners.backoff_base * 2.0 ** min(self.failures, MOST_DOUBLINGS))
        return uniform(min(manners.backoff_base / 4, longest), longest)

    def _fail(self, after: float, reason: str, now: float, uniform: Uniform) -> float:
        """One step further back; during a hold the hold stays, since nothing was learnt about its reason.

        The drawn wait comes on top of `Retry-After`, or all who were told the same second would keep it.
        """
        self.failures += 1
        wait = after + self._backoff(uniform)
        if self.hold is not None:
            wait = max(wait, self._silence(self.hold.reason, uniform))
            self._hold(self.hold.reason, self.hold.why, now, now + wait)
        elif 0 < self._manners.max_attempts <= self.failures:
            self._hold("breaker", reason, now, now + max(wait, self._silence("breaker", uniform)))
        else:
            if after or self.failures >= OUTAGE:
                self._be_troubled(now)
                self._waiting = True
                self._ready_at = now + wait
            self._window = self._once_too_much = max(1.0, self._window / 2)
            self._turn()
        return wait

    def _turn(self) -> None:
        """Begin a new round: whoever is still out belongs to an earlier one."""
        self._round += 1
        self._probing = self._wanted = False
