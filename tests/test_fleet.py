"""`bench/fleet.py`: what a fleet does to PostHog when it is back, on virtual time."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from fleet import picture, simulate


@pytest.mark.parametrize("rate", [1.0, 100.0, 1000.0])
def test_a_fleet_comes_back_gently(rate: float) -> None:
    """After an hour PostHog sees under twice the steady rate in each second of a minute; all drain."""
    found = simulate(60, rate, seed=2)
    assert found.worst_second < 2 * found.steady
    assert found.drained == found.agents
    assert picture(found).startswith("<svg")
