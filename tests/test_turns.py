"""Turns: one step at a time, users one after the other, whatever one of them asks for or gives up."""

from functools import partial

import trio
import trio.testing

from agent.accept.turns import Turns


async def test_users_take_turns() -> None:
    """Who comes last with one step waits for one step of him who came with many."""
    turns, done = Turns(), []

    async def step(user: str) -> None:
        async with turns.step(user):
            done.append(user)

    async with trio.open_nursery() as nursery:
        async with turns.step("first"):
            for user in ["many"] * 10 + ["one"]:
                nursery.start_soon(step, user)
                await trio.testing.wait_all_tasks_blocked()
    assert done[:2] == ["many", "one"]
    assert len(done) == 11


async def test_one_at_a_time_and_each_comes_round() -> None:
    """Nobody is forgotten, and no two are at work at once, where some give up while they wait."""
    turns = Turns()
    at_work, most, done = 0, 0, 0

    async def step(user: int, patience: float) -> None:
        nonlocal at_work, most, done
        with trio.move_on_after(patience):
            async with turns.step(user):
                at_work += 1
                most = max(most, at_work)
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.001)
                at_work -= 1
            done += 1

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(partial(step, number % 5, 0.01 if number % 2 else 60))
    assert most == 1
    assert 100 <= done < 200
    with trio.fail_after(1):
        for user in range(5):
            async with turns.step(user):
                pass
