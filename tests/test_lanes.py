"""`agent.buffer.lanes`: turns that are fair, counts that are exact, and memory that keys do not fill."""

from collections.abc import Container

from hypothesis import given
from hypothesis import strategies as st

from agent.buffer.lanes import Lane, Lanes, Stranger

MOST = 4


class Chunks:
    """What a buffer has, as it is; its lanes are told of each change."""

    def __init__(self) -> None:
        self.lanes = Lanes(MOST)
        self.waiting: dict[int, Lane] = {}
        self.leases: list[tuple[Lane, list[int]]] = []
        self.shown: dict[Lane, int] = {}
        self._last = 0
        self._place = ""

    def put(self, key: str | None) -> None:
        self._last += 1
        self.waiting[self._last] = ("p", key)
        self.lanes.add(("p", key), 1, self._last, 10)
        self.show()

    def take(self, most: int, without: Container[str | None] = ()) -> Lane | None:
        """Lease up to `most` chunks of the lane whose turn it is."""
        for lane, queue in self.lanes.turns("p", without):
            fresh = [ident for ident, of in self.waiting.items() if of == lane and ident > queue.cursor]
            ids = (queue.offer(most) + sorted(fresh) or queue.offer_all(most))[:most]
            assert ids
            assert all(self.waiting.pop(ident) == lane for ident in ids)
            self.lanes.lease(lane, ids, 10 * len(ids))
            self.leases.append((lane, ids))
            self.show()
            return lane
        return None

    def give_back(self, which: int) -> None:
        lane, ids = self.leases.pop(which)
        self.waiting.update(dict.fromkeys(ids, lane))
        self.lanes.give_back(lane, ids, 10 * len(ids))
        self.show()

    def settle(self, which: int) -> None:
        lane, ids = self.leases.pop(which)
        self.lanes.forget(lane, ids)
        self.show()

    def shed(self) -> None:
        if self.waiting:
            ident = min(self.waiting)
            self.lanes.drop(self.waiting.pop(ident), ident, 10)
            self.show()

    def show(self) -> None:
        self.lanes.welcome(self._next_stranger)
        self.shown.update(self.lanes.changed)
        self.lanes.changed.clear()

    def _next_stranger(self, project: str, known: Container[str | None]) -> Stranger | None:
        keys = sorted({key for _, key in self.waiting.values() if key is not None and key not in known})
        if not keys:
            return None
        self._place = next((key for key in keys if key > self._place), keys[0])
        ids = [ident for ident, lane in self.waiting.items() if lane == (project, self._place)]
        return Stranger(self._place, len(ids), max(ids), 10 * len(ids))


def test_the_own_key_has_every_other_turn() -> None:
    """Other keys take the turns between, one after the other."""
    chunks = Chunks()
    for key in (None, None, None, "a", "a", "b", "b", None):
        chunks.put(key)
    turns = []
    while (lane := chunks.take(1)) is not None:
        turns.append(lane[1])
    assert turns == [None, "a", None, "b", None, "a", None, "b"]


def test_keys_that_are_passed_over_lose_no_turn() -> None:
    """They are first when they may be leased again."""
    chunks = Chunks()
    for key in ("a", "b", None, "b"):
        chunks.put(key)
    assert [chunks.take(1, {"a", None}) for _ in range(3)] == [("p", "b"), ("p", "b"), None]
    assert chunks.take(1, {None}) == ("p", "a")


def test_each_key_of_a_crowd_has_its_turn() -> None:
    """Where all are refused each is asked before one is asked a third time, and few are in memory."""
    chunks = Chunks()
    keys = [f"{number:02}" for number in range(30)]
    for key in keys:
        chunks.put(key)
    turns = []
    for _ in range(2 * len(keys)):
        lane = chunks.take(1)
        assert lane is not None
        turns.append(lane[1])
        chunks.give_back(0)
        assert len(chunks.lanes._projects["p"].queues) <= MOST
    assert sorted(set(map(str, turns))) == keys


def test_a_key_that_worked_does_not_wait_in_a_crowd() -> None:
    """Others that wait were made up, for all that is known."""
    chunks = Chunks()
    chunks.put("works")
    assert chunks.take(1) == ("p", "works")
    chunks.settle(0)
    strangers = [f"{number:02}" for number in range(30)]
    for key in strangers:
        chunks.put(key)
    chunks.put("works")
    assert chunks.take(1, strangers) == ("p", "works")
    chunks.give_back(0)
    assert chunks.take(1, strangers) == ("p", "works")


def test_what_came_back_is_offered_though_what_lay_behind_it_is_gone() -> None:
    """A chunk waits for those that were there before it came back, but not for ever."""
    chunks = Chunks()
    chunks.put(None)
    chunks.put(None)
    assert chunks.take(1)
    chunks.shed()
    chunks.give_back(0)
    assert chunks.take(1)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "take", "take", "give back", "settle", "shed"]),
        st.sampled_from([None, *"abcdefgh"]),
        st.integers(1, 3),
    ),
    max_size=80,
)


@given(STEPS)
def test_any_story_is_counted_right(steps: list[tuple[str, str | None, int]]) -> None:
    """What waits is counted by project and lane, what is known is bounded, and in the end all is settled."""
    chunks = Chunks()
    for step, key, number in steps:
        if step == "put":
            chunks.put(key)
        elif step == "take":
            chunks.take(number, {key} if number == 3 else ())
        elif step == "shed":
            chunks.shed()
        elif chunks.leases:
            (chunks.give_back if step == "give back" else chunks.settle)(number % len(chunks.leases))
        known = chunks.lanes._projects["p"].queues if chunks.lanes._projects else {}
        assert len(known) <= 1 + MOST + MOST // 2 + len(chunks.leases)
        assert chunks.lanes.waiting == ({"p": 10 * len(chunks.waiting)} if chunks.waiting else {})
        for name in known:
            count = sum(lane == ("p", name) for lane in chunks.waiting.values())
            assert known[name].events == chunks.shown["p", name] == 10 * count
        assert all(not events for lane, events in chunks.shown.items() if lane[1] not in known)
        assert chunks.lanes.leased == {ident for _, ids in chunks.leases for ident in ids}
    while chunks.leases:  # whose keys have places that others wait for
        chunks.settle(0)
    while chunks.take(2) is not None:
        chunks.settle(-1)
    assert not chunks.waiting
