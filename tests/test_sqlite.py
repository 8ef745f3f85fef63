"""The buffer's file: owned by one, bounded, refused where it is not ours, safe from kills and full disks."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import trio
import trio.testing
from processes import ENVIRONMENT
from sqlite_utils import Database
from test_buffer_contract import ALL, FULL, LARGE, assert_balanced, chunk, dead, fill, put, take, total

from agent import AgentError, config
from agent.buffer import BufferBroken, BufferBusy, Entry, Limits
from agent.buffer.failing import QUIET_SECONDS, Failing
from agent.buffer.file import APPLICATION_ID, Room
from agent.buffer.letters import COUNT
from agent.buffer.schema import first_tables
from agent.buffer.sqlite import SqliteBuffer, open_sqlite
from agent.events import GIVEN, LONG
from agent.metrics import Metrics
from agent.pack import crc32, deflate


@asynccontextmanager
async def opened(path: Path, **settings: Any) -> AsyncIterator[SqliteBuffer]:
    async with open_sqlite(config.Buffer(path=str(path), **settings), Metrics()) as buffer:
        with trio.fail_after(60):
            yield buffer


async def broken(path: Path) -> AgentError:
    """The `AgentError` that opening it raises."""
    with pytest.raises(AgentError) as caught:
        async with opened(path):
            pass
    return caught.value


async def test_what_was_put_is_there_after_a_reopening(tmp_path: Path) -> None:
    """Chunks, leases that died, dead letters and books: all of it is found again."""
    path = tmp_path / "b.db"
    async with opened(path) as buffer:
        chunks = [chunk(number) for number in range(3)]
        await put(buffer, *chunks)
        await take(buffer)
        books = buffer.books()
    async with opened(path) as buffer:
        assert buffer.books() == books
        assert list((await take(buffer)).chunks) == chunks
        assert_balanced(buffer)


async def test_an_older_file_is_brought_forward(tmp_path: Path) -> None:
    """What a former version wrote is read by this one; of its chunks nothing is assumed."""
    path = tmp_path / "b.db"
    data = b"{}" + b",{}" * 9
    packed = {"size": len(data), "crc": crc32(data), "packed": deflate(data)}
    old = msgspec.structs.replace(chunk(1), **packed)  # it has no seal, so it is opened
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        first_tables(Database(database))
        database.execute(
            "INSERT INTO chunk VALUES (1, 'default', NULL, 10, ?, ?, ?, ?, ?, ?, ?)",
            (old.size, old.crc, old.received_at, old.boot, old.monotonic, len(old.packed), old.packed),
        )
        database.execute("INSERT INTO dead VALUES (3, 'default', NULL, 'rejected', 'no', 5, 4, 2, '{}')")
        database.execute("INSERT INTO books VALUES ('received', 'app', '', 11), ('accepted', 'app', '', 11)")
        database.execute("INSERT INTO books VALUES ('dead', 'default', 'rejected', 1)")
        done = {"migration_set": "capture-agent", "name": "first_tables", "applied_at": "2026-11-01"}
        Database(database).table("_sqlite_migrations").insert(done)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("PRAGMA user_version = 1")
    database.close()
    async with opened(path) as buffer:
        assert list((await take(buffer)).chunks) == [msgspec.structs.replace(old, marks=GIVEN | LONG)]
        (letter,) = await buffer.letters(0, 10)
        assert (letter.id, letter.at, letter.attempts, letter.marks) == (3, 5, 2, GIVEN | LONG)
        assert_balanced(buffer)


async def test_dead_letters_are_counted_by_an_index(tmp_path: Path) -> None:
    """A start does not read them, of which there may be a million; those of older versions are in the sum."""
    path = tmp_path / "b.db"
    async with opened(path) as buffer:
        await put(buffer, chunk(1))
        lease = await take(buffer)
        await buffer.settle(lease, [dead(event=b'{"n":%d}' % number) for number in range(10)])
    with sqlite3.connect(path) as database:
        plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {COUNT}")]
        assert "SCAN dead" in plan[0]
        assert "COVERING INDEX" in plan[0]
        counted = database.execute(COUNT).fetchone()
        assert counted == (10, 10 * len(b'{"n":1}'), 10)
        database.execute("UPDATE dead SET size = NULL WHERE id < 5")
        assert database.execute(COUNT).fetchone() == counted
    database.close()


async def test_what_was_dropped_is_not_booked_again_after_a_restart(tmp_path: Path) -> None:
    """The notes of the sockets are on disk with the books."""
    path = tmp_path / "b.db"
    async with opened(path) as buffer:
        await buffer.note_drops("app", "a", 7)
    async with opened(path) as buffer:
        await buffer.note_drops("app", "a", 10)
        assert buffer.books()[Entry("dropped", "app", "")] == 10


async def test_one_owner(tmp_path: Path) -> None:
    """A second opener is told who has it, and may try again later; the lock dies with its owner."""
    path = tmp_path / "b.db"
    async with opened(path):
        error = await broken(path)
        assert isinstance(error, BufferBusy)
        assert error.exit_code == 75
        assert f"process {os.getpid()}" in str(error)
    async with opened(path):
        pass


async def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    """A newer agent's file, another program's, and no database at all: each unharmed, each with a hint."""
    newer, other, text = tmp_path / "newer", tmp_path / "other", tmp_path / "text"
    async with opened(newer):
        pass
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 99")
        database.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('capture-agent', 'later')"
        )
    database.close()
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()
    text.write_text("this is text, and long enough to be looked at as the header of a database" * 3)
    for path, said in (
        (newer, "newer capture-agent"),
        (other, "another program's"),
        (text, "not a database of"),
        (tmp_path / "no" / "b.db", "does not exist"),
    ):
        before = path.read_bytes() if path.exists() else None
        error = await broken(path)
        assert isinstance(error, BufferBroken)
        assert said in str(error)
        assert error.hint
        assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize("when_full", ["block", "drop_oldest", "drop_newest"])
async def test_files_keep_their_bound(tmp_path: Path, when_full: str) -> None:
    """Under a flood, all files together never exceed `max_size`, and settling always finds room."""
    path = tmp_path / "b.db"
    async with opened(path, max_size=FULL, when_full=when_full) as buffer:
        for number in range(150):
            with trio.move_on_after(0.2) as patience:
                await put(buffer, chunk(number, size=LARGE // 2))
            if patience.cancelled_caught:
                break
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= FULL
        while (lease := await buffer.take(ALL, "default")) is not None:
            await buffer.settle(lease)
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= FULL
        assert_balanced(buffer)
        assert buffer.stats().events == 0


# The environment of a Python that finds the agent and these tests.
CHILDS = {**ENVIRONMENT, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}

CHILD = """
import sys, trio
from agent import config
from agent.buffer.sqlite import open_sqlite
from agent.metrics import Metrics
from test_buffer_contract import chunk, put

async def main():
    async with open_sqlite(config.Buffer(path=sys.argv[1]), Metrics()) as buffer:
        async def one(lane):
            for number in range(10**9):
                await put(buffer, chunk(lane * 10**6 + number, size=3000))
                print(lane * 10**6 + number, flush=True)
        async with trio.open_nursery() as nursery:
            for lane in range(4):
                nursery.start_soon(one, lane)

trio.run(main)
"""


@pytest.mark.parametrize("patience", [50, 400])
async def test_kill_9_loses_nothing_that_was_promised(tmp_path: Path, patience: int) -> None:
    """Whatever `put` has returned for is in the file after the process was killed."""
    path = tmp_path / "b.db"
    command = [sys.executable, "-c", CHILD, str(path)]
    promised: set[int] = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=CHILDS, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            promised.add(int(line))
            if len(promised) == patience:
                child.send_signal(signal.SIGKILL)
        # What it said before it died is promised as well.
    async with opened(path) as buffer:
        found: set[int] = set()
        while (lease := await buffer.take(ALL, "default")) is not None:
            found |= {one.crc for one in lease.chunks}
        assert promised <= found
        assert_balanced(buffer)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 24 MiB; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no filesystem may be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def leave(disk: Path, size: int) -> None:
    """Have others take all of a disk but so many bytes."""
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - size)))


async def test_a_full_disk_makes_senders_wait(small_disk: Path) -> None:
    """Nothing is acknowledged that is not on disk; when there is room again it goes on by itself."""
    ballast = small_disk / "ballast"
    async with opened(small_disk / "b.db", max_size=64 * 2**20) as buffer:
        await put(buffer, chunk(0, size=LARGE))
        leave(small_disk, 3 * 2**20)
        taken = 1
        for number in range(1, 20):
            with trio.move_on_after(0.3) as patience:
                await put(buffer, chunk(number, size=LARGE))
            if patience.cancelled_caught:
                break
            taken += 1
        assert patience.cancelled_caught
        assert "full" in buffer.trouble
        assert buffer.stats().events == taken * 10
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, buffer, chunk(100, size=LARGE))
            await trio.sleep(0.1)
            ballast.unlink()
        assert not buffer.trouble
        assert buffer.stats().events == taken * 10 + 10
        assert_balanced(buffer)


async def test_a_disk_that_has_room_for_the_reserve_but_not_beside_the_log(small_disk: Path) -> None:
    """When all is delivered, by what the reserve had kept, the log is emptied and events are taken again."""
    room = Room.of(64 * 2**20)
    leave(small_disk, room.reserve + room.wal * 3 // 4)
    async with opened(small_disk / "b.db", max_size=64 * 2**20) as buffer:
        number = 0
        with trio.move_on_after(1):
            while number < 100:
                await put(buffer, chunk(number, size=LARGE))
                number += 1
        assert 0 < number < 100
        free = os.statvfs(small_disk)
        (small_disk / "more").write_bytes(bytes(free.f_bavail * free.f_frsize))
        while buffer.stats().events:
            await buffer.settle(await take(buffer))
        with trio.fail_after(5):
            await put(buffer, chunk(number))
        assert (small_disk / "b.db.reserve").exists()
        assert_balanced(buffer)


async def test_what_a_full_disk_has_no_room_for_at_a_stop_is_counted(small_disk: Path) -> None:
    """As what a full buffer has none for is: nothing vanishes uncounted."""
    leave(small_disk, Room.of(64 * 2**20).reserve // 2)
    async with opened(small_disk / "b.db", max_size=64 * 2**20) as buffer, trio.open_nursery() as nursery:
        nursery.start_soon(put, buffer, chunk(1))
        while not buffer.trouble:
            await trio.sleep(0.01)
        buffer.close_door()
    assert total(buffer, "shed", "shutdown") == 10
    assert_balanced(buffer)


async def test_a_full_disk_is_no_full_buffer(small_disk: Path) -> None:
    """Neither while it lasts, nor at a stop, is anything said of the room in it."""
    with structlog.testing.capture_logs() as lines:
        async with opened(small_disk / "b.db", max_size=64 * 2**20) as buffer, trio.open_nursery() as nursery:
            await put(buffer, chunk(0, size=LARGE))
            leave(small_disk, 256 * 1024)
            nursery.start_soon(put, buffer, chunk(1, size=LARGE))
            await trio.sleep(1.5)  # and it was tried again
            await buffer.release(await take(buffer))
            assert buffer.stats().waiting == 1
            nursery.cancel_scope.cancel()
    assert [line["event"] for line in lines] == ["the buffer cannot be written; senders wait"]


def test_a_disk_that_now_and_then_takes_a_write_is_one_trouble() -> None:
    """Its end is told when it has been well for a while, and the next one anew."""
    failing = Failing()
    with structlog.testing.capture_logs() as lines:
        for now in range(0, 100, 2):
            failing.look("disk full" if now % 4 else "", now)
        assert [line["log_level"] for line in lines] == ["error"]
        assert failing.due == 98 + QUIET_SECONDS
        failing.look("", failing.due)
        assert (lines[-1]["log_level"], failing.due) == ("info", inf)
        failing.look("", 1000)
        failing.look("disk full", 1001)
    assert [line["log_level"] for line in lines] == ["error", "info", "error"]


async def test_a_disk_that_takes_no_file_is_not_said_to_be_full(tmp_path: Path) -> None:
    """One that is full passes, what else is wrong has to be mended: a person is told what it is."""
    reserve = tmp_path / "b.db.reserve"
    reserve.mkdir()
    async with opened(tmp_path / "b.db") as buffer, trio.open_nursery() as nursery:
        nursery.start_soon(put, buffer, chunk(1))
        while not buffer.trouble:
            await trio.sleep(0.01)
        assert buffer.trouble == f"{reserve}: this is no file: move it away"
        reserve.rmdir()
        while buffer.trouble:
            await trio.sleep(0.01)
        assert buffer.stats().events == 10


async def test_who_leaves_a_full_buffer_makes_no_room(tmp_path: Path) -> None:
    """It is told to have room when it has."""
    with structlog.testing.capture_logs() as lines:
        async with opened(tmp_path / "b.db", max_size=FULL) as buffer:
            await fill(buffer)
            lease = await take(buffer)
            assert [line["event"] for line in lines] == [
                "the buffer is full; senders wait until events are delivered"
            ]
            await buffer.settle(lease)
            await put(buffer, chunk(1, size=LARGE))
    assert [line["event"] for line in lines[1:]] == ["the buffer has room again"]


async def test_room_is_found_again_while_deliveries_fail(small_disk: Path) -> None:
    """The trouble stays told and is tried again every second, however often others ask for something."""
    ballast = small_disk / "ballast"
    async with opened(small_disk / "b.db", max_size=64 * 2**20) as buffer, trio.open_nursery() as nursery:
        await put(buffer, chunk(0, size=LARGE))
        leave(small_disk, 256 * 1024)

        async def fail() -> None:
            while True:
                if (lease := await buffer.take(ALL, "default")) is not None:
                    await buffer.release(lease)
                await trio.sleep(0.05)

        nursery.start_soon(fail)
        async with trio.open_nursery() as senders:
            senders.start_soon(put, buffer, chunk(1, size=LARGE))
            senders.start_soon(put, buffer, chunk(2, size=LARGE))
            for _ in range(20):
                await trio.sleep(0.1)
                assert "full" in buffer.trouble
            ballast.unlink()
            senders.cancel_scope.deadline = trio.current_time() + 5
        assert not senders.cancel_scope.cancelled_caught
        assert not buffer.trouble
        nursery.cancel_scope.cancel()


FILL = """
import sys, trio
from pathlib import Path
from test_buffer_contract import chunk, put
from test_sqlite import LARGE, opened

async def main():
    path, taken = Path(sys.argv[1]), 0
    async with opened(path, max_size=64 * 2**20) as buffer:
        while True:
            with trio.move_on_after(1) as patience:
                await put(buffer, chunk(taken, size=LARGE))
            if patience.cancelled_caught:
                break
            taken += 1
        with open(path.with_name("ballast"), "wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                print(buffer.stats().events, file=sys.stderr, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_it_opens_on_a_full_disk(small_disk: Path) -> None:
    """What a killed agent left on a disk without any room is there at the next start."""
    path = small_disk / "b.db"
    command = [sys.executable, "-c", FILL, str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=CHILDS) as child:
        assert child.stderr is not None
        promised = int(child.stderr.readline())
        child.kill()
    assert os.statvfs(small_disk).f_bavail == 0
    async with opened(path, max_size=64 * 2**20) as buffer:
        assert buffer.stats().events == promised > 0
        assert await buffer.take(ALL, "default") is not None


async def test_deliveries_go_on_while_the_disk_is_full(small_disk: Path) -> None:
    """Settling is what makes room, so it must not wait for any."""
    async with opened(small_disk / "b.db", max_size=64 * 2**20) as buffer:
        for number in range(12):
            await put(buffer, chunk(number, size=LARGE))
        leave(small_disk, 256 * 1024)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, buffer, chunk(100, size=LARGE))
            await trio.sleep(0.1)
            while (lease := await buffer.take(ALL, "default")) is not None:
                await buffer.settle(lease)
                if total(buffer, "delivered") >= 120:
                    break
            nursery.cancel_scope.cancel()
        assert total(buffer, "delivered") >= 120
        assert_balanced(buffer)


async def test_space_is_given_back(tmp_path: Path) -> None:
    """A file that was large is small again, page for page of what was asked for."""
    path = tmp_path / "b.db"
    async with opened(path) as buffer:
        for number in range(20):
            await put(buffer, chunk(number, size=LARGE))
        while (lease := await buffer.take(ALL, "default")) is not None:
            await buffer.settle(lease)
        store = buffer._store  # how soon is no promise; that it does is
        pages = store.free_pages
        assert pages > 500
        while store.free_pages:
            before = store.free_pages
            store.give_back_pages(64)
            assert store.free_pages == max(0, before - 64)
        assert path.stat().st_size < 2**20


async def test_what_cannot_be_settled_is_neither_taken_again_nor_settled_twice(tmp_path: Path) -> None:
    """While nothing can be written what is delivered stays out, also given back; then it is settled once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with opened(tmp_path / "b.db", max_size=64 * 2**20) as buffer:
        for number in range(20):
            await put(buffer, chunk(number, size=LARGE // 4))
        delivered = 0
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # behind it is all that would be written
            while (lease := await buffer.take(Limits(50, 2**30), "default")) is not None:
                delivered += sum(piece.events for piece in lease.chunks)
                with trio.move_on_after(0):
                    await buffer.settle(lease)
                await buffer.release(lease)
            assert buffer.books()[Entry("delivered", "default", "")] < delivered
            assert "I/O" in buffer.trouble
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with trio.fail_after(20):
            while buffer.stats().events:
                await trio.sleep(0.05)
        books = buffer.books()
        assert books[Entry("delivered", "default", "")] == books[Entry("accepted", "app", "")] == delivered


async def test_it_does_not_answer_while_its_writer_hangs(tmp_path: Path) -> None:
    """Until what hangs has ended; then it does."""
    disk = threading.Event()
    async with opened(tmp_path / "b.db") as buffer, trio.open_nursery() as nursery:
        nursery.start_soon(buffer._run, lambda _store: disk.wait())
        await trio.testing.wait_all_tasks_blocked()
        answered = trio.Event()

        async def ask() -> None:
            await buffer.answer()
            answered.set()

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert not answered.is_set()
        disk.set()
        await answered.wait()


@asynccontextmanager
async def held_up(buffer: SqliteBuffer) -> AsyncIterator[None]:
    """Within the block a group is taken off the queues, and waits for the file."""
    await buffer.answer()
    await buffer._limiter.acquire_on_behalf_of(buffer)
    try:
        yield
        await trio.testing.wait_all_tasks_blocked()
    finally:
        buffer._limiter.release_on_behalf_of(buffer)


async def test_a_put_that_is_cancelled_while_it_is_tried_is_let_go(tmp_path: Path) -> None:
    """As soon as it is known to have found no room: nobody waits for an answer that will not come."""
    scope = trio.CancelScope()

    async def caller() -> None:
        with scope:
            await put(buffer, chunk(1000, size=LARGE))

    async with opened(tmp_path / "b.db", max_size=FULL) as buffer, trio.open_nursery() as nursery:
        await fill(buffer)
        async with held_up(buffer):
            nursery.start_soon(caller)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
        await buffer.answer()
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks
        assert_balanced(buffer)


async def test_a_put_that_is_tried_again_is_still_waiting(tmp_path: Path) -> None:
    """Whoever looks at that moment is not told that there is room."""
    async with opened(tmp_path / "b.db", max_size=FULL) as buffer, trio.open_nursery() as nursery:
        await fill(buffer)
        nursery.start_soon(put, buffer, chunk(1000, size=LARGE))
        await trio.testing.wait_all_tasks_blocked()
        await buffer.answer()
        assert buffer.stats().waiting == 1
        async with held_up(buffer):
            buffer.close_door()
            await trio.testing.wait_all_tasks_blocked()
            assert buffer.stats().waiting == 1
        await buffer.answer()
        assert buffer.stats().waiting == 0
        assert total(buffer, "shed", "shutdown") == 10


async def test_a_page_of_letters_is_bounded_in_bytes(tmp_path: Path) -> None:
    """However large they are: nobody holds hundreds of MiB to look at them, and each is on one page."""
    async with opened(tmp_path / "b.db") as buffer:
        await put(buffer, chunk(1, 20))
        await buffer.settle(await take(buffer), [dead(event=b"x" * 2**20)] * 20)
        pages, after = [], 0
        while page := await buffer.letters(after, 500):
            pages.append(len(page))
            after = page[-1].id
        assert pages == [9, 9, 2]
