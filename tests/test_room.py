"""How much of a source's reads may be on its way: of one client, of one user, and in all."""

import trio
from trio.testing import wait_all_tasks_blocked

from agent.accept.room import (
    CLIENT_BYTES,
    CLIENT_LINES,
    LITTLE_BYTES,
    QUEUE_BYTES,
    QUEUE_LINES,
    SPARE_BYTES,
    USER_BYTES,
    USER_READS,
    Room,
)

FLOODING, GOOD, OTHER = 1, 2, 3


async def waits(room: Room, client: object, user: object) -> bool:
    """Whether a read has to wait."""
    with trio.move_on_after(0.01) as patience:
        async with room.read(client, user):
            pass
    return patience.cancelled_caught


async def test_who_has_much_on_his_way_waits_alone() -> None:
    """A client, and a user by however many clients, leave room for others."""
    room = Room()
    room.hold("a", FLOODING, CLIENT_BYTES, 1)
    assert await waits(room, "a", FLOODING)
    assert not await waits(room, "b", FLOODING)
    room.hold("b", FLOODING, CLIENT_BYTES - 1, 1)
    room.hold("c", FLOODING, USER_BYTES - 2 * CLIENT_BYTES + 1, 1)
    assert await waits(room, "b", FLOODING)
    room.hold("d", GOOD, QUEUE_BYTES - USER_BYTES, 1)
    room.hold("e", OTHER, LITTLE_BYTES, 1)
    assert await waits(room, "e", OTHER)
    room.free("a", FLOODING, CLIENT_BYTES, 1)
    assert not await waits(room, "a", FLOODING)
    assert not await waits(room, "e", OTHER)


async def test_who_has_little_on_his_way_is_not_kept_out_by_those_who_have() -> None:
    """Else one among many whom nobody can tell apart would wait for all of theirs."""
    room = Room()
    room.hold("a", FLOODING, USER_BYTES, 1)
    assert not await waits(room, "b", FLOODING)
    room.hold("b", FLOODING, SPARE_BYTES, 1)
    assert await waits(room, "c", FLOODING)
    room.hold("d", GOOD, QUEUE_BYTES - USER_BYTES - SPARE_BYTES, 1)
    assert not await waits(room, "e", OTHER)
    room.hold("e", OTHER, SPARE_BYTES, 1)
    assert await waits(room, "f", OTHER)


async def test_datagrams_wait_by_their_lines_too() -> None:
    """Lines of a byte are work for many seconds, and nobody knows whose they are."""
    room = Room()
    room.hold(None, None, 2 * QUEUE_LINES - 2, QUEUE_LINES - 1)
    await room.wait()
    room.hold(None, None, 2, 1)
    with trio.move_on_after(0.01) as patience:
        await room.wait()
    assert patience.cancelled_caught
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(room.wait)
            await wait_all_tasks_blocked()
            room.free(None, None, 2, 1)
            room.tell()


async def test_a_user_reads_a_few_times_at_once() -> None:
    """A thousand connections of one user do not take memory and time for a thousand reads in one moment."""
    room = Room()
    reading = most = 0

    async def read(client: int) -> None:
        nonlocal reading, most
        async with room.read(client, FLOODING):
            reading += 1
            most = max(most, reading)
            await trio.lowlevel.checkpoint()
            reading -= 1

    async with trio.open_nursery() as nursery:
        for client in range(100):
            nursery.start_soon(read, client)
    assert most == USER_READS


async def test_many_lines_are_much() -> None:
    """However short they are."""
    room = Room()
    room.hold("a", GOOD, 2 * CLIENT_LINES, CLIENT_LINES)
    assert await waits(room, "a", GOOD)
    assert not await waits(room, "b", GOOD)
    room.free("a", GOOD, 2, 1)
    assert not await waits(room, "a", GOOD)


async def test_those_who_waited_do_not_read_all_at_once() -> None:
    """Else a crowd of one user's would fill the queue with one read each."""
    room = Room()
    room.hold("a", FLOODING, USER_BYTES, 1)

    async def read(client: int) -> None:
        async with room.read(client, FLOODING):
            await trio.lowlevel.checkpoint()  # as a read from the kernel does
        room.hold(client, FLOODING, CLIENT_BYTES, 1)

    async with trio.open_nursery() as nursery:
        for client in range(100):
            nursery.start_soon(read, client)
        await wait_all_tasks_blocked()
        room.free("a", FLOODING, 1, 0)
        room.tell()
        await wait_all_tasks_blocked()
        assert room.held <= USER_BYTES + SPARE_BYTES + USER_READS * CLIENT_BYTES
        nursery.cancel_scope.cancel()
