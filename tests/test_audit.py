"""What the packages are built of has no known hole, and what the linter is to pass over has its reason."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKED = ROOT / "config/packaging/requirements.txt"
UV = Path(sys.executable).parent / "uv"
# What uv says where it cannot ask the database of known holes (OSV), or does not get its answer.
NO_ANSWER = ("error sending request", "dns error", "failed to fetch", "timed out", "client error")


@pytest.mark.slow
@pytest.mark.skipif(not UV.exists(), reason="needs uv")
def test_no_locked_package_has_a_known_hole(tmp_path: Path) -> None:
    """The versions in the lock, asked of OSV by `uv audit`; skipped where that cannot be reached."""
    locked = re.findall(r"^([\w-]+==\S+)((?: ; [^\\\n]+)?)", LOCKED.read_text(), re.MULTILINE)
    assert locked
    needed = ", ".join(f'"{package}{marker.strip()}"' for package, marker in locked)
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\nname = "locked"\nversion = "0"\nrequires-python = ">=3.11"\ndependencies = [{needed}]\n'
    )
    done = subprocess.run(
        [UV, "audit", "--project", tmp_path], check=False, capture_output=True, text=True, timeout=120
    )
    told = done.stdout + done.stderr
    if done.returncode != 0 and any(words in told.lower() for words in NO_ANSWER):
        pytest.skip(f"the database of known holes cannot be reached: {told.strip().splitlines()[-1]}")
    assert done.returncode == 0, told


def test_what_is_passed_over_has_a_reason() -> None:
    """Of the rules on security only the tests and benchmarks leave any out, and each line says why."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in config["select"]
    assert not [rule for rule in config["ignore"] if rule.startswith("S") and rule[1:2].isdigit()]
    assert set(config["per-file-ignores"]) == {"tests/*", "bench/*"}
    lines = [line for path in (ROOT / "agent").rglob("*.py") for line in path.read_text().splitlines()]
    passed_over = [line for line in lines if re.search(r"# noqa: .*\bS\d", line)]
    assert passed_over
    for line in passed_over:
        assert re.search(r"# noqa: S\d+ +[-#]? ?\S+ \S+", line), line
