"""The settlement protocol as pure functions: from a state of a buffer to every state that can come next.

A buffer is what lies on its disk and what its process knows. A call is a list of writes in one transaction.
A kill may come before any of them, after the commit, and between two calls; it leaves what is on the disk. It
is small enough for every state there is to be looked at.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

# Events are numbers; so are rows (of chunks) and letters (of dead events), by their ids.
Events = tuple[int, ...]


class Scope(NamedTuple):
    """How much happens: chunks that are put, one after the other, leases at a time, and replays in all."""

    chunks: tuple[Events, ...]
    leases: int
    replays: int


class Rules(NamedTuple):
    """How the protocol may be wrong, so that tests can see that it would be found.

    `commits` are writes after which there is a commit too many, as (call, write).
    """

    commits: frozenset[tuple[str, str]] = frozenset()
    acknowledges_first: bool = False  # a put returns before its commit
    shares: bool = False  # a take leaves what it gave for the next one
    reuses: bool = False  # a letter gets the id after those that are there


RIGHT = Rules()


class Disk(NamedTuple):
    """What a kill leaves: rows and letters by their ids, the last id of each, and the books."""

    rows: tuple[tuple[int, Events], ...] = ()
    letters: tuple[tuple[int, int], ...] = ()
    last_row: int = 0
    last_letter: int = 0
    accepted: Events = ()
    delivered: Events = ()
    purged: Events = ()
    dead: int = 0
    replayed: int = 0


class State(NamedTuple):
    """A disk, the rows that wait (the next one first), those on lease, and the events that we answer for."""

    disk: Disk = Disk()
    line: tuple[int, ...] = ()
    leased: tuple[int, ...] = ()
    owed: Events = ()


class Step(NamedTuple):
    """A call and what it is given; killed before this write of it, where it was."""

    call: str
    given: tuple[object, ...] = ()
    killed: str = ""


Write = Callable[[Disk], Disk]


class Call(NamedTuple):
    """One call: its writes by name, and what the process knows once they are committed."""

    step: Step
    writes: tuple[tuple[str, Write], ...]
    known: Callable[[Disk], State]


KILL = Step("kill")


def successors(state: State, scope: Scope, rules: Rules = RIGHT) -> Iterator[tuple[Step, State]]:
    """Each step that can be made now, and where it leads."""
    yield KILL, reborn(state.disk, state.owed)
    for step, writes, known in calls(state, scope, rules):
        owed = known(state.disk).owed if rules.acknowledges_first else state.owed
        disk = kept = state.disk
        kills = []
        for name, write in writes:
            kills.append((step._replace(killed=name), reborn(kept, owed)))
            disk = write(disk)
            if (step.call, name.split()[0]) in rules.commits:
                kept = disk
        yield step, known(disk)
        yield from kills
        if writes:
            yield step._replace(killed="commit"), reborn(kept, owed)
            yield step._replace(killed="answer"), reborn(disk, owed)


def reborn(disk: Disk, owed: Events) -> State:
    """The next process: nothing is on lease, and all rows wait in their order."""
    return State(disk, tuple(ident for ident, _ in disk.rows), (), owed)


def calls(state: State, scope: Scope, rules: Rules = RIGHT) -> Iterator[Call]:
    """Every call that somebody may make now."""
    for events in scope.chunks:
        if events[0] not in state.disk.accepted:
            yield put(state, events)
            break
    if state.line and len(state.leased) < scope.leases:
        yield take(state, rules)
    for ident in dict.fromkeys(state.leased):
        yield release(state, ident)
        events = dict(state.disk.rows).get(ident, ())
        for fates in product(("dead", "delivered", "kept"), repeat=len(events)):
            if set(fates) != {"kept"}:
                yield settle(state, ident, dict(zip(events, fates, strict=True)), rules)
    for ident, event in state.disk.letters:
        if state.disk.replayed < scope.replays:
            yield replay(state, ident, event)
        yield purge(state, ident, event)


def put(state: State, events: Events) -> Call:
    """Own a chunk; when it has returned, its events are owed."""
    return Call(
        Step("put", (events,)),
        (
            ("insert", lambda disk: _insert(disk, events)),
            ("enter", lambda disk: disk._replace(accepted=(*disk.accepted, *events))),
        ),
        lambda disk: State(disk, (*state.line, disk.last_row), state.leased, (*state.owed, *events)),
    )


def take(state: State, rules: Rules) -> Call:
    """Lease the first row of the line; that writes nothing."""
    first, *others = state.line
    line = state.line if rules.shares else tuple(others)
    leased = tuple(sorted((*state.leased, first)))
    return Call(Step("take", (first,)), (), lambda disk: State(disk, line, leased, state.owed))


def release(state: State, ident: int) -> Call:
    """Give a lease back, to the end of the line."""
    known = State(state.disk, (*state.line, ident), _without(state.leased, ident), state.owed)
    return Call(Step("release", (ident,)), (), lambda _disk: known)


def settle(state: State, ident: int, fates: dict[int, str], rules: Rules) -> Call:
    """Forget a row, bury its dead; what is kept of it stays where it is, and waits at the line's end."""
    kept = tuple(event for event, fate in fates.items() if fate == "kept")
    dead = tuple(event for event, fate in fates.items() if fate == "dead")
    delivered = tuple(event for event, fate in fates.items() if fate == "delivered")

    def keep(disk: Disk) -> Disk:
        rows = tuple((row, kept if row == ident else events) for row, events in disk.rows)
        return disk._replace(rows=tuple((row, events) for row, events in rows if events))

    def enter(disk: Disk) -> Disk:
        given = tuple(sorted((*disk.delivered, *delivered)))
        return disk._replace(delivered=given, dead=disk.dead + len(dead))

    again = (ident,) if kept else ()
    return Call(
        Step("settle", (ident, tuple(fates.items()))),
        (
            ("keep" if kept else "forget", keep),
            *((f"bury {event}", partial(_bury, event, rules)) for event in dead),
            ("enter", enter),
        ),
        lambda disk: State(disk, (*state.line, *again), _without(state.leased, ident), state.owed),
    )


def replay(state: State, letter: int, event: int) -> Call:
    """A letter becomes a chunk again, at the end of the line."""
    return Call(
        Step("replay", (letter,)),
        (
            ("unbury", lambda disk: _unbury(disk, letter)),
            ("insert", lambda disk: _insert(disk, (event,))),
            ("enter", lambda disk: disk._replace(replayed=disk.replayed + 1)),
        ),
        lambda disk: State(disk, (*state.line, disk.last_row), state.leased, state.owed),
    )


def purge(state: State, letter: int, event: int) -> Call:
    """A person has a letter forgotten."""
    return Call(
        Step("purge", (letter,)),
        (
            ("unbury", lambda disk: _unbury(disk, letter)),
            ("enter", lambda disk: disk._replace(purged=tuple(sorted((*disk.purged, event))))),
        ),
        lambda disk: state._replace(disk=disk),
    )


def _insert(disk: Disk, events: Events) -> Disk:
    ident = disk.last_row + 1
    return disk._replace(rows=(*disk.rows, (ident, events)), last_row=ident)


def _bury(event: int, rules: Rules, disk: Disk) -> Disk:
    last = max((letter for letter, _ in disk.letters), default=0) if rules.reuses else disk.last_letter
    letters = (*disk.letters, (last + 1, event))
    return disk._replace(letters=letters, last_letter=max(disk.last_letter, last + 1))


def _unbury(disk: Disk, ident: int) -> Disk:
    return disk._replace(letters=tuple(letter for letter in disk.letters if letter[0] != ident))


def _without(idents: tuple[int, ...], ident: int) -> tuple[int, ...]:
    place = idents.index(ident)
    return idents[:place] + idents[place + 1 :]


# --- what is promised ----------------------------------------------------------------------------------


def broken(state: State) -> str:
    """Which promise does not hold here; empty where each does."""
    disk = state.disk
    places = Counter(event for _, events in disk.rows for event in events)
    places.update(event for _, event in disk.letters)
    places.update((*disk.delivered, *disk.purged))
    for event in {*disk.accepted, *state.owed}:
        if places[event] != 1:
            return f"event {event} is in {places[event]} places"
    if places.keys() - set(disk.accepted):
        return "an event is there that was not accepted"
    buffered = sum(len(events) for _, events in disk.rows)
    if len(disk.accepted) + disk.replayed != len(disk.delivered) + disk.dead + buffered:
        return "accepted + replayed is not delivered + dead + buffered"
    if len(disk.letters) != disk.dead - disk.replayed - len(disk.purged):
        return "the letters are not those of the books"
    if sorted((*state.line, *state.leased)) != [ident for ident, _ in disk.rows]:
        return "a row is not exactly once in the line or on lease"
    return ""


def reused(before: Disk, after: Disk) -> bool:
    """Whether something new has the id of something that was."""
    return any(
        ident <= last
        for old, new, last in (
            (before.rows, after.rows, before.last_row),
            (before.letters, after.letters, before.last_letter),
        )
        for ident in dict(new).keys() - dict(old).keys()
    )


# --- looking at everything -----------------------------------------------------------------------------

Graph = dict[State, list[tuple[Step, State]]]


class Found(NamedTuple):
    """Every state with its steps, and where a promise is broken the shortest way there."""

    graph: Graph
    broken: str
    trace: list[Step]

    @property
    def edges(self) -> int:
        """How many steps were looked at."""
        return sum(map(len, self.graph.values()))


def explore(scope: Scope, rules: Rules = RIGHT) -> Found:
    """Breadth first, until a promise is broken or there is no state left."""
    graph: Graph = {}
    came: dict[State, tuple[Step, State] | None] = {State(): None}
    ahead = deque(came)
    while ahead:
        state = ahead.popleft()
        graph[state] = list(successors(state, scope, rules))
        for step, after in graph[state]:
            why = "an id was used again" if reused(state.disk, after.disk) else ""
            if after not in came:
                why = why or broken(after)
                came[after] = (step, state)
                ahead.append(after)
            if why:
                return Found(graph, why, [*way(came, state), step])
    return Found(graph, "", [])


def way(came: dict[State, tuple[Step, State] | None], state: State) -> list[Step]:
    """The steps from the beginning to a state."""
    steps = []
    while (last := came[state]) is not None:
        step, state = last
        steps.append(step)
    return steps[::-1]
