"""Somebody takes the buffer's files away while it is open: it goes on, and loses nothing."""

import os
import random
import shutil
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from damaged import LOG, chunk_of, events, events_in, uuids
from processes import configure, running
from sources import line
from test_buffer_contract import assert_balanced, put, take, total
from test_sqlite import opened

from agent.buffer import Kept, Limits
from agent.buffer.evidence import kept
from agent.crash import VARIABLE
from agent.sink import Reply, Sink, serving

# In which an idle buffer has looked: once a second, and this machine may be busy.
LOOKED_SECONDS = 10
MINE = b"what somebody put there"


def remove(*ends: str) -> Callable[[Path], None]:
    """These of the files lose their names."""

    def change(path: Path) -> None:
        for end in ends:
            os.unlink(f"{path}{end}")

    return change


def replace(*ends: str) -> Callable[[Path], None]:
    """Something else takes the names of these."""

    def change(path: Path) -> None:
        for end in ends:
            other = path.with_name("other")
            other.write_bytes(MINE)
            os.rename(other, f"{path}{end}")

    return change


def restore_a_backup(path: Path) -> None:
    """As editors and rsync write a file."""
    shutil.copy(path, path.with_name("other"))
    os.rename(path.with_name("other"), path)


def move(path: Path) -> None:
    """It has another name now."""
    os.rename(path, path.with_name("moved"))


def link(path: Path) -> None:
    """It lies somewhere else now, with a link to it."""
    path.with_name("elsewhere").mkdir()
    os.rename(path, path.with_name("elsewhere") / "data")
    path.symlink_to("elsewhere/data")


def link_another(path: Path) -> None:
    """A link leads to what somebody has somewhere else."""
    path.with_name("theirs").write_bytes(MINE)
    path.unlink()
    path.symlink_to("theirs")


# And how many files that are not the buffer's own there are then.
CHANGES = {
    "database": (remove(""), 0),
    "log": (remove(LOG), 0),
    "both": (remove("", LOG), 0),
    "all": (remove("", LOG, ".lock", ".reserve"), 0),
    "moved": (move, 0),
    "linked": (link, 0),
    "a link to another": (link_another, 0),
    "a backup": (restore_a_backup, 1),
    "another database": (replace(""), 1),
    "another log": (replace(LOG), 1),
    "others": (replace("", LOG), 2),
    "removed, another log": (lambda path: (remove("")(path), replace(LOG)(path)), 1),
}


def as_killed(path: Path) -> Path:
    """What is there by its names, as a kill leaves it."""
    (folder := path.with_name("killed")).mkdir()
    for name in ("", LOG):
        with suppress(FileNotFoundError):
            shutil.copy(f"{path}{name}", folder)
    return folder / path.name


async def waiting(buffer: Kept) -> set[str]:
    """The events that wait; each once."""
    found: list[str] = []
    while (lease := await buffer.take(Limits(10**6, 2**30), "default")) is not None:
        for one in lease.chunks:
            found += uuids(events_in(one))
    assert len(found) == len(set(found))
    return set(found)


def some(seed: int) -> list[bytes]:
    """New events."""
    return events(random.Random(seed), 20, 300)


def ids(*parts: Iterable[bytes]) -> set[str]:
    """The uuids of events."""
    return {uuid for part in parts for uuid in uuids(list(part))}


@pytest.mark.parametrize("durability", ["full", "normal"])
@pytest.mark.parametrize(("change", "strangers"), CHANGES.values(), ids=CHANGES)
async def test_files_that_lose_their_names(
    tmp_path: Path, change: Callable[[Path], object], strangers: int, durability: str
) -> None:
    """What is acknowledged after it is there, and what was before; leases go on; strangers are kept."""
    path = tmp_path / "buffer.db"
    async with opened(path, durability=durability) as buffer:
        await put(buffer, chunk_of(some(1)))
        await put(buffer, chunk_of(some(2)))
        lease = await take(buffer, Limits(20, 2**30))
        change(path)
        assert await put(buffer, chunk_of(some(3))) == 20
        await buffer.settle(lease)
        killed = as_killed(path)
        assert not buffer.trouble
        assert_balanced(buffer)
        await put(buffer, chunk_of(some(4)))
    for place, there in ((killed, ids(some(2), some(3))), (path, ids(some(2), some(3), some(4)))):
        async with opened(place) as buffer:
            assert_balanced(buffer)
            assert not total(buffer, "shed", "damaged")
            assert await waiting(buffer) == there
    aside = [file.read_bytes() for file in tmp_path.glob("buffer.db.damaged-*")]
    assert len(aside) == strangers
    assert change is restore_a_backup or set(aside) <= {MINE}
    assert Path(f"{path}.lock").exists()
    assert not Path(f"{path}.again").exists()
    assert change is not link_another or path.with_name("theirs").read_bytes() == MINE


async def test_an_idle_buffer_looks_too(tmp_path: Path) -> None:
    """Nothing is asked of it after its file was removed."""
    path = tmp_path / "buffer.db"
    async with opened(path) as buffer:
        await put(buffer, chunk_of(some(1)))
        path.unlink()
        with trio.fail_after(LOOKED_SECONDS):
            while not path.exists() or Path(f"{path}.again").exists():
                await trio.sleep(0.05)
        killed = as_killed(path)
    async with opened(killed) as buffer:
        assert await waiting(buffer) == ids(some(1))


async def test_a_buffer_that_stops_looks_too(tmp_path: Path) -> None:
    """It stops just after its files were removed."""
    path = tmp_path / "buffer.db"
    async with opened(path) as buffer:
        await put(buffer, chunk_of(some(1)))
        remove("", LOG)(path)
    async with opened(path) as buffer:
        assert await waiting(buffer) == ids(some(1))


async def test_nothing_is_acknowledged_that_has_no_name(tmp_path: Path) -> None:
    """Where a directory is in the way puts wait and say why; deliveries go on; nothing comes twice."""
    path = tmp_path / "buffer.db"
    async with opened(path) as buffer:
        await put(buffer, chunk_of(some(1)))
        lease = await take(buffer)
        path.unlink()
        path.mkdir()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, buffer, chunk_of(some(2)))
            with trio.fail_after(LOOKED_SECONDS):
                while not buffer.trouble:
                    await trio.sleep(0.05)
            assert "move it away" in buffer.trouble
            await buffer.settle(lease)
            nursery.start_soon(put, buffer, chunk_of(some(3)))
            await trio.sleep(2.5)  # in which it tries again
            assert len(nursery.child_tasks) == 2
            path.rmdir()
            with trio.fail_after(LOOKED_SECONDS):
                while nursery.child_tasks:
                    await trio.sleep(0.05)
        assert not buffer.trouble
        assert_balanced(buffer)
        killed = as_killed(path)
    async with opened(killed) as buffer:
        assert await waiting(buffer) == ids(some(2), some(3))
        assert_balanced(buffer)


async def test_trouble_ends_with_its_cause(tmp_path: Path) -> None:
    """Also where nobody puts anything meanwhile."""
    path = tmp_path / "buffer.db"
    async with opened(path) as buffer:
        path.unlink()
        path.mkdir()
        for there in (True, False):
            with trio.fail_after(LOOKED_SECONDS):
                while bool(buffer.trouble) != there:
                    await trio.sleep(0.05)
            if there:
                path.rmdir()


async def test_a_link_to_the_buffer(tmp_path: Path) -> None:
    """`buffer.path` may be a link: the file is made again where it leads."""
    (place := tmp_path / "place").mkdir()
    path = tmp_path / "buffer.db"
    path.symlink_to(place / "data")
    async with opened(path) as buffer:
        await put(buffer, chunk_of(some(1)))
        assert not buffer.trouble
        (place / "data").unlink()
        await put(buffer, chunk_of(some(2)))
        assert path.is_symlink()
        killed = as_killed(place / "data")
    async with opened(killed) as buffer:
        assert await waiting(buffer) == ids(some(1), some(2))


async def test_a_copy_that_was_cut_off_is_set_aside(tmp_path: Path) -> None:
    """A link leads to another database: what the copy was of is not taken up when the link goes."""
    (place := tmp_path / "place").mkdir()
    path = tmp_path / "buffer.db"
    path.symlink_to(place / "data")
    async with opened(path) as buffer:
        await put(buffer, chunk_of(some(1)))
    copy = Path(f"{path}.again")
    copy.write_bytes(MINE)
    async with opened(path) as buffer:
        assert await waiting(buffer) == ids(some(1))
    assert not copy.exists()
    assert [file.read_bytes() for file in kept(path)] == [MINE]


@pytest.mark.parametrize("change", [remove(""), link], ids=["removed", "linked"])
@pytest.mark.parametrize("point", ["stray.copied", "stray.named"])
async def test_a_kill_while_the_file_is_made_again(
    tmp_path: Path, point: str, change: Callable[[Path], None]
) -> None:
    """What was acknowledged before arrives, once; nothing is damaged."""
    away = True
    sink = Sink(script=lambda _request: Reply(503) if away else None, keep=100)
    async with serving(sink) as url:
        config = configure(tmp_path, url, f'path = "{tmp_path}/buffer.db"')
        async with running(config, env={VARIABLE: point}) as agent:
            with socket.socket(socket.AF_UNIX) as stream:
                stream.connect(agent.stream)
                stream.settimeout(LOOKED_SECONDS)
                stream.sendall(b'{"ack":true}\n' + line(1) + line(2))
                while b'"accepted":2' not in await trio.to_thread.run_sync(stream.recv, 1000):
                    pass
                change(tmp_path / "buffer.db")
                assert await agent.process.wait() == -signal.SIGKILL
        away = False
        async with running(config) as agent:
            with trio.fail_after(30):
                while (await agent.status())["books"]["buffered"] or len(sink.events) < 2:
                    await trio.sleep(0.05)
    assert len(sink.events) == 2
    assert not kept(tmp_path / "buffer.db")
