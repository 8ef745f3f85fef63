"""How much of a source's reads may be on its way: of one client, of one user, and in all."""

import trio
from trio.testing import wait_all_tasks_blocked

from agent.accept.room import CLIENT_BYTES, CLIENT_LINES, QUEUE_BYTES, USER_BYTES, Room

FLOODING, GOOD = 1, 2


async def waits(room: Room, client: object, user: int | None) -> bool:
    """Whether a read has to wait."""
    with trio.move_on_after(0.01) as patience:
        await room.wait(client, user)
    return patience.cancelled_caught


async def test_who_has_much_on_his_way_waits_alone() -> None:
    """A client, and a user by however many clients, leave room for others."""
    room = Room()
    room.hold("a", FLOODING, bytes(CLIENT_BYTES))
    assert await waits(room, "a", FLOODING)
    assert not await waits(room, "b", FLOODING)
    room.hold("b", FLOODING, bytes(USER_BYTES - CLIENT_BYTES))
    assert await waits(room, "c", FLOODING)
    assert not await waits(room, "d", GOOD)
    assert not await waits(room, "e", None)
    room.hold("d", GOOD, bytes(QUEUE_BYTES - USER_BYTES))
    assert await waits(room, "e", None)
    room.free("a", FLOODING, bytes(CLIENT_BYTES))
    assert not await waits(room, "a", FLOODING)


async def test_many_lines_are_much() -> None:
    """However short they are."""
    room = Room()
    room.hold("a", None, b"x\n" * CLIENT_LINES)
    assert await waits(room, "a", None)
    assert not await waits(room, "b", None)
    room.free("a", None, b"x\n")
    assert not await waits(room, "a", None)


async def test_those_who_waited_do_not_read_all_at_once() -> None:
    """Else a crowd of one user's would fill the queue with one read each."""
    room = Room()
    room.hold("a", FLOODING, bytes(USER_BYTES))

    async def read(client: int) -> None:
        await room.wait(client, FLOODING)
        await trio.lowlevel.checkpoint()  # as a read from the kernel does
        room.hold(client, FLOODING, bytes(CLIENT_BYTES))

    async with trio.open_nursery() as nursery:
        for client in range(100):
            nursery.start_soon(read, client)
        await wait_all_tasks_blocked()
        room.free("a", FLOODING, b"x")
        room.tell()
        await wait_all_tasks_blocked()
        assert room.held <= USER_BYTES + 3 * CLIENT_BYTES
        nursery.cancel_scope.cancel()
