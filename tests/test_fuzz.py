"""What reads hostile bytes is fuzzed for a moment, guided by coverage; `fuzz/fuzz.py` does it for hours."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
# Enough to leave the seeds behind: some seconds each.
RUNS = 4000


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.version_info >= (3, 14), reason="atheris has no wheel here"
)
@pytest.mark.parametrize("target", ["ndjson", "logfmt", "syslog", "capture"])
def test_fuzz(target: str, tmp_path: Path) -> None:
    """No bytes make a decoder raise, count wrongly, or let in what is no event."""
    corpus = shutil.copytree(FUZZ / target, tmp_path / "corpus")
    done = subprocess.run(
        [sys.executable, FUZZ / "fuzz.py", target, corpus, f"-dict={FUZZ}/words.dict", f"-runs={RUNS}"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
