"""What every buffer promises, asked of each: custody, limits, room, and books that balance."""

import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import config
from agent.buffer import (
    CLOCKS_KEPT,
    MOST_BURIALS,
    PURGED_AT_ONCE,
    SOCKETS_KEPT,
    Books,
    Buffer,
    DeadEvent,
    Entry,
    Kept,
    Lease,
    Limits,
    Replayed,
    leased,
)
from agent.buffer.dropping import QUIET_SECONDS, Dropping
from agent.buffer.entries import newly_dropped
from agent.buffer.lanes import MOST_LANES
from agent.buffer.memory import open_memory
from agent.buffer.sqlite import open_sqlite
from agent.clock import Clock
from agent.events import Burial, Chunk, Tally
from agent.metrics import Metrics
from agent.pack import inflate

ALL = Limits(10**9, 2**40)
YEAR = 365 * 86400 * 1_000_000


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


async def test_the_oldest_is_as_old_as_its_boots_clock_says(opened: Opener) -> None:
    """Setting the host's clock makes no event 56 years old."""
    async with opened() as buffer:
        assert buffer.stats().oldest is None
        now = Clock().now()
        await put(buffer, chunk(1, received_at=1_000_000, monotonic=now.monotonic - 5_000_000, boot=now.boot))
        oldest = buffer.stats().oldest
        assert oldest is not None
        assert 5_000_000 <= Clock().now().wall - oldest < 15_000_000


async def test_a_lease_keeps_its_limits(opened: Opener) -> None:
    """Neither more events nor more bytes, packed or not, than asked for, but always one chunk."""
    async with opened() as buffer:
        await put(buffer, *(chunks := [chunk(number) for number in range(9)]))
        packed = len(chunks[4].packed)
        assert crcs(await take(buffer, Limits(25, 2**40))) == [0, 1]
        assert crcs(await take(buffer, Limits(100, 100))) == [2]
        assert crcs(await take(buffer, Limits(1, 1))) == [3]
        assert crcs(await take(buffer, Limits(100, 2**40, 2 * packed))) == [4, 5]
        assert crcs(await take(buffer, Limits(100, 2**40, 1))) == [6]
        assert crcs(await take(buffer)) == [7, 8]
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


async def test_what_is_free_is_what_can_be_put(opened: Opener) -> None:
    """It falls by what is put until a put does not fit, and deliveries give it back."""
    async with opened(max_size=FULL) as buffer:
        before = buffer.stats().free_bytes
        await put(buffer, chunk(0, size=LARGE))
        assert before - 2 * LARGE < buffer.stats().free_bytes <= before - LARGE
        await fill(buffer)
        assert 0 <= buffer.stats().free_bytes < LARGE + 1000  # a chunk takes a little more than its bytes
        await buffer.settle(await take(buffer))
        assert buffer.stats().free_bytes > before - LARGE


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


async def test_what_a_full_buffer_drops_is_told_when_it_begins(opened: Opener) -> None:
    """One line, and how many it is so far."""
    with structlog.testing.capture_logs() as lines:
        async with opened(max_size=FULL, when_full="drop_newest") as buffer:
            while await put(buffer, chunk(1, size=LARGE)):
                assert buffer.stats().dropping == 0
            await put(buffer, chunk(2, size=LARGE))
            assert buffer.stats().dropping == total(buffer, "shed", "full_newest") == 20
            assert buffer.stats().filled > 0.9
    assert [line["event"] for line in lines] == ["the buffer is full; new events are dropped"]


async def test_what_a_full_buffer_dropped_is_told_when_it_has_stopped_for_a_while() -> None:
    """How many it was since it began, not since the buffer was made; and anew when it begins again."""
    shed = Entry("shed", "app", "full_newest")
    books = Books({shed: 7, Entry("shed", "app", "expired"): 7})
    dropping = Dropping("drop_newest", books)
    with structlog.testing.capture_logs() as lines:
        for now, more in ((0, 0), (10, 5), (10 + QUIET_SECONDS - 1, 5), (20 + QUIET_SECONDS, 0)):
            books[shed] += more
            dropping.look(books, now)
        assert (len(lines), dropping.events) == (1, 10)
        dropping.look(books, dropping.due)
        assert (lines[-1]["log_level"], lines[-1]["dropped"]) == ("info", 10)
        assert (dropping.events, dropping.due) == (0, inf)
        books[shed] += 1
        dropping.look(books, 1000)
    assert [line["log_level"] for line in lines] == ["warning", "info", "warning"]
    assert dropping.events == 1


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


async def test_age_is_told_by_the_clock_that_nobody_sets(opened: Opener) -> None:
    """What the wall clock showed when a chunk of this boot came makes it neither old nor young."""
    here = Clock().now()
    fresh: dict[str, Any] = {"boot": here.boot, "monotonic": here.monotonic}
    stale: dict[str, Any] = {"boot": here.boot, "monotonic": here.monotonic - 61_000_000}
    async with opened(max_age=60.0) as buffer:
        await put(
            buffer,
            chunk(1, received_at=here.wall, **stale),
            chunk(2, received_at=here.wall + 2 * YEAR, **stale),
            chunk(3, received_at=100_000_000, **fresh),  # a board that boots in 1970
            chunk(4, received_at=here.wall - 2 * YEAR, **fresh),
            chunk(5, received_at=here.wall + 2 * YEAR, **fresh),
        )
        await put(buffer, chunk(6))
        assert total(buffer, "shed", "expired") == 20
        lease = await take(buffer)
        assert crcs(lease) == [3, 4, 5, 6]
        assert lease.until is not None
        assert here.monotonic + 59_000_000 < lease.until <= here.monotonic + 60_000_000
        assert_balanced(buffer)


async def test_age_of_another_boots_events_is_told_by_its_clock_as_it_was_set(opened: Opener) -> None:
    """Where that was never set no age is known, and nothing goes for one that is guessed."""
    wall = Clock().now().wall
    async with opened(max_age=60.0) as buffer:
        await buffer.note_clock("set", wall - 100_000_000)
        await buffer.note_clock("never set", 50_000_000)
        await put(
            buffer,
            *[chunk(n, received_at=50_000_000 + n, boot="never set") for n in range(1, 1501)],
            chunk(1501, received_at=20_000_000, monotonic=10_000_000, boot="set"),
            chunk(1502, received_at=wall + 2 * YEAR, monotonic=10_000_000, boot="set"),
            chunk(1503, received_at=20_000_000, monotonic=95_000_000, boot="set"),
        )
        for _ in range(3):  # each commit looks at a thousand
            await put(buffer, chunk(1504))
        assert total(buffer, "shed", "expired") == 20
        assert total(buffer, "accepted") - 20 == buffer.stats().events
        lease = await take(buffer)
        assert {1501, 1502}.isdisjoint(crcs(lease))
        assert {1, 1500, 1503} <= set(crcs(lease))
        assert lease.until is not None
        await buffer.release(lease)
        await put(buffer, chunk(1505))
        assert total(buffer, "shed", "expired") == 20
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
        for nobody in (kept.newest + 1, 2**63, 2**200):
            assert await buffer.letter(nobody) is None
            assert await buffer.letters(nobody, 10) == []
            assert await buffer.purge([nobody, -nobody]) == 0


async def test_a_replayed_letter_waits_for_delivery_again(opened: Opener) -> None:
    """It is what it was, key, time and bytes, counted as replayed, and remembers its burial."""
    async with opened() as buffer:
        event = b'{"uuid":"u"}'
        await bury(buffer, dead(event=event, key="phc_x", boot="b", monotonic=7, attempts=3), dead())
        ids = [letter.id for letter in await buffer.letters(0, 10)]
        assert await buffer.replay([ids[0], ids[0], 10**6]) == Replayed(1, full=False)
        assert total(buffer, "replayed") == 1
        assert [letter.id for letter in await buffer.letters(0, 10)] == ids[1:]
        lease = await take(buffer)
        (again,) = lease.chunks
        assert (lease.key, again.boot, again.monotonic, again.received_at) == ("phc_x", "b", 7, 1)
        assert inflate(again.packed, again.size, again.crc) == event
        assert again.burials == (Burial(1, "rejected", "no", 3),)
        assert_balanced(buffer)
        await buffer.release(lease)
        assert await buffer.replay([ids[0]]) == Replayed(0, full=False)


async def test_what_is_refused_again_returns_with_its_history(opened: Opener) -> None:
    """Each burial is kept, up to a bound."""
    async with opened() as buffer:
        await bury(buffer, dead())
        for number in range(MOST_BURIALS + 5):
            (letter,) = await buffer.letters(0, 10)
            assert len(letter.burials) == min(number, MOST_BURIALS)
            assert await buffer.replay([letter.id]) == Replayed(1, full=False)
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


async def test_all_letters_up_to_one_are_purged(opened: Opener) -> None:
    """In lots, the oldest first, each under its own label; a newer one stays."""
    async with opened(durability="normal") as buffer:
        many = PURGED_AT_ONCE + 10
        await put(buffer, chunk(1, many), chunk(2, 2, key="a"))
        first, second = await take(buffer), await take(buffer)
        of_key, own = (first, second) if first.key else (second, first)
        await buffer.settle(own, [dead()] * many)
        await buffer.settle(of_key, [dead(key="a")] * 2)
        newest = (await buffer.letters_kept()).newest - 1
        assert await buffer.purge_upto(0) == await buffer.purge_upto(-(2**70)) == 0
        lots = [await buffer.purge_upto(newest) for _ in range(3)]
        assert lots == [PURGED_AT_ONCE, 11, 0]
        (left,) = await buffer.letters(0, 10)
        assert (left.id, left.key) == (newest + 1, "a")
        assert [total(buffer, "purged", label=label) for label in ("default", "other")] == [many, 1]
        assert await buffer.purge_upto(2**70) == 1
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
        origin: Any = {"received_at": old.received_at, "boot": old.boot, "monotonic": old.monotonic}
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


async def test_each_key_has_a_linger_of_its_own(opened: Opener) -> None:
    """It runs while others' is waited for, and begins anew for what a lease left."""
    async with opened() as buffer:
        await put(buffer, chunk(1, key="a"), chunk(2))
        began = trio.current_time()
        assert set(await buffer.ready("default", 1000, 0.2)) == {"a", None}
        await take(buffer, Limits(1, 1))
        await put(buffer, chunk(3, key="b"), chunk(4, 2000, key="c"))
        assert len(await buffer.ready("default", 1000, 0.2)) == 2  # "c" and the other of the first two
        assert trio.current_time() - began < 0.4
        await put(buffer, chunk(5, 1000, key="d"), chunk(6, key="d"))
        while (lease := await take(buffer, Limits(1, 1))).key != "d":
            pass
        assert crcs(lease) == [5]
        with trio.move_on_after(0.1) as waited:
            await buffer.ready("default", 1000, 3600, {"b"})
        assert waited.cancelled_caught


# --- keys that clients sent ----------------------------------------------------------------------


async def test_keys_can_be_passed_over(opened: Opener) -> None:
    """Whose events are held are not leased, the project's own no more than others; nobody else waits."""
    async with opened() as buffer:
        await put(buffer, chunk(1), chunk(2, key="a"), chunk(3, key="b"))
        assert crcs(await buffer.take(ALL, "default", {None, "a"})) == [3]
        assert await buffer.take(ALL, "default", {None, "a"}) is None
        assert crcs(await buffer.take(ALL, "default", {"a"})) == [1]
        assert crcs(await take(buffer)) == [2]


async def test_every_other_turn_is_the_projects_own(opened: Opener) -> None:
    """However many keys clients sent, half of the leases are of the configured one, while it has events."""
    async with opened() as buffer:
        await put(buffer, *[chunk(n, key=f"k{n % 5}") for n in range(10)], *[chunk(20 + n) for n in range(5)])
        one = Limits(1, 2**40)
        keys = [(await take(buffer, one)).key for _ in range(11)]
        assert keys[1::2] == [None] * 5
        assert sorted(map(str, keys[0::2])) == ["k0", "k0", "k1", "k2", "k3", "k4"]


async def test_ready_does_not_count_keys_that_are_passed_over(opened: Opener) -> None:
    """Whoever waits sleeps while only those have events, and wakes for the first of any other."""
    async with opened() as buffer:
        await put(buffer, chunk(1, 5000, key="a"), chunk(2, 10))
        held = {"a", None}
        with trio.move_on_after(0.1) as waited:
            await buffer.ready("default", 1, 0, held)
        assert waited.cancelled_caught
        async with trio.open_nursery() as nursery:
            woken = trio.Event()

            async def wait() -> None:
                await buffer.ready("default", 1, 0, held)
                woken.set()

            nursery.start_soon(wait)
            await put(buffer, chunk(3, key="a"))
            await put(buffer, chunk(4))
            await trio.testing.wait_all_tasks_blocked()
            assert not woken.is_set()
            await put(buffer, chunk(5, key="b"))
            await woken.wait()
        with trio.move_on_after(0.1) as waited:
            await buffer.ready("default", 1000, 3600, {"a"})
        assert waited.cancelled_caught  # a linger is not cut short by what is held
        await buffer.ready("default", 20, 3600, {"a"})


async def test_what_comes_back_wakes_whoever_waits(opened: Opener) -> None:
    """Also where the lease was of a key that clients sent."""
    async with opened() as buffer:
        await put(buffer, chunk(1, key="a"))
        lease = await take(buffer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(buffer.ready, "default", 1, 0)
            await trio.testing.wait_all_tasks_blocked()
            await buffer.release(lease)


async def test_their_events_stand_in_the_books_as_other(opened: Opener) -> None:
    """No key is a label; what is dead keeps its project and key, and goes the same way when replayed."""
    async with opened() as buffer:
        await put(buffer, chunk(1, key="phc_x"), chunk(2))
        lease = await take(buffer)
        if lease.key is None:
            lease, own = await take(buffer), lease
        else:
            own = await take(buffer)
        await buffer.settle(own)
        await buffer.settle(lease, [dead(key="phc_x"), dead(key="phc_x")], damaged=1, warned=3)
        assert total(buffer, "delivered", label="default") == 10
        assert total(buffer, "delivered", label="other") == 7
        assert total(buffer, "warned", label="other") == 3
        assert total(buffer, "dead", "rejected", "other") == 2
        assert not any("phc" in str(entry) for entry in buffer.books())
        first, second = await buffer.letters(0, 10)
        assert (first.project, first.key) == ("default", "phc_x")
        await buffer.replay([first.id])
        await buffer.purge([second.id])
        assert total(buffer, "replayed", label="other") == total(buffer, "purged", label="other") == 1
        again = await take(buffer)
        assert (again.project, again.key) == ("default", "phc_x")
        assert_balanced(buffer)


MANY = MOST_LANES + 100


async def test_each_of_very_many_keys_has_its_turn(opened: Opener) -> None:
    """More than are known at a time: each is leased and given back, and then delivered; none is forgotten."""
    async with opened(durability="normal") as buffer:
        await put(buffer, *[chunk(n, 1, key=f"k{n:05}") for n in range(MANY)])
        assert buffer.stats().unleased == {"default": MANY}
        seen: set[str | None] = set()
        while buffer.stats().events:
            await buffer.ready("default", 1, 0)
            lease = await take(buffer)
            if lease.key in seen:
                await buffer.settle(lease)
            else:
                seen.add(lease.key)
                await buffer.release(lease)
        assert len(seen) == MANY
        assert buffer.stats().unleased == {}
        assert total(buffer, "delivered", label="other") == MANY
        assert_balanced(buffer)


async def test_a_key_that_works_does_not_wait_for_a_crowd(opened: Opener) -> None:
    """What it sends is leased at once, though more keys wait than are known."""
    async with opened(durability="normal") as buffer:
        await put(buffer, chunk(0, key="works"))
        await buffer.settle(await take(buffer))
        strangers = {f"k{n:05}" for n in range(MANY)}
        await put(buffer, *[chunk(n, 1, key=key) for n, key in enumerate(sorted(strangers))])
        await put(buffer, chunk(MANY, key="works"))
        await buffer.ready("default", 1, 0, strangers)
        assert crcs(await buffer.take(ALL, "default", strangers)) == [MANY]


@pytest.mark.parametrize("many", [10, MANY])
async def test_age_takes_events_of_any_key(opened: Opener, many: int) -> None:
    """Those that are held, or wait in a crowd, no less than others."""
    async with opened(durability="normal", max_age=60.0) as buffer:
        old = time.time_ns() // 1000 - 61_000_000
        await put(buffer, *[chunk(n, 1, key=f"k{n}", received_at=old) for n in range(many)])
        for number in range(4):  # each commit sheds up to a thousand
            await put(buffer, chunk(number, key="young"))
        await put(buffer, chunk(5))
        assert total(buffer, "shed", "expired", "other") == many
        assert buffer.stats().unleased == {"default": 50}
        assert crcs(await take(buffer)) == [0, 1, 2, 3]
        assert_balanced(buffer)


async def test_a_full_buffer_drops_the_oldest_of_any_key(opened: Opener) -> None:
    """A key that is held for long fills it with what it alone loses."""
    async with opened(max_size=FULL, when_full="drop_oldest") as buffer:
        await put(buffer, *[chunk(n, size=LARGE, key=f"k{n % 2}") for n in range(4)])
        for number in range(4, 80):
            assert await put(buffer, chunk(number, size=LARGE)) == 10
        assert await buffer.take(ALL, "default", {None}) is None
        assert total(buffer, "shed", "full_oldest", "other") == 40
        assert_balanced(buffer)


# --- leases that end twice -------------------------------------------------------------------------


async def test_a_settled_lease_gives_nothing_back(opened: Opener) -> None:
    """What it kept may be another's before its block is left, and stays that one's."""
    async with opened() as buffer:
        await put(buffer, chunk(1), chunk(2))
        async with leased(buffer, await take(buffer)) as lease:
            await buffer.settle(lease, rest=lease.chunks[:1])
            other = await take(buffer)
            assert crcs(other) == [1]
        assert await buffer.take(ALL, "default") is None
        assert buffer.stats().unleased == {}
        await buffer.settle(other)
        assert buffer.stats().events == 0
        assert_balanced(buffer)


async def test_a_lease_that_was_given_back_gives_nothing_back_again(opened: Opener) -> None:
    """Its chunks may be another's by then."""
    async with opened() as buffer:
        await put(buffer, chunk(1))
        first = await take(buffer)
        await buffer.release(first)
        second = await take(buffer)
        await buffer.release(first)
        assert await buffer.take(ALL, "default") is None
        await buffer.settle(second)
        assert buffer.stats().events == 0
        assert_balanced(buffer)


async def test_what_came_back_is_leased_though_what_lay_behind_it_is_gone(opened: Opener) -> None:
    """It waits for what was there when it came back, but not for what has been shed since."""
    async with opened(max_age=60.0) as buffer:
        too_old = time.time_ns() // 1000 + 1_000_000
        await put(buffer, chunk(1, key="a"), chunk(2, key="a", received_at=too_old - 60_000_000))
        lease = await take(buffer, Limits(1, 1))
        assert crcs(lease) == [1]
        while total(buffer, "shed", "expired", "other") < 10:
            assert await buffer.take(ALL, "unknown") is None
            await trio.sleep(0.05)
        await buffer.release(lease)
        await buffer.ready("default", 1, 0)
        assert crcs(await take(buffer)) == [1]


class Model:
    """What a buffer should hold, as plain lists."""

    def __init__(self) -> None:
        self.waiting: deque[Chunk] = deque()
        self.leases: list[Lease] = []
        self.received = self.delivered = self.dead = 0


WITHOUT: Sequence[frozenset[str | None]] = (
    frozenset(), frozenset({"a"}), frozenset({None}), frozenset({None, "b"})
)  # fmt: skip
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
        keys = (None, "a", "b")
        chunks = [
            chunk(number * 100 + n, events=amount, key=keys[(amount + n) % 3]) for n in range(1 + amount % 3)
        ]
        await put(buffer, *chunks)
        model.waiting.extend(chunks)
        model.received += sum(one.events for one in chunks)
    elif step == "take":
        without = WITHOUT[amount % len(WITHOUT)]
        lease = await buffer.take(Limits(amount * 3, 2**40), "default", without)
        assert (lease is None) == all(one.key in without for one in model.waiting)
        if lease is not None:
            assert {lease.key} == {one.key for one in lease.chunks}
            assert lease.key not in without
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
        buried = [dead(key=lease.key)] if step == "bury" else []
        await buffer.settle(lease, buried, rest)
        model.waiting.extend(rest)
        model.dead += len(buried)
        model.delivered += sum(one.events for one in lease.chunks[: 1 if rest or step == "rest" else None])
        model.delivered -= len(buried)


def _agree(buffer: Buffer, model: Model) -> None:
    held = [*model.waiting, *(one for lease in model.leases for one in lease.chunks)]
    assert buffer.stats().events == sum(one.events for one in held)
    assert sum(buffer.stats().unleased.values()) == sum(one.events for one in model.waiting)
    assert total(buffer, "received") == model.received
    assert total(buffer, "delivered") == model.delivered
    assert total(buffer, "dead", "rejected") == model.dead
    assert_balanced(buffer)


async def test_it_answers(opened: Opener) -> None:
    """Also while it is full and a put waits: that is no standstill."""
    async with opened(max_size=FULL, when_full="block") as buffer, trio.open_nursery() as nursery:
        await buffer.answer()
        nursery.start_soon(buffer.put, [chunk(1, size=2 * FULL)], tally(10))
        await trio.testing.wait_all_tasks_blocked()
        await buffer.answer()
        nursery.cancel_scope.cancel()


async def test_what_is_there_can_be_looked_at(opened: Opener) -> None:
    """Chunks on lease and not, some at a time, up to the newest of a moment; none is taken from delivery."""
    async with opened() as buffer:
        assert await buffer.newest() == 0
        await put(buffer, *(chunk(number) for number in range(4)))
        lease = await take(buffer, Limits(20, 2**40))
        newest = await buffer.newest()
        await put(buffer, chunk(4))
        first = await buffer.beyond(0, newest, 200)
        assert [(one.crc, one.key) for _, one in first] == [(0, None), (1, None)]
        rest = await buffer.beyond(first[-1][0], newest, 10**6)
        assert [one.crc for _, one in rest] == [2, 3]
        assert rest[-1][0] == newest
        assert len(await buffer.beyond(0, newest, 1)) == 1  # one at least, however large
        assert await buffer.beyond(newest, newest, 10**6) == []
        await buffer.settle(lease)
        assert [one.crc for _, one in await buffer.beyond(0, newest, 10**6)] == [2, 3]
        assert buffer.stats().events == 30
