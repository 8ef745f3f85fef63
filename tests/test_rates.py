"""Rates: how many events may come, told by numbers alone."""

from hypothesis import given
from hypothesis import strategies as st

from agent.accept.rates import USERS, Rate, Rates

NONE = Rate(0, 1)


def test_a_burst_and_then_the_rate() -> None:
    """After a silence a burst may come, then as many as the rate allows; what was missed is not saved up."""
    rates = Rates(Rate(10, 20), NONE, 0.0)
    assert rates.admit(None, 30, 100.0) == 20
    assert rates.admit(None, 5, 100.0) == 0
    assert rates.admit(None, 5, 100.25) == 2
    assert rates.admit(None, 100, 200.0) == 20


def test_all_of_them_or_none() -> None:
    """Who cannot take a part asks for all: more than a burst come after a silence, the next wait for it."""
    rates = Rates(Rate(10, 20), NONE, 0.0)
    assert rates.admit_all(None, 15, 0.0)
    assert not rates.admit_all(None, 15, 0.0)
    assert rates.admit(None, 15, 0.0) == 5
    assert rates.admit_all(None, 50, 10.0)
    assert rates.admit(None, 5, 11.0) == 0
    assert not rates.admit_all(None, 20, 14.9)
    assert rates.admit_all(None, 20, 15.1)


def test_each_user_has_its_own() -> None:
    """One who floods takes nothing from another."""
    rates = Rates(NONE, Rate(10, 10), 0.0)
    assert rates.admit(1, 1000, 0.0) == 10
    assert rates.admit(2, 7, 0.0) == 7
    assert rates.admit(1, 1, 0.05) == 0


def test_all_who_are_not_known_share_one_rate() -> None:
    """Nobody has more room for hiding who sends, and nobody who is known has less for it."""
    rates = Rates(NONE, Rate(10, 10), 0.0)
    assert rates.admit(None, 7, 0.0) == 7
    assert rates.admit(None, 1000, 0.0) == 3
    assert rates.admit(1, 1000, 0.0) == 10


def test_the_smaller_limit_decides_and_costs_both_the_same() -> None:
    """What one of them refuses is not taken from the other."""
    rates = Rates(Rate(100, 15), Rate(100, 10), 0.0)
    assert rates.admit(1, 50, 0.0) == 10
    assert rates.admit(2, 50, 0.0) == 5


def test_users_without_number_are_forgotten() -> None:
    """More users than are remembered cost no more memory."""
    rates = Rates(NONE, Rate(1, 1), 0.0)
    for uid in range(3 * USERS):
        assert rates.admit(uid, 1, 0.0) == 1
    assert len(rates._users) == USERS


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 3)), max_size=20))
def test_never_more_than_burst_and_rate(asked: list[tuple[int, float]]) -> None:
    """However the events come, no span of time sees more than its share and one burst."""
    rates, now, admitted = Rates(Rate(5, 10), NONE, 0.0), 0.0, 0
    for events, pause in asked:
        now += pause
        admitted += rates.admit(None, events, now)
        assert admitted <= 10 + 5 * now + 1e-6
