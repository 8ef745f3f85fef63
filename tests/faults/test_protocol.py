"""Every state that the settlement protocol can come to keeps its promises, and the store takes each step so.

The long form (`-m slow`) explores a larger scope, and makes every step of the default one with the store.
"""

import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

import msgspec
import pytest
from ledger import event, number_of, numbers_in, packed
from protocol import KILL, Call, Graph, Rules, Scope, State, Step, calls, explore, reborn, way
from test_buffer_contract import tally

from agent import config
from agent.buffer import NOBODY, DeadEvent, Lease, Limits, Replayed
from agent.buffer.rows import Deposit, Settlement, Taking
from agent.buffer.store import Store
from agent.events import Chunk

SMALL = (Scope(((0, 1),), leases=1, replays=1), Scope(((0,), (1,)), leases=2, replays=0))
MIDDLE = Scope(((0, 1), (2,)), leases=2, replays=1)
LARGE = Scope(((0, 1), (2,)), leases=2, replays=2)

Told = Callable[[str, object], None]


# --- the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [MIDDLE, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_every_state_keeps_the_promises(scope: Scope, record_property: Told) -> None:
    """Whatever is called and wherever it is killed: there is no state in which an event is lost, or twice."""
    found = explore(scope)
    assert not found.broken, found.trace
    assert len(found.graph) > 3000
    record_property("told", f"{len(found.graph):,} states, {found.edges:,} steps: every one there is")


WRONG = {
    "settle forgets, commits, and buries": (Rules(commits=frozenset({("settle", "forget")})), 3),
    "settle buries, commits, and enters": (Rules(commits=frozenset({("settle", "bury")})), 3),
    "replay takes out, commits, and inserts": (Rules(commits=frozenset({("replay", "unbury")})), 4),
    "put inserts, commits, and enters": (Rules(commits=frozenset({("put", "insert")})), 1),
    "put acknowledges before it commits": (Rules(acknowledges_first=True), 1),
    "take gives what somebody has": (Rules(shares=True), 2),
    "a letter's id comes again": (Rules(reuses=True), 6),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_protocol_is_found(wrong: str, record_property: Told) -> None:
    """One rule that is broken leads to a state that says so, and the shortest way there is told."""
    rules, steps = WRONG[wrong]
    found = explore(MIDDLE, rules)
    assert found.broken
    assert len(found.trace) == steps
    record_property("told", f"{found.broken}: {', then '.join(map(told, found.trace))}")


def told(step: Step) -> str:
    """A step as it is read."""
    given = " ".join(map(str, step.given))
    return f"{step.call} {given}".strip() + (f" killed before its {step.killed}" if step.killed else "")


# --- the store -----------------------------------------------------------------------------------------

WRITES = {
    "INSERT INTO chunk": "insert",
    "DELETE FROM chunk": "forget",
    "UPDATE chunk": "keep",
    "INSERT INTO dead": "bury",
    "DELETE FROM dead": "unbury",
    "INSERT INTO books": "enter",
    "COMMIT": "commit",
}
FILES = ("buffer.db", "buffer.db-wal")
Image = tuple[bytes, ...]


class Process:
    """A store on files of its own, which takes the model's steps."""

    def __init__(self, root: Path, image: Image = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=root))
        for name, data in zip(FILES, image, strict=False):
            (self.folder / name).write_bytes(data)
        path = str(self.folder / FILES[0])
        self.store = Store(config.Buffer(path=path, max_size=16 * 2**20, durability="normal"))
        self.leases: dict[int, Lease] = {}

    def end(self) -> None:
        """Its files are nobody's any more."""
        self.store.close()
        shutil.rmtree(self.folder)

    def image(self) -> Image:
        """The files as they are now, which is what a kill leaves."""
        return tuple(path.read_bytes() for name in FILES if (path := self.folder / name).exists())

    def make(self, call: Call) -> list[tuple[str, Image]]:
        """Make a call; each write and commit of it, with the files before that."""
        seen: list[tuple[str, Image]] = []

        def look(statement: str) -> None:
            for begin, name in WRITES.items():
                if statement.startswith(begin):
                    seen.append((name, self.image()))

        self.store._connection.set_trace_callback(look)
        getattr(self, f"_{call.step.call}")(*call.step.given)
        self.store._connection.set_trace_callback(None)
        return seen

    def _put(self, numbers: Sequence[int]) -> None:
        fields = {"project": "default", "received_at": 1, "boot": "b", "monotonic": numbers[0]}
        one = msgspec.convert({**fields, **packed(numbers, 0)}, Chunk)
        self.store.commit((), [Deposit([one], tally(len(numbers)))], closing=False, room=True)

    def _take(self, ident: int) -> None:
        taking = Taking(Limits(1, 1), "default", NOBODY)
        self.store.take(taking)
        assert taking.lease is not None
        assert taking.lease.ids == (ident,)
        self.leases[ident] = taking.lease

    def _release(self, ident: int) -> None:
        self.store.release(self.leases.pop(ident))

    def _settle(self, ident: int, fates: Sequence[tuple[int, str]]) -> None:
        lease = self.leases.pop(ident)
        (one,) = lease.chunks
        dead = [
            DeadEvent(
                project="default", event=event(number, 0), reason="rejected", detail="no", at=1,
                received_at=1, boot=one.boot, monotonic=one.monotonic, burials=one.burials,
            )
            for number, fate in fates
            if fate == "dead"
        ]  # fmt: skip
        kept = [number for number, fate in fates if fate == "kept"]
        rest = [msgspec.structs.replace(one, **packed(kept, 0))] if kept else []
        self.store.commit([Settlement(lease, dead, rest, 0, 0)], (), closing=False, room=True)

    def _replay(self, letter: int) -> None:
        assert self.store.replay([letter]) == Replayed(1, full=False)

    def _purge(self, letter: int) -> None:
        assert self.store.purge([letter]) == 1

    def shown(self) -> tuple[object, ...]:
        """What it has, as `shown` tells it of the model."""
        store = self.store
        books: Counter[str] = Counter()
        for entry, total in store.books.items():
            books[entry.joint] += total
        ids = dict(store._connection.execute("SELECT name, seq FROM sqlite_sequence"))
        return (
            [(ident, numbers_in(one, 0)) for ident, one in store.copies.beyond(0, 2**60, 2**60)],
            [(letter.id, number_of(letter.event, 0)) for letter in store.letters.beyond(0, 10**6)],
            (ids.get("chunk", 0), ids.get("dead", 0)),
            [books[joint] for joint in ("accepted", "delivered", "purged", "dead", "replayed")],
            (store.events, store.letters.count, store.lanes.waiting),
            sorted(self.leases),
        )


def shown(state: State) -> tuple[object, ...]:
    """What a store shows that is in this state."""
    disk = state.disk
    sizes = {ident: len(events) for ident, events in disk.rows}
    waiting = sum(sizes[ident] for ident in state.line)
    return (
        list(disk.rows),
        list(disk.letters),
        (disk.last_row, disk.last_letter),
        [len(disk.accepted), len(disk.delivered), len(disk.purged), disk.dead, disk.replayed],
        (sum(sizes.values()), len(disk.letters), {"default": waiting} if waiting else {}),
        list(state.leased),
    )


class Tour:
    """Takes a store along every call of a graph, and looks at what each kill of it would leave."""

    def __init__(self, scope: Scope, root: Path) -> None:
        self._root = root
        self._ways = _unbroken(explore(scope).graph)
        self._calls = {state: {call.step: call for call in calls(state, scope)} for state in self._ways}
        self._todo = {state: list(steps) for state, steps in self._ways.items()}
        self._images: dict[Image, tuple[object, ...]] = {}
        first = Process(root)
        first.store.close()
        self._empty = first.image()
        self.calls = self.kills = 0

    def go(self) -> None:
        """All of it: each time the shortest way to what was not made, from the start where none leads on."""
        self._state, self._process = State(), Process(self._root, self._empty)
        while any(self._todo.values()):
            steps = self._nearest()
            if steps is None:
                self._process.end()
                self._state, self._process = State(), Process(self._root, self._empty)
                continue
            for step in steps:
                self._make(step)
            self._check(self._todo[self._state].pop())
        self._process.end()

    def _nearest(self) -> list[Step] | None:
        came: dict[State, tuple[Step, State] | None] = {self._state: None}
        ahead = deque(came)
        while ahead:
            state = ahead.popleft()
            if self._todo[state]:
                return way(came, state)
            for step, after in self._ways[state].items():
                if after not in came:
                    came[after] = (step, state)
                    ahead.append(after)
        return None

    def _make(self, step: Step) -> list[tuple[str, Image]]:
        """A step of the store and of the model, which then are in the same state."""
        seen: list[tuple[str, Image]] = []
        if step == KILL:
            image = self._process.image()
            self._process.end()
            self._process = Process(self._root, image)
        else:
            seen = self._process.make(self._calls[self._state][step])
        self._state = self._ways[self._state][step]
        assert self._process.shown() == shown(self._state), step
        return seen

    def _check(self, step: Step) -> None:
        """A step that was not made yet: its writes are the model's, and so is what each kill leaves."""
        before = self._state
        seen = self._make(step)
        self.calls += 1
        if not seen:
            return
        writes = [name.split()[0] for name, _ in self._calls[before][step].writes]
        assert _once(name for name, _ in seen) == _once([*writes, "commit"]), step
        for _, image in seen:
            self._left(image, before)
        self._left(self._process.image(), self._state)

    def _left(self, image: Image, state: State) -> None:
        """A process that begins on these files is in the state that the model says."""
        self.kills += 1
        if image not in self._images:
            process = Process(self._root, image)
            self._images = {image: process.shown()}  # the next ones are mostly the same
            process.end()
        assert self._images[image] == shown(reborn(state.disk, state.owed))


def _unbroken(graph: Graph) -> dict[State, dict[Step, State]]:
    """What can be reached by calls that return, and by kills between them."""
    ways: dict[State, dict[Step, State]] = {}
    ahead = [State()]
    while ahead:
        state = ahead.pop()
        if state not in ways:
            ways[state] = {step: after for step, after in graph[state] if not step.killed}
            ahead += ways[state].values()
    return ways


def _once(names: Iterable[str]) -> list[str]:
    """Of each run of equal ones the first: a call may write many rows in a row."""
    return [name for name, _ in groupby(names)]


@pytest.mark.parametrize(
    "scope", [*SMALL, pytest.param(MIDDLE, marks=pytest.mark.slow)], ids=["a chunk", "two leases", "both"]
)
def test_the_store_is_what_the_model_says(scope: Scope, folder: Path, record_property: Told) -> None:
    """Every call in every state writes what it should, at once, and a kill leaves what it should."""
    tour = Tour(scope, folder)
    tour.go()
    record_property("told", f"{tour.calls:,} calls made, {tour.kills:,} kills within them looked at")
