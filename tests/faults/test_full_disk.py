"""A bound that is a bound, on a real filesystem of 64 MiB, and writes that fail at any place."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from test_buffer_contract import ALL, assert_balanced, bury, chunk, dead, put, total
from test_sqlite import CHILDS, opened

from agent.buffer import Kept

MIB = 2**20
DISK = 64 * MIB
POLICIES = ("block", "drop_oldest", "drop_newest")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no filesystem may be mounted here: only root may")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def used(folder: Path) -> int:
    """What the buffer's files take of the disk, and say that they take."""
    return sum(max(file.stat().st_size, file.stat().st_blocks * 512) for file in folder.glob("buffer.db*"))


def fill(folder: Path) -> Path:
    """Another program that writes until the disk has not a byte left."""
    ballast = folder / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


async def flooded(buffer: Kept, folder: Path, bound: int) -> int:
    """Put three times what there is room for, or until a sender has waited; how many events were taken."""
    taken = 0
    for number in range(3 * DISK // (256 * 1024)):
        with trio.move_on_after(0.3) as patience:
            taken += await put(buffer, chunk(number, size=256 * 1024))
        assert used(folder) <= bound
        if patience.cancelled_caught:
            break
    return taken


async def delivered(buffer: Kept, folder: Path, bound: int) -> int:
    """PostHog is back: everything is taken and settled; how many events."""
    count = 0
    while (lease := await buffer.take(ALL._replace(size=8 * MIB), "default")) is not None:
        count += sum(one.events for one in lease.chunks)
        with trio.fail_after(5):
            await buffer.settle(lease)
        assert used(folder) <= bound
    return count


@pytest.mark.parametrize("when_full", POLICIES)
@pytest.mark.parametrize("max_size", [48 * MIB, 1024 * MIB], ids=["its own bound", "the disk's"])
async def test_a_flood_on_a_small_disk(disk: Path, when_full: str, max_size: int) -> None:
    """Whatever fills first: never more than the bound, the truth for senders, and afterwards it goes on."""
    bound = min(max_size, DISK)
    async with opened(disk / "buffer.db", max_size=max_size, when_full=when_full) as buffer:
        await bury(buffer, *(dead(event=b"x" * 100_000) for _ in range(80)))
        taken = await flooded(buffer, disk, bound)
        waits = when_full == "block" or max_size > DISK
        assert (buffer.stats().waiting or total(buffer, "shed", when_full.replace("drop", "full"))) or waits
        assert_balanced(buffer)
        shed = total(buffer, "shed", "full_oldest")
        assert await delivered(buffer, disk, bound) == taken - shed
        with trio.fail_after(10):
            assert await put(buffer, chunk(0, size=256 * 1024)) == 10
        assert not buffer.trouble
        assert_balanced(buffer)
    assert used(disk) <= bound


@pytest.mark.parametrize("share", [1, 2, 4])
async def test_a_disk_without_a_byte_drains(disk: Path, share: int) -> None:
    """Another program took the last byte: what is there is delivered, and then new events are taken."""
    async with opened(disk / "buffer.db", max_size=48 * MIB) as buffer:
        taken = 0
        for number in range(160 // share):
            with trio.move_on_after(0.3) as patience:
                taken += await put(buffer, chunk(number, size=256 * 1024))
            if patience.cancelled_caught:
                break
        fill(disk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, buffer, chunk(10**6, size=256 * 1024))
            await trio.sleep(0.1)
            assert await delivered(buffer, disk, 48 * MIB) >= taken
            nursery.cancel_scope.deadline = trio.current_time() + 20
        assert not nursery.cancel_scope.cancelled_caught, "senders wait though there is room"
        await delivered(buffer, disk, 48 * MIB)
        assert buffer.stats().events == 0
        assert_balanced(buffer)


async def test_a_disk_that_is_full_at_the_start(disk: Path) -> None:
    """It opens, delivers, tells its senders the truth, and takes events when there is room."""
    ballast = fill(disk)
    ballast.write_bytes(bytes(DISK - 2 * MIB))
    async with opened(disk / "buffer.db", max_size=48 * MIB) as buffer:
        with trio.move_on_after(0.5) as patience:
            await put(buffer, chunk(1))
        assert patience.cancelled_caught
        assert "full" in buffer.trouble
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, buffer, chunk(2))
            await trio.sleep(0.1)
            ballast.unlink()
            nursery.cancel_scope.deadline = trio.current_time() + 5
        assert not nursery.cancel_scope.cancelled_caught
        assert buffer.stats().events == 10
        assert not buffer.trouble


# So many calls write in the whole story, about; the long form fails each of the first so many.
FIRST = 300


@pytest.mark.parametrize(
    "places", [range(0, FIRST, 23), pytest.param(range(FIRST), marks=pytest.mark.slow)], ids=["some", "each"]
)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_writes_that_fail(
    shim: Path, places: range, error: int, record_property: Callable[[str, object], None]
) -> None:
    """One write or sync fails, or all for a while: nothing acknowledged is lost, and it goes on by itself."""
    failing = [(place, count, error) for place in places for count in (1, 40)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("failing.py")), json.dumps(failing)],
        env={
            **CHILDS,
            "LD_PRELOAD": str(shim),
            "PYTHONPATH": f"{CHILDS['PYTHONPATH']}:{Path(__file__).parent}",
        },
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stderr.splitlines()[-1])
    record_property(
        "told", f"{len(failing)} failures among {told['calls']} calls, {len(told['wrong'])} wrong"
    )
    assert not told["wrong"]
