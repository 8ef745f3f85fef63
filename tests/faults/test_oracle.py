"""Nothing that was acknowledged is lost: kill -9 at random instants, and at every point that has a name."""

import signal
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import httpx
import pytest
import trio
from oracle import PATIENCE, Judgement, Trial
from processes import Running

from agent.buffer.file import PAGE_BYTES
from agent.crash import POINTS

Told = Callable[[str, object], None]

# One of each kind of step, for every run.
SAMPLE = (
    "put.inserted",
    "commit.written",
    "ack.due",
    "post.answered",
    "settle.buried",
    "replay.inserted",
    "close.checkpointed",
    "reload.left",
)
# Each point the first time that it is passed, and later, when more is under way.
PASSINGS = (1, 2, 5)


async def kill(trial: Trial, random: Random) -> None:
    """One life, which ends at any instant: while it starts, takes its first events, delivers, stops."""
    async with trial.living() as agent:
        kind = random.randrange(10)
        if kind < 2:
            await trio.sleep(random.uniform(0, 0.5))
        elif kind < 5:
            await trial.until_promised(agent)
            await trio.sleep(random.uniform(0, 0.3))
        else:
            requests = trial.sink.requests + 1
            await trial.until(agent, lambda: trial.sink.requests >= requests)
            if kind == 8:
                agent.process.terminate()
            if kind == 9:
                trial.configure()
                agent.send(signal.SIGHUP)
            await trio.sleep(random.uniform(0, 1.0 if kind == 9 else 0.4))
            if kind == 7:
                with suppress(httpx.TransportError):
                    await trial.replay()
                    assert (await agent.status())["books"]["balanced"]
        if agent.process.poll() is None:
            agent.process.kill()
        code = await agent.process.wait()
        assert code == -signal.SIGKILL or (kind == 8 and code == 0), agent.log()
    trial.look()


@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 8), *(pytest.param(seed, 100, marks=pytest.mark.slow) for seed in range(1, 11))]
)
async def test_kills_at_random_instants(tmp_path: Path, seed: int, kills: int, record_property: Told) -> None:
    """Whatever it is doing, and whatever PostHog does: what was acknowledged arrives, and is counted."""
    random = Random(seed)
    protocol = "v1" if seed % 2 else "batch"
    trial = Trial(tmp_path, Random(seed), protocol=protocol, brisk=False)
    async with trial.serving():
        async with trial.sending():
            for _ in range(kills):
                await kill(trial, random)
        told = await trial.end()
    assert trial.kills == kills
    record_property("told", f"{kills} kills: {told}")


# --- named points ----------------------------------------------------------------------------------


async def replay_always(trial: Trial) -> None:
    while True:
        with suppress(httpx.TransportError):
            await trial.replay()
        await trio.sleep(0.05)


async def back_up_always(trial: Trial) -> None:
    while True:
        with suppress(httpx.TransportError):
            async with trial.asking() as client:
                await client.get("/backup")
        await trio.sleep(0.05)


async def provoke(trial: Trial, agent: Running, point: str) -> None:
    """Have the agent pass a point: what its clients do is enough for most."""
    match point.partition(".")[0]:
        case "replay":
            await replay_always(trial)
        case "backup":
            await back_up_always(trial)
        case "close":
            await trial.until_promised(agent, 3)
            agent.process.terminate()
        case "reload":
            await trial.until_promised(agent, 3)
            trial.configure()
            agent.send(signal.SIGHUP)


async def crash(trial: Trial, point: str, passings: int = 1) -> None:
    """One life, which ends at a point."""
    async with trial.living(f"{point}:{passings}") as agent, trio.open_nursery() as nursery:
        nursery.start_soon(provoke, trial, agent, point)
        with trio.move_on_after(PATIENCE):
            await agent.process.wait()
        nursery.cancel_scope.cancel()
        assert agent.process.returncode == -signal.SIGKILL, f"{point} was not passed\n{agent.log()}"
    trial.look()


async def outage(trial: Trial, *, stop: bool) -> None:
    """A life in which nothing is delivered; it is stopped in order, or killed."""
    trial.sink.away = True
    async with trial.living() as agent, trial.sending():
        await trial.until_promised(agent, 60)
        agent.send(signal.SIGTERM if stop else signal.SIGKILL)
        await agent.process.wait()
    trial.sink.away = False


async def crash_at_the_start(trial: Trial, point: str, change: Callable[[Path], None]) -> Judgement:
    """Stop, change the database, and crash while it is opened: the next life goes on with it."""
    async with trial.serving():
        await outage(trial, stop=True)
        change(trial.database)
        await crash(trial, point)
        async with trial.sending(), trial.living() as agent:
            await trial.until_promised(agent)
        return await trial.end()


def make_old(database: Path) -> None:
    """What the first version would have written."""
    with sqlite3.connect(database) as old:
        for table, columns in (
            ("chunk", ("seal", "marks", "burials")),
            ("dead", ("seal", "marks", "burials", "boot", "monotonic")),
        ):
            for column in columns:
                old.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        old.execute("DROP TABLE clock")
        old.execute("DROP INDEX dead_size")
        old.execute("ALTER TABLE dead DROP COLUMN size")
        old.execute("DROP TABLE drops")
        old.execute("DELETE FROM _sqlite_migrations WHERE name != 'first_tables'")
        old.execute("PRAGMA user_version = 1")
    old.close()


def damage(database: Path) -> None:
    """SQLite does not know it for a database any more."""
    with database.open("r+b") as file:
        file.write(bytes(PAGE_BYTES))


async def test_a_crash_at_a_sample_of_points(tmp_path: Path, record_property: Told) -> None:
    """One after the other on the same buffer, then everything arrives."""
    trial = Trial(tmp_path, Random(0))
    async with trial.serving():
        async with trial.sending(poison=0.01):
            for point in SAMPLE:
                await crash(trial, point)
        told = await trial.end()
    record_property("told", f"{len(SAMPLE)} points: {told}")


def some(*kinds: str) -> tuple[str, ...]:
    """The points of these kinds."""
    return tuple(point for point in POINTS if point.startswith(kinds))


MIGRATING = some("migrate")
RESCUING = some("log", "rescue")
SHEDDING = {
    "shed.oldest": 'when_full = "drop_oldest"\nmax_size = "16 MiB"',
    "shed.expired": 'max_age = "1 s"',
}
STRAY = some("stray")  # see test_stray.py
IDLE = "pages.given_back"
# What clients, a stop, a reload, or somebody at the admin socket make it pass.
COMMON = tuple(point for point in POINTS if point not in {*MIGRATING, *RESCUING, *SHEDDING, *STRAY, IDLE})


@pytest.mark.slow
@pytest.mark.parametrize("point", COMMON)
async def test_a_crash_at_every_point(tmp_path: Path, point: str, record_property: Told) -> None:
    """The first time that it is passed, and later; the sink fails, stalls, resets and lies meanwhile."""
    trial = Trial(tmp_path, Random(point))
    once = point.startswith(("start", "reserve", "close", "reload"))  # in one life
    async with trial.serving():
        async with trial.sending(poison=0.01):
            for passings in PASSINGS:
                await crash(trial, point, 1 if once else passings)
        told = await trial.end()
    record_property("told", f"{len(PASSINGS)} times: {told}")


@pytest.mark.slow
@pytest.mark.parametrize("point", MIGRATING)
async def test_a_crash_while_an_old_file_is_brought_forward(
    tmp_path: Path, point: str, record_property: Told
) -> None:
    """The next start goes on with it, and delivers what was in it."""
    trial = Trial(tmp_path, Random(point))
    record_property("told", await crash_at_the_start(trial, point, make_old))


@pytest.mark.slow
@pytest.mark.parametrize("point", RESCUING)
async def test_a_crash_while_a_damaged_file_is_rescued(
    tmp_path: Path, point: str, record_property: Told
) -> None:
    """The next start goes on with it; what can be read of the file is all that was in it."""
    trial = Trial(tmp_path, Random(point), buffer='max_size = "16 MiB"', pad=5000)
    record_property("told", await crash_at_the_start(trial, point, damage))


@pytest.mark.slow
@pytest.mark.parametrize("point", SHEDDING)
async def test_a_crash_while_events_are_shed(tmp_path: Path, point: str, record_property: Told) -> None:
    """What is missing is counted as shed, and no more."""
    trial = Trial(tmp_path, Random(point), buffer=SHEDDING[point], pad=5000)
    async with trial.serving():
        trial.sink.away = True
        async with trial.sending():
            for passings in PASSINGS:
                await crash(trial, point, passings)
        record_property("told", await trial.end(shed=True))


@pytest.mark.slow
async def test_a_crash_while_pages_are_given_back(tmp_path: Path, record_property: Told) -> None:
    """In quiet times the file gets smaller, and a crash there does no harm."""
    trial = Trial(tmp_path, Random(0), pad=5000)
    async with trial.serving():
        await outage(trial, stop=False)
        await crash(trial, IDLE)
        record_property("told", await trial.end())
