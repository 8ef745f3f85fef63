"""Any life of a buffer, with kills between its calls and within its commits, against a plain ledger.

The long form (`-m slow`) tells two thousand lives of fifty steps.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from ledger import LANES, MAX_AGE
from lives import RESERVE, Call, Lived, Way

from agent.buffer import NOBODY, Limits
from agent.buffer.sqlite import open_sqlite
from agent.metrics import Metrics

CHUNKS = st.lists(
    st.tuples(st.integers(0, len(LANES) - 1), st.integers(1, 4), st.booleans()), min_size=1, max_size=3
)
FATES = st.lists(st.sampled_from(["delivered", "dead", "kept", "split", "damaged"]), min_size=1, max_size=4)
SIZES = st.sampled_from([1, 20_000, 2**40])
LIMITS = st.builds(Limits, st.integers(1, 12), SIZES, SIZES)
WITHOUT = st.sampled_from([NOBODY, frozenset({"a"}), frozenset({None}), frozenset({None, "b"})])
WHICH = st.integers(0, 5)
SELDOM = st.sampled_from([False, False, False, True])
SOME_EVENTS = Limits(8, 2**40)
SOME = st.lists(WHICH, min_size=1, max_size=3)


class Life(RuleBasedStateMachine):
    """Its rules are all that can happen to a buffer."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.lived = trio.from_thread.run_sync(Lived, *given)
        trio.from_thread.run(self.lived.open)

    def _do(self, *calls: Call) -> None:
        trio.from_thread.run(self.lived.do, *calls)

    @rule(chunks=CHUNKS, cancelled=SELDOM)
    def put(self, chunks: Any, cancelled: bool) -> None:
        self._do(self.lived.put(chunks, cancelled=cancelled))

    @rule(chunks=CHUNKS)
    def put_more(self, chunks: Any) -> None:
        self._do(self.lived.put(chunks, cancelled=False))

    @rule(limits=LIMITS, project=st.sampled_from(["one", "one", "two"]), without=WITHOUT, cancelled=SELDOM)
    def take(self, limits: Limits, project: str, without: Any, cancelled: bool) -> None:
        self._do(self.lived.take(limits, project, without, cancelled=cancelled))

    @rule(which=WHICH, fates=FATES, cancelled=SELDOM)
    def settle(self, which: int, fates: Any, cancelled: bool) -> None:
        if not self.lived.ledger.leases:
            self.take(SOME_EVENTS, "one", NOBODY, False)
        self._do(self.lived.settle(which, fates, cancelled=cancelled))

    @rule(which=WHICH)
    def release(self, which: int) -> None:
        self._do(self.lived.release(which))

    @rule(chunks=CHUNKS, more=CHUNKS, which=WHICH, fates=FATES, other=WHICH)
    def group(self, chunks: Any, more: Any, which: int, fates: Any, other: int) -> None:
        lived = self.lived
        self._do(
            lived.put(chunks, cancelled=False),
            lived.settle(which, fates, cancelled=False),
            lived.put(more, cancelled=False),
            lived.give_up(other),
        )

    @rule(which=WHICH)
    def give_up(self, which: int) -> None:
        self._do(self.lived.give_up(which))

    @rule(places=SOME)
    def replay(self, places: Any) -> None:
        self._do(self.lived.replay(places))

    @rule(places=SOME)
    def purge(self, places: Any) -> None:
        self._do(self.lived.purge(places))

    @rule(cut=st.integers(0, 99))
    def kill_within(self, cut: int) -> None:
        """The next call that reaches the file."""
        self.lived.cut = cut

    @rule(killed=st.booleans())
    def begin_anew(self, killed: bool) -> None:
        trio.from_thread.run(self.lived.kill if killed else self.lived.reopen)

    def teardown(self) -> None:
        trio.from_thread.run(self.lived.end)


WAYS = [
    Way(kind, **more)
    for kind in ("sqlite", "memory")
    for more in (
        {"tight": False},
        {"tight": False, "max_age": MAX_AGE},
        {},
        {"when_full": "drop_oldest"},
        {"when_full": "drop_newest"},
    )
]


@pytest.mark.parametrize(
    ("lives", "steps"), [(5, 40), pytest.param(200, 50, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_any_life(
    way: Way, lives: int, steps: int, folder: Path, record_property: Callable[[str, object], None]
) -> None:
    """Whatever is called and whenever it is killed: every event that was acknowledged is in one place."""
    template = folder / "template"
    template.mkdir()
    if way.kind == "sqlite":
        async with open_sqlite(way.settings(template), Metrics()):
            pass
        (template / RESERVE).unlink()
    chosen = settings(
        max_examples=lives,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    figures: Counter[str] = Counter()
    async with trio.open_nursery() as nursery:
        life = partial(Life, nursery, way, template, figures)
        test: Any = run_state_machine_as_test  # which takes all that makes a machine, not only a class
        await trio.to_thread.run_sync(partial(test, life, settings=chosen))
    record_property("told", ", ".join(f"{count:,} {what}" for what, count in figures.items()))
