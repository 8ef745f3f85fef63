"""What every buffer promises, asked of each: custody, limits, room, and books that balance."""

import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import config
from agent.buffer import (
    CLOCKS_KEPT,
    MOST_BURIALS,
    SOCKETS_KEPT,
    Buffer,
    DeadEvent,
    Entry,
    Kept,
    Lease,
    Limits,
    leased,
    newly_dropped,
)
from agent.buffer.memory import open_memory
from agent.buffer.sqlite import open_sqlite
from agent.events import Burial, Chunk, Tally
from agent.metrics import Metrics
from agent.pack import inflate

ALL = Limits(10**9, 2**40)


Opener = Callable[..., AbstractAsyncContextManager[Kept]]


@pytest.fixture(params=["memory", "sqlite"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens a buffer with the given settings; the same file each time, where there is one."""

    @asynccontextmanager
    async def opener(**given_settings: Any) -> AsyncIterator[Kept]:
        chosen = config.Buffer(**{"path": str(tmp_path / "b.db"), "kind": request.param, **given_settings})
        opening: AbstractAsyncContextManager[Kept]
        opening = open_memory(chosen) if request.param == "memory" else open_sqlite(chosen, Metrics())
        async with opening as buffer:
            with trio.fail_after(30):
                yield buffer

    return opener


def chunk(number: int, events: int = 10, *, size: int = 100, project: str = "default", **more: Any) -> Chunk:
    """A chunk that can be told by its crc."""
    now = time.time_ns() // 1000
    fields = {"received_at": now, "monotonic": number, "boot": "b", "key": None, **more}
    return Chunk(project=project, events=events, size=events * 10, crc=number, packed=bytes(size), **fields)


def tally(received: int, **more: Any) -> Tally:
    return Tally(source="app", received=received, **more)


async def put(buffer: Buffer, *chunks: Chunk) -> int:
    return await buffer.put(chunks, tally(sum(one.events for one in chunks)))


async def take(buffer: Buffer, limits: Limits = ALL, project: str = "default") -> Lease:
    lease = await buffer.take(limits, project)
    assert lease is not None
    return lease


def crcs(lease: Lease | None) -> list[int]:
    return [one.crc for one in lease.chunks] if lease else []


def total(buffer: Buffer, joint: str, reason: str = "", label: str | None = None) -> int:
    return sum(
        count
        for entry, count in buffer.books().items()
        if entry.joint == joint and entry.reason == reason and label in (None, entry.label)
    )


def assert_balanced(buffer: Buffer) -> None:
    """Both identities hold exactly."""
    books = buffer.books()

    def joint(name: str, *reasons: str) -> int:
        return sum(
            count
            for entry, count in books.items()
            if entry.joint == name and (not reasons or entry.reason in reasons)
        )

    assert joint("received") == joint("accepted") + joint("rejected") + joint(
        "shed", "full_newest", "shutdown"
    )
    assert joint("accepted") + joint("replayed") == joint("delivered") + joint("dead") + joint(
        "shed", "full_oldest", "expired", "damaged"
    ) + (buffer.stats().events)
    gone = joint("replayed") + joint("purged") + joint("dead_evicted")
    assert buffer.stats().dead_letters == joint("dead") - gone


def dead(project: str = "default", event: bytes = b"{}", **more: Any) -> DeadEvent:
    return DeadEvent(
        project=project, event=event, reason="rejected", detail="no", at=1, received_at=1, **more
    )


async def bury(buffer: Buffer, *events: DeadEvent) -> None:
    """Let these be what PostHog refused of a chunk."""
    await put(buffer, chunk(0, len(events)))
    async with leased(buffer, await take(buffer)) as lease:
        await buffer.settle(lease, dead=events)


async def test_what_was_put_is_taken_in_order(opened: Opener) -> None:
    """Oldest first, whole, and with everything that it came with."""
    async with opened() as buffer:
        chunks = [chunk(number) for number in range(5)]
        assert await put(buffer, *chunks) == 50
        lease = await take(buffer)
        assert list(lease.chunks) == chunks
        assert (lease.project, lease.key) == ("default", None)
        assert_balanced(buffer)


async def test_a_lease_keeps_its_limits(opened: Opener) -> None:
    """Neither more events nor more bytes than asked for, but always one chunk."""
    async with opened() as buffer:
        await put(buffer, *[chunk(number) for number in range(6)])
        assert crcs(await take(buffer, Limits(25, 2**40))) == [0, 1]
        assert crcs(await take(buffer, Limits(100, 100))) == [2]
        assert crcs(await take(buffer, Limits(1, 1))) == [3]
        assert crcs(await take(buffer)) == [4, 5]
        assert await buffer.take(ALL, "default") is None


async def test_a_lease_is_of_one_project_and_key(opened: Opener) -> None:
    """Chunks of others stay for theirs."""
    async with opened() as buffer:
        await put(buffer, chunk(1), chunk(2, project="other"), chunk(3, key="phc_x"), chunk(4))
        first, second = await take(buffer), await take(buffer)
        assert sorted([crcs(first), crcs(second)]) == [[1, 4], [3]]
        assert crcs(await take(buffer, project="other")) == [2]
        assert await buffer.take(ALL, "unknown") is None


async def test_settled_chunks_are_gone(opened: Opener) -> None:
    """After `settle` the buffer no longer has them, and they count as delivered."""
    async with opened() as buffer:
        await put(buffer, chunk(1), chunk(2))
        async with leased(buffer, await take(buffer)) as lease:
            await buffer.settle(lease)
        assert buffer.stats().events == 0
        assert total(buffer, "delivered") == 20
        assert await buffer.take(ALL, "default") is None
        assert_balanced(buffer)


async def test_released_chunks_come_back(opened: Opener) -> None:
    """Untouched, behind those that nobody has tried yet."""
    async with opened() as buffer:
        await put(buffer, chunk(1), chunk(2))
        async with leased(buffer, await take(buffer, Limits(10, 2**40))):
            pass
        found = crcs(await take(buffer, Limits(10, 2**40))) + crcs(await take(buffer, Limits(10, 2**40)))
        assert sorted(found) == [1, 2]
        assert total(buffer, "delivered") == 0
        assert_balanced(buffer)


async def test_a_lease_is_given_back_when_its_work_is_cancelled(opened: Opener) -> None:
    """Whoever is cancelled with a lease in hand loses nothing."""
    async with opened() as buffer:
        await put(buffer, chunk(1))
        with trio.move_on_after(0.01):
            async with leased(buffer, await take(buffer)):
                await trio.sleep_forever()
        assert crcs(await take(buffer)) == [1]


async def test_rest_is_kept_and_the_dead_are_buried(opened: Opener) -> None:
    """One settlement forgets what was delivered, buries the dead, and keeps what is left with its times."""
    async with opened() as buffer:
        await put(buffer, chunk(1), chunk(2), chunk(3))
        lease = await take(buffer)
        one, two, three = lease.chunks
        part = Chunk(
            project="default",
            events=4,
            size=40,
            crc=99,
            received_at=two.received_at,
            boot=two.boot,
            monotonic=two.monotonic,
            packed=b"part",
        )
        await buffer.settle(lease, [dead(), dead()], [part, three])
        assert one.events == 10
        assert total(buffer, "delivered") == 30 - 2 - 4 - 10
        assert total(buffer, "dead", "rejected") == 2
        assert buffer.stats().dead_letters == 2
        again = await take(buffer)
        assert sorted(crcs(again)) == [3, 99]
        assert {(one.received_at, one.monotonic) for one in again.chunks} == {
            (two.received_at, two.monotonic),
            (three.received_at, three.monotonic),
        }
        assert_balanced(buffer)


async def test_damaged_events_are_shed(opened: Opener) -> None:
    """What could not be read any more is counted as damaged, not as delivered."""
    async with opened() as buffer:
        await put(buffer, chunk(1), chunk(2))
        await buffer.settle(await take(buffer), damaged=10)
        assert (total(buffer, "delivered"), total(buffer, "shed", "damaged")) == (10, 10)
        assert_balanced(buffer)


async def test_rejects_enter_the_books_without_chunks(opened: Opener) -> None:
    """A read of nothing but rejects is a put of no chunks."""
    async with opened() as buffer:
        refused = tally(3, rejected={"malformed_json": 2, "too_deep": 1}, truncated=1, restamped=2)
        assert await buffer.put((), refused) == 0
        assert buffer.books()[Entry("rejected", "app", "malformed_json")] == 2
        assert (total(buffer, "truncated"), total(buffer, "restamped")) == (1, 2)
        assert_balanced(buffer)


FULL = 16 * 2**20
LARGE = 2**19


async def fill(buffer: Buffer) -> int:
    """Put large chunks until one has to wait; how many got in."""
    for number in range(200):
        with trio.move_on_after(0.3) as patience:
            await put(buffer, chunk(number, size=LARGE))
        if patience.cancelled_caught:
            return number
    raise AssertionError("it is never full")


async def test_a_full_buffer_blocks(opened: Opener) -> None:
    """A put waits, a cancelled one is not taken, and the next goes on when there is room."""
    async with opened(max_size=FULL) as buffer:
        count = await fill(buffer)
        assert buffer.stats().events == count * 10
        assert_balanced(buffer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, buffer, chunk(1000, size=LARGE))
            await trio.sleep(0.05)
            assert buffer.stats().waiting == 1
            await buffer.settle(await take(buffer))
        assert buffer.stats().events == 10
        assert_balanced(buffer)


async def test_a_full_buffer_drops_the_oldest(opened: Opener) -> None:
    """Never what is on lease; what went is counted."""
    async with opened(max_size=FULL, when_full="drop_oldest") as buffer:
        await put(buffer, chunk(0, size=LARGE), chunk(1, size=LARGE))
        lease = await take(buffer, Limits(10, 2**40))
        for number in range(2, 80):
            assert await put(buffer, chunk(number, size=LARGE)) == 10
        left = crcs(await take(buffer))
        assert left == list(range(80 - len(left), 80))
        assert crcs(lease) == [0]
        assert total(buffer, "shed", "full_oldest") == 790 - len(left) * 10
        await buffer.settle(lease)
        assert_balanced(buffer)


async def test_a_full_buffer_drops_the_newest(opened: Opener) -> None:
    """The put returns at once and says that nothing was taken."""
    async with opened(max_size=FULL, when_full="drop_newest") as buffer:
        taken = [await put(buffer, chunk(number, size=LARGE)) for number in range(80)]
        assert set(taken) == {10, 0}
        assert total(buffer, "shed", "full_newest") == taken.count(0) * 10
        assert_balanced(buffer)


async def test_a_closed_door_gives_up_what_waits(opened: Opener) -> None:
    """At a shutdown a put that finds no room returns, and is counted."""
    async with opened(max_size=FULL) as buffer:
        await fill(buffer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, buffer, chunk(1000, size=LARGE))
            await trio.sleep(0.05)
            buffer.close_door()
        assert total(buffer, "shed", "shutdown") == 10
        assert_balanced(buffer)


async def test_what_is_too_old_is_shed(opened: Opener) -> None:
    """Chunks beyond `max_age` go, and are counted; younger ones stay."""
    async with opened(max_age=60.0) as buffer:
        old = time.time_ns() // 1000 - 61_000_000
        await put(buffer, chunk(1, received_at=old), chunk(2))
        await put(buffer, chunk(3))
        found: list[int] = []
        while (lease := await buffer.take(ALL, "default")) is not None:
            found += crcs(lease)
        assert found[-2:] == [2, 3]
        await put(buffer, chunk(4))
        assert_balanced(buffer)


async def test_dead_letters_have_their_share(opened: Opener) -> None:
    """Beyond a tenth of the bound the oldest go, counted."""
    async with opened(max_size=FULL) as buffer:
        for number in range(5):
            await put(buffer, chunk(number))
            heavy = DeadEvent(
                project="default", event=bytes(2**19), reason="rejected", detail="", at=1, received_at=1
            )
            await buffer.settle(await take(buffer), [heavy])
        assert total(buffer, "dead_evicted") == 5 - buffer.stats().dead_letters > 0
        assert total(buffer, "dead", "rejected") == 5


async def test_dead_letters_can_be_looked_at(opened: Opener) -> None:
    """Each as it was buried, the oldest first, a page at a time, and one by its id."""
    async with opened() as buffer:
        assert await buffer.letters_kept() == (0, 0)
        given = [dead(event=b'{"n":%d}' % n, key="phc_x", boot="b", monotonic=n, marks=1) for n in range(5)]
        await bury(buffer, *given)
        kept = await buffer.letters_kept()
        assert kept.letters == 5
        first = await buffer.letters(0, 3)
        rest = await buffer.letters(first[-1].id, 10)
        assert [letter.event for letter in (*first, *rest)] == [event.event for event in given]
        assert rest[-1].id == kept.newest
        one = await buffer.letter(first[1].id)
        assert one is not None
        assert one == first[1]
        for name in DeadEvent.__struct_fields__:
            assert getattr(one, name) == getattr(given[1], name)
        assert await buffer.letter(kept.newest + 1) is None


async def test_a_replayed_letter_waits_for_delivery_again(opened: Opener) -> None:
    """It is what it was, key, time and bytes, counted as replayed, and remembers its burial."""
    async with opened() as buffer:
        event = b'{"uuid":"u"}'
        await bury(buffer, dead(event=event, key="phc_x", boot="b", monotonic=7, attempts=3), dead())
        ids = [letter.id for letter in await buffer.letters(0, 10)]
        assert await buffer.replay([ids[0], ids[0], 10**6]) == (1, False)
        assert total(buffer, "replayed") == 1
        assert [letter.id for letter in await buffer.letters(0, 10)] == ids[1:]
        lease = await take(buffer)
        (again,) = lease.chunks
        assert (lease.key, again.boot, again.monotonic, again.received_at) == ("phc_x", "b", 7, 1)
        assert inflate(again.packed, again.size, again.crc) == event
        assert again.burials == (Burial(1, "rejected", "no", 3),)
        assert_balanced(buffer)
        await buffer.release(lease)
        assert await buffer.replay([ids[0]]) == (0, False)


async def test_what_is_refused_again_returns_with_its_history(opened: Opener) -> None:
    """Each burial is kept, up to a bound."""
    async with opened() as buffer:
        await bury(buffer, dead())
        for number in range(MOST_BURIALS + 5):
            (letter,) = await buffer.letters(0, 10)
            assert len(letter.burials) == min(number, MOST_BURIALS)
            assert await buffer.replay([letter.id]) == (1, False)
            async with leased(buffer, await take(buffer)) as lease:
                burials = lease.chunks[0].burials
                await buffer.settle(lease, dead=[dead(attempts=number, burials=burials)])
        assert_balanced(buffer)


async def test_a_replay_stops_where_there_is_no_room(opened: Opener) -> None:
    """The letters that found none stay letters."""
    async with opened(max_size=FULL, when_full="drop_newest") as buffer:
        await bury(buffer, *[dead(event=os.urandom(100_000)) for _ in range(10)])
        while await put(buffer, chunk(0, size=LARGE // 8)):
            pass
        ids = [letter.id for letter in await buffer.letters(0, 10)]
        replayed = await buffer.replay(ids)
        assert replayed.full
        assert replayed.letters < 10
        assert (await buffer.letters_kept()).letters == 10 - replayed.letters
        assert_balanced(buffer)


async def test_purged_letters_are_gone(opened: Opener) -> None:
    """They are counted as purged, and not twice."""
    async with opened() as buffer:
        await bury(buffer, dead(), dead(), dead())
        ids = [letter.id for letter in await buffer.letters(0, 10)]
        assert await buffer.purge([ids[0], ids[2], ids[2]]) == 2
        assert await buffer.purge([ids[0]]) == 0
        assert [letter.id for letter in await buffer.letters(0, 10)] == [ids[1]]
        assert total(buffer, "purged") == 2
        assert_balanced(buffer)


async def test_clocks_of_boots_are_kept(opened: Opener) -> None:
    """The last word on each, and of the oldest boots none."""
    async with opened() as buffer:
        await buffer.note_clock("a", 1)
        await buffer.note_clock("b", 2)
        await buffer.note_clock("a", 3)
        assert buffer.clocks() == {"a": 3, "b": 2}
        for number in range(CLOCKS_KEPT - 1):
            await buffer.note_clock(f"later-{number}", number)
        assert len(buffer.clocks()) == CLOCKS_KEPT
        assert "b" not in buffer.clocks()
        assert buffer.clocks()["a"] == 3


async def test_what_the_kernel_dropped_is_booked_once(opened: Opener) -> None:
    """A socket's count goes on from where it was noted, whoever tells it; each socket has its own."""
    async with opened() as buffer:
        for source, socket, count in (("app", "a", 7), ("app", "a", 7), ("app", "b", 2), ("other", "a", 10)):
            await buffer.note_drops(source, socket, count)
        assert total(buffer, "dropped", label="app") == 9
        assert total(buffer, "dropped", label="other") == 3


async def test_sockets_that_are_long_gone_are_forgotten(opened: Opener) -> None:
    """The notes have a bound; those that are looked at stay."""
    async with opened() as buffer:
        await buffer.note_drops("app", "old", 5)
        await buffer.note_drops("app", "kept", 5)
        for number in range(SOCKETS_KEPT - 1):
            await buffer.note_drops("app", f"later-{number}", 0)
        before = total(buffer, "dropped")
        await buffer.note_drops("app", "kept", 5)
        assert total(buffer, "dropped") == before
        await buffer.note_drops("app", "old", 5)
        assert total(buffer, "dropped") == before + 5


@pytest.mark.parametrize(
    ("noted", "now", "new"),
    [(0, 0, 0), (5, 9, 4), (2**32 - 1, 1, 2), (7, 3, 3), (2**31 + 5, 2, 2**31 - 3), (5, 0, 0)],
)
def test_a_count_of_32_bits_goes_round(noted: int, now: int, new: int) -> None:
    """It begins anew after 2^32; one that went back is another socket's, all of which is new."""
    assert newly_dropped(noted, now) == new


async def test_what_is_left_of_a_chunk_keeps_its_own_place(opened: Opener) -> None:
    """A replayed event has its old chunk's times, but neither takes the other's place."""
    async with opened() as buffer:
        old = chunk(1, 10)
        origin = {"received_at": old.received_at, "boot": old.boot, "monotonic": old.monotonic}
        event = DeadEvent(project="default", event=b"{}", reason="rejected", detail="no", at=1, **origin)
        await bury(buffer, event)
        await put(buffer, old)
        (letter,) = await buffer.letters(0, 10)
        await buffer.replay([letter.id])
        async with leased(buffer, await take(buffer)) as lease:
            assert len(lease.chunks) == 2
            left = msgspec.structs.replace(old, events=4, crc=99)
            await buffer.settle(lease, rest=[left])
        (kept,) = (await take(buffer)).chunks
        assert (kept.crc, kept.burials) == (99, ())
        assert_balanced(buffer)


async def test_ready_waits_for_company_or_the_linger(opened: Opener) -> None:
    """It returns at once for enough events, and for fewer when they have waited long enough."""
    async with opened() as buffer:
        await put(buffer, chunk(1))
        with trio.fail_after(5):
            await buffer.ready("default", 10, 3600)
            await buffer.ready("default", 1000, 0.05)
        with trio.move_on_after(0.1) as waited:
            await buffer.ready("other", 1, 0)
        assert waited.cancelled_caught


class Model:
    """What a buffer should hold, as plain lists."""

    def __init__(self) -> None:
        self.waiting: deque[Chunk] = deque()
        self.leases: list[Lease] = []
        self.received = self.delivered = self.dead = 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "take", "take", "settle", "rest", "bury", "release", "reopen"]),
        st.integers(1, 40),
    ),
    max_size=25,
)


@given(STEPS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_story_ends_in_balance(opened: Opener, tmp_path: Path, steps: Sequence[tuple[str, int]]) -> None:
    """Whatever is put, taken, settled, kept, buried, released or reopened: a model of lists agrees."""
    for leftover in tmp_path.iterdir():
        leftover.unlink()
    trio.run(_tell, opened, steps)


async def _tell(opened: Opener, steps: Sequence[tuple[str, int]]) -> None:
    model = Model()
    todo = deque(enumerate(steps))
    durable: bool | None = None
    while todo or durable is None:
        async with opened() as buffer:
            durable = type(buffer).__name__ == "SqliteBuffer"
            _agree(buffer, model)
            while todo:
                number, (step, amount) = todo.popleft()
                if step == "reopen":
                    if durable:
                        break
                    continue
                await _step(buffer, model, step, number, amount)
                _agree(buffer, model)
        for lease in model.leases:  # a lease dies with its buffer
            model.waiting.extend(lease.chunks)
        model.leases.clear()


async def _step(buffer: Buffer, model: Model, step: str, number: int, amount: int) -> None:
    if step == "put":
        chunks = [chunk(number * 100 + n, events=amount) for n in range(1 + amount % 3)]
        await put(buffer, *chunks)
        model.waiting.extend(chunks)
        model.received += sum(one.events for one in chunks)
    elif step == "take":
        lease = await buffer.take(Limits(amount * 3, 2**40), "default")
        assert (lease is None) == (not model.waiting)
        if lease is not None:
            for one in lease.chunks:
                model.waiting.remove(one)
            model.leases.append(lease)
    elif model.leases:
        lease = model.leases.pop(amount % len(model.leases))
        if step == "release":
            await buffer.release(lease)
            model.waiting.extend(lease.chunks)
            return
        rest = lease.chunks[1:] if step == "rest" else ()
        buried = [dead()] if step == "bury" else []
        await buffer.settle(lease, buried, rest)
        model.waiting.extend(rest)
        model.dead += len(buried)
        model.delivered += sum(one.events for one in lease.chunks[: 1 if rest or step == "rest" else None])
        model.delivered -= len(buried)


def _agree(buffer: Buffer, model: Model) -> None:
    held = [*model.waiting, *(one for lease in model.leases for one in lease.chunks)]
    assert buffer.stats().events == sum(one.events for one in held)
    assert total(buffer, "received") == model.received
    assert total(buffer, "delivered") == model.delivered
    assert total(buffer, "dead", "rejected") == model.dead
    assert_balanced(buffer)
