"""`agent.accept.bodies`: bounded in size, in time, and all together in memory."""

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from agent.accept.bodies import Bodies, Unread
from agent.httpd import Message, Receive


def pieces(*sizes: int, then: Message | None = None) -> Receive:
    """A request's body in pieces; afterwards a message, or nothing ever."""
    messages: list[Message] = [
        {"type": "http.request", "body": b"x" * size, "more_body": True} for size in sizes
    ]
    if then is not None:
        messages.append(then)

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    return receive


END: Message = {"type": "http.request", "body": b"", "more_body": False}
LEFT: Message = {"type": "http.disconnect"}


@pytest.mark.parametrize(
    ("sizes", "then", "expected"),
    [
        ((3, 0, 4), END, b"x" * 7),
        ((), END, b""),
        ((10,), END, b"x" * 10),
        ((10, 1), None, Unread.TOO_LARGE),
        ((5,), LEFT, Unread.GONE),
        ((), LEFT, Unread.GONE),
    ],
)
async def test_a_body_is_read_or_it_is_said_why_not(
    sizes: Sequence[int], then: Message | None, expected: bytes | Unread
) -> None:
    """And afterwards nothing is held."""
    bodies = Bodies(largest=10, together=100, seconds=5)
    async with bodies.read(pieces(*sizes, then=then)) as body:
        assert body == expected
        assert bodies.held == min(sum(sizes), 10)
    assert bodies.held == 0


async def test_a_body_that_does_not_come_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    """By the clock for all of it, not for each piece."""
    bodies = Bodies(largest=10, together=100, seconds=5)

    async def slow() -> Message:
        await trio.sleep(2)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async with bodies.read(slow) as body:
        assert body is Unread.TOO_SLOW
        assert trio.current_time() == 5
    assert bodies.held == 0


async def test_bodies_share_what_there_is() -> None:
    """One that finds no room is refused at once; when another is done there is room again."""
    bodies = Bodies(largest=80, together=100, seconds=5)
    async with bodies.read(pieces(80, then=END)) as first:
        assert len(first) == 80 if isinstance(first, bytes) else False
        async with bodies.read(pieces(15, 10)) as second:
            assert second is Unread.NO_ROOM
        assert bodies.held == 80
    async with bodies.read(pieces(25, then=END)) as third:
        assert third == b"x" * 25


async def test_a_cancelled_read_gives_back_what_it_held() -> None:
    """A connection that is cut off in the middle of a body costs nothing afterwards."""
    bodies = Bodies(largest=80, together=100, seconds=5)
    with trio.move_on_after(0.05):
        async with bodies.read(pieces(50)):
            pass
    assert bodies.held == 0
