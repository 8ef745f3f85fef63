"""`agent.deliver.keys`: each key is held for itself, and no number of them costs more than a bound."""

import random
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.deliver.keys import (
    MOST_HELD,
    MOST_MISSED,
    MOST_WORKED,
    PROBE_LONGEST,
    PROBE_SPACING,
    HeldKeys,
    Keys,
)
from agent.deliver.pace import PROBE_SECONDS, Held


def lowest(low: float, high: float) -> float:
    return low


def refused(*names: str | None, reason: Held = "key", now: float = 0.0) -> Keys:
    """Keys of which these are held."""
    keys = Keys(60.0)
    for name in names:
        keys.hold(name, reason, f"no {name}", now, lowest)
    return keys


def crowded() -> Keys:
    """As many keys are held as may be, but for the own one; `works` has worked."""
    keys = Keys(60.0)
    keys.accept("works", 0.0, probe=False)
    for number in range(MOST_HELD):
        keys.hold(f"wrong-{number}", "key", "", number / 10_000, lowest)
    return keys


def test_a_held_key_closes_nobody_else() -> None:
    """Neither the project's own key nor another client's waits for it."""
    keys = refused("a")
    closed = keys.closed(1.0)
    assert [key in closed for key in ("a", "b", None)] == [True, False, False]
    assert (keys.is_held("a"), keys.is_held("b"), keys.own) == (True, False, None)


def test_the_own_key_closes_no_clients() -> None:
    """What is wrong with the configured key is told with PostHog's words, and holds only what goes by it."""
    keys = refused(None)
    closed = keys.closed(1.0)
    assert [key in closed for key in ("a", None)] == [False, True]
    assert keys.own == ("key", "no None", 0.0, PROBE_SECONDS[0])
    assert keys.clients() == []


@pytest.mark.parametrize(("reason", "seconds"), [("key", 45.0), ("billing", 45.0), ("rejected", 60.0)])
def test_one_probe_when_its_time_is_over(reason: Held, seconds: float) -> None:
    """One lease at a time goes out; a refusal holds on, and `since` stays."""
    keys = refused("a", reason=reason)
    for now in (seconds, 2 * seconds):
        assert keys.next_probe(now - 1.0) == pytest.approx(1.0)
        assert "a" in keys.closed(now - 1.0)
        assert not keys.ask("a", now - 1.0)
        assert "a" not in keys.closed(now)
        assert keys.ask("a", now)
        assert "a" in keys.closed(now)
        assert not keys.ask("a", now)
        keys.hold("a", reason, "", now, lowest)
        keys.done("a")
    assert keys.clients() == [HeldKeys(reason, 1, 0.0, 3 * seconds)]


def test_a_key_that_just_worked_is_not_held_for_one_shipment() -> None:
    """It needs company, and is held where that is not found often, or the key has not worked for long."""
    keys = Keys(60.0)
    assert keys.miss("new", 0.0)
    for key in (None, "a"):
        keys.accept(key, 100.0, probe=False)
        assert not any(keys.miss(key, 160.0) for _ in range(MOST_MISSED - 1))
        assert keys.need_company(160.0)
        keys.accept(key, 160.0, probe=False)
        assert not keys.need_company(160.0)
        assert [keys.miss(key, 160.0) for _ in range(MOST_MISSED)].index(True) == MOST_MISSED - 1
        keys.hold(key, "rejected", "no", 160.0, lambda low, _high: low)
        assert not keys.need_company(160.0)  # before it is due
    keys.accept("b", 200.0, probe=False)
    assert keys.miss("b", 261.0)


def test_only_a_probe_ends_a_hold() -> None:
    """What was sent before the refusal may still be taken, and says nothing new."""
    keys = refused("a")
    assert not keys.accept("a", 0.0, probe=False)
    assert keys.is_held("a")
    assert keys.ask("a", 50.0)
    assert keys.accept("a", 0.0, probe=True)
    keys.done("a")
    assert (keys.is_held("a"), keys.next_probe(50.0)) == (False, inf)
    assert "a" not in keys.closed(50.0)


def test_a_probe_that_brought_nothing_makes_way() -> None:
    """Its lease was given back without an answer: the next may go in its turn."""
    keys = refused("a")
    assert keys.ask("a", 50.0)
    keys.done("a")
    assert "a" not in keys.closed(50.0 + PROBE_SPACING)


def test_other_trouble_begins_anew() -> None:
    """Another reason has its own beginning; a late refusal never brings the probe forward."""
    keys = refused("a", reason="rejected")
    keys.hold("a", "key", "", 10.0, lowest)
    assert keys.clients() == [HeldKeys("key", 1, 10.0, 60.0)]


def test_shipments_without_a_witness_are_counted_by_key() -> None:
    """Company and smaller batches are for the key that needs them, when it is asked again."""
    keys = refused("a", reason="rejected")
    keys.hold("a", "rejected", "", 60.0, lowest)
    assert (keys.unwitnessed("a"), keys.unwitnessed("b"), keys.unwitnessed(None)) == (2, 0, 0)
    assert [keys.need_company(now) for now in (61.0, 120.0)] == [False, True]
    assert keys.ask("a", 120.0)
    assert not keys.need_company(120.0)
    keys.accept("a", 0.0, probe=True)
    assert keys.unwitnessed("a") == 0


def test_it_is_told_by_reason_and_never_by_key() -> None:
    """How many there are, since when, and when the next is asked."""
    keys = refused("phc_one", "phc_two")
    keys.hold("phc_three", "billing", "phc_three owes", 5.0, lowest)
    assert keys.clients() == [HeldKeys("billing", 1, 5.0, 50.0), HeldKeys("key", 2, 0.0, 45.0)]
    assert keys.reasons == ["billing", "key"]
    assert "phc" not in repr([keys, keys.clients(), keys._held.values()])
    assert all("phc" not in held.hold.why for held in keys._held.values())


def test_too_many_wrong_keys_stop_none_that_works() -> None:
    """New ones wait until one that is held is due; the own key and those that worked do not."""
    keys = crowded()
    closed = keys.closed(1.0)
    assert [key in closed for key in ("new", "works", None, "wrong-7")] == [True, False, False, True]
    assert keys.next_probe(1.0) == pytest.approx(44.0)
    closed = keys.closed(45.0)
    assert [key in closed for key in ("new", "wrong-0", "wrong-7")] == [False, False, True]


def test_keys_that_are_due_take_turns() -> None:
    """However many there are: one probe at a time and one in a quarter of a second, and nobody else waits."""
    names = [f"wrong-{number}" for number in range(1000)]
    keys = refused(None, *names)
    asked, now = 0, 100.0
    while now < 160.0:
        closed = keys.closed(now)
        due = [key for key in names if key not in closed]
        assert [key in closed for key in ("new", None)] == [False, False]
        if due:
            assert keys.ask(due[0], now)
            closed = keys.closed(now)
            assert all(key in closed for key in due)
            asked += 1
            keys.hold(due[0], "key", "", now, lowest)
            keys.done(due[0])
        now += min(1.0, keys.next_probe(now))
    assert 200 <= asked <= 60 / PROBE_SPACING + 1


def test_a_probe_that_does_not_end_holds_up_no_other() -> None:
    """Its batch may have to be tried again for hours."""
    keys = refused("a", "b")
    assert keys.ask("a", 50.0)
    assert "b" in keys.closed(50.0 + PROBE_SPACING)
    assert keys.next_probe(50.0) == pytest.approx(PROBE_LONGEST)
    assert "b" not in keys.closed(50.0 + PROBE_LONGEST)


def test_one_more_takes_the_place_of_the_first_that_is_due() -> None:
    """Which is then as unknown as any; the own key needs no place."""
    keys = crowded()
    keys.hold(None, "key", "", 1.0, lowest)
    keys.hold("new", "key", "", 1.0, lowest)
    assert keys.is_held(None)
    assert keys.is_held("new")
    assert not keys.is_held("wrong-0")
    assert "wrong-0" in keys.closed(1.0)
    assert sum(held.keys for held in keys.clients()) == MOST_HELD


def test_a_key_that_worked_is_known_until_it_is_refused() -> None:
    """One that was revoked is like any other; of very many only the last are known."""
    keys = crowded()
    keys.hold("works", "key", "", 1.0, lowest)
    assert "works" in keys.closed(1.0)
    for number in range(MOST_WORKED + 5):
        assert keys.accept(f"right-{number}", 0.0, probe=False)
        assert not keys.accept(f"right-{number}", 0.0, probe=False)
    assert "right-0" in keys.closed(1.0)
    assert f"right-{MOST_WORKED}" not in keys.closed(1.0)


MOVES = st.lists(
    st.tuples(st.sampled_from(["ask", "refuse", "poison", "take"]), st.integers(0, 6), st.floats(0, 50)),
    max_size=60,
)


@given(MOVES, st.integers(0, 2**32))
def test_the_bounds_hold_whatever_happens(moves: list[tuple[str, int, float]], seed: int) -> None:
    """Never two probes of a key at once, never one before its time, never a key that is held for good."""
    rng = random.Random(seed)
    keys = Keys(60.0)
    names = (None, *map(str, range(6)))
    probing: set[str | None] = set()
    last: dict[str | None, float] = {}
    now = 0.0
    for move, which, passing in moves:
        now += passing
        name = names[which]
        if move == "ask" and name not in keys.closed(now):
            assert now - last.get(name, -inf) >= PROBE_SECONDS[0]
            if keys.ask(name, now):
                assert name not in probing
                probing.add(name)
        elif move == "take":
            ends = name in probing or not keys.is_held(name)
            keys.accept(name, 0.0, probe=name in probing)
            assert keys.is_held(name) != ends
            if ends:
                last.pop(name, None)
        elif move in ("refuse", "poison"):
            keys.hold(name, "key" if move == "refuse" else "rejected", "", now, rng.uniform)
            last[name] = now
        if move != "ask" and name in probing:
            probing.discard(name)
            keys.done(name)
    for name in probing:
        keys.done(name)
    now += 75.0
    assert not any(name in keys.closed(now) for name in names)
    assert keys.next_probe(now) == inf


def test_a_million_keys_cost_no_more_than_a_few() -> None:
    """Who is asked at all is refused, and that is `MOST_HELD` and then a few a second."""
    rng = random.Random(1)
    keys = Keys(60.0)
    asked, now = 0, 0.0
    names = iter(range(10**6))
    while now < 600.0:
        name = str(next(names))
        if name in keys.closed(now):
            now += min(1.0, keys.next_probe(now))
            continue
        asked += 1
        assert not keys.ask(name, now)  # it is no probe, as nobody has asked it before
        keys.hold(name, "key", "", now, rng.uniform)
    assert asked <= MOST_HELD + 600 / PROBE_SPACING
    assert sum(held.keys for held in keys.clients()) == len(keys._held) == MOST_HELD
