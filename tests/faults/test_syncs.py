"""Syncs that fail: what they were for may be on no disk, though each later sync succeeds.

Stories in which syncs of log and database fail are recorded, and then killed or cut off anywhere; the long
form (`-m slow`) has many of them.
"""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from power import Cut, cuts
from test_power import Tell, Verdict, judged, lived, told


def test_a_shorter_commit_behind_refused_ones(recorder: Path, shim: Path, folder: Path) -> None:
    """What is left of these in the log is not taken for commits, nor for damage."""
    place = folder.resolve()
    recording = lived(recorder, place, "shorter", "full", shim=shim)
    assert sum(step.kind == "E" for step in recording) >= 2
    verdict = judged(recording, [Cut(len(recording), "journal", "all", 0)], "full")
    assert not verdict.wrong


@pytest.mark.parametrize(
    ("story", "seeds"),
    [
        pytest.param("refusal", range(2), id="life"),
        pytest.param("refused rescue", range(1), id="rescue"),
        pytest.param("refusal", range(2, 42), id="life, long", marks=pytest.mark.slow),
        pytest.param("refused rescue", range(1, 13), id="rescue, long", marks=pytest.mark.slow),
    ],
)
def test_syncs_that_fail(
    recorder: Path, shim: Path, folder: Path, story: str, seeds: range, record_property: Tell
) -> None:
    """Nothing acknowledged is lost or there twice, after a kill and a power cut; and there is no damage."""
    sums: Counter[str] = Counter()
    wrong: list[str] = []
    for seed in seeds:
        (place := folder.resolve() / str(seed)).mkdir()
        recording = lived(recorder, place, f"{story}:{seed}", "full", shim=shim)
        failed = [at for at, step in enumerate(recording) if step.kind == "E"]
        kills = [Cut(at, "journal", "all", 0) for at in (*failed[-9:], len(recording))]
        evidence = story == "refused rescue"
        verdict = judged(recording, sorted(kills + cuts(recording, 20)), "full", evidence=evidence)
        sums += verdict.sums + Counter(failures=len(failed))
        wrong += [f"story {seed}: {text}" for text in verdict.wrong]
        shutil.rmtree(place)
    record_property("told", f"{sums['failures']} failures; {told(Verdict(sums, wrong))}")
    assert not wrong
