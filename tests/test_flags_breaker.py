"""`agent.accept.flags.breaker`: an outage is noticed soon, and asks for one call in a while."""

from agent.accept.flags.breaker import LONGEST_AFTER, OUTAGE, Breaker

WAIT = 5.0


def opened(at: float = 100.0) -> Breaker:
    breaker = Breaker(WAIT)
    assert [breaker.failed(at) for _ in range(OUTAGE)] == [False] * (OUTAGE - 1) + [True]
    return breaker


def test_fewer_failures_than_an_outage_close_nothing() -> None:
    """With an answer between them there is no outage, however many they are."""
    breaker = Breaker(WAIT)
    for _ in range(10):
        for _ in range(OUTAGE - 1):
            assert not breaker.failed(1.0)
            assert breaker.admits(1.0)
        assert not breaker.answered()


def test_an_open_one_lets_one_call_through_at_a_time() -> None:
    """The next may ask only when that one must have ended, also if nobody said how."""
    breaker = opened(100.0)
    assert not breaker.admits(100.0)
    assert not breaker.admits(104.9)
    assert [breaker.admits(105.0 + second / 10) for second in range(60)].count(True) == 2
    assert not breaker.failed(111.0)
    assert not breaker.admits(115.9)
    assert breaker.admits(116.0)


def test_an_answer_ends_the_outage() -> None:
    """All calls are let through again, and a new outage is found as the first was."""
    breaker = opened()
    assert breaker.answered()
    assert not breaker.answered()
    assert all(breaker.admits(100.0) for _ in range(5))
    assert not breaker.failed(100.0)
    assert breaker.admits(100.0)


def test_who_asks_for_time_gets_it_up_to_a_minute() -> None:
    """A shorter wait than ours changes nothing; an absurd one is cut; an earlier one is not forgotten."""
    for after, wait in ((0.0, WAIT), (1.0, WAIT), (20.0, 20.0), (1e9, LONGEST_AFTER)):
        breaker = opened(100.0)
        breaker.failed(100.0, after)
        breaker.failed(100.0)
        assert not breaker.admits(100.0 + wait - 0.1)
        assert breaker.admits(100.0 + wait)
