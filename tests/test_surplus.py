"""When free pages are given back: what nobody needed for a while, in steps."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from agent.buffer.surplus import STEP_PAGES, STEP_SECONDS, WATCHED_SECONDS, Surplus


def test_an_idle_file_gives_all_back() -> None:
    """Looked at when it is due, and never otherwise, it gives back page by page what was free."""
    surplus, free, now, steps = Surplus(), 1000, 10.0, list[int]()
    surplus.step(free, now)
    assert surplus.due(free) == now + WATCHED_SECONDS
    while (now := surplus.due(free)) < inf:
        steps.append(surplus.step(free, now))
        free -= steps[-1]
    assert sum(steps) == 1000
    assert max(steps) == STEP_PAGES


def test_what_comes_and_goes_keeps_its_room() -> None:
    """Pages that are needed again and again stay; those beyond them go while the file is busy."""
    surplus, spare, given_back = Surplus(), 700, 0
    for moment in range(1000):
        in_use = moment % 10 * 30  # up to 270 pages, all of them free again each second
        pages = surplus.step(270 - in_use + spare, moment / 10)
        given_back, spare = given_back + pages, spare - pages
    assert given_back == 700


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 20))))
def test_never_more_than_is_free_nor_too_often(looks: list[tuple[int, float]]) -> None:
    """Whatever happens, a step is small, within what is free, and not hard behind another."""
    surplus, now, last = Surplus(), 0.0, -inf
    for free, passed in looks:
        now += passed
        pages = surplus.step(free, now)
        assert 0 <= pages <= min(free, STEP_PAGES)
        if pages:
            assert now >= last + STEP_SECONDS
            last = now
