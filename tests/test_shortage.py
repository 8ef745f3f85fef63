"""Who leaves when all places of a Unix stream are taken."""

import trio
import trio.testing

from agent.accept.shortage import BUSY_SECONDS, SHORTAGE_SECONDS, SILENT_SECONDS, Shortage

HOG, GOOD = 1, 2


class One:
    """A client; `owed` while it may not be sent away."""

    def __init__(self, *, owed: bool = False) -> None:
        self.owed = owed
        self.left = False

    def give_way(self, *, busy: bool) -> bool:
        """See `Client`."""
        self.left = not self.owed
        return self.left


async def test_the_user_with_most_places_gives_them_up(autojump_clock: trio.testing.MockClock) -> None:
    """His silent ones, the one first that was silent longest; nobody else's, however silent."""
    shortage = Shortage("source")
    good = [One(), One()]
    for one in good:
        shortage.came(one, GOOD)
    hogs = [One(owed=True), *(One() for _ in range(4))]
    for one in hogs:
        shortage.came(one, HOG)
        await trio.sleep(0.01)
    shortage.heard(hogs[1])
    await trio.sleep(SILENT_SECONDS)
    shortage.make_room()
    assert not any(one.left for one in hogs)  # it may be a matter of a moment
    left: list[int] = []
    while len(left) < 3:  # then he has no more than the others
        await trio.sleep(SHORTAGE_SECONDS / 2)
        shortage.make_room()
        left += [number for number, one in enumerate(hogs) if one.left and number not in left]
    assert left == [2, 3, 4]
    assert not any(one.left for one in good)


async def test_who_speaks_all_the_time_takes_turns(autojump_clock: trio.testing.MockClock) -> None:
    """Not for some seconds; then one after the other who was heard first, until he has one left."""
    shortage = Shortage("source")
    hogs, began = [One() for _ in range(3)], trio.current_time()
    for one in hogs:
        shortage.came(one, HOG)
    while not any(one.left for one in hogs):
        for one in hogs:
            shortage.heard(one)
        shortage.make_room()
        await trio.sleep(SHORTAGE_SECONDS / 2)
    assert BUSY_SECONDS <= trio.current_time() - began <= BUSY_SECONDS + 2
    for _ in range(10):
        shortage.heard(hogs[1])
        shortage.heard(hogs[2])
        shortage.make_room()
        await trio.sleep(SHORTAGE_SECONDS / 2)
    assert [one.left for one in hogs] == [True, True, False]


async def test_who_speaks_keeps_his_place(autojump_clock: trio.testing.MockClock) -> None:
    """Nobody leaves where nobody is silent, or nobody is there."""
    shortage = Shortage("source")
    shortage.make_room()
    busy = One()
    shortage.came(busy, HOG)
    for _ in range(20):
        await trio.sleep(SILENT_SECONDS / 2)
        shortage.heard(busy)
        shortage.make_room()
    assert not busy.left
    shortage.left(busy)
    shortage.left(busy)
    shortage.heard(busy)
    shortage.make_room()
