"""Prints the figures of the long forms; a folder for files that are killed by the thousand.

And libraries that stand between a process and its C library (`LD_PRELOAD`).
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Let tests and what they start hear Ctrl-C: a shell has what it starts in the background ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where there is such a place: a kill does not care, and a disk would take most time."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        yield Path(name)


def library(source: str, folder: Path) -> Path:
    """One of the C files in `faults`, built."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    built = (folder / source).with_suffix(".so")
    text = Path(__file__).parent / "faults" / source
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(text), "-ldl"], check=True)
    return built


@pytest.fixture(scope="session")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that records writes."""
    return library("recording.c", tmp_path_factory.mktemp("recorder"))


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that fails writes."""
    return library("failing.c", tmp_path_factory.mktemp("shim"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each test that has something to tell, for the README."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, told in getattr(report, "user_properties", ()):
            if name == "told":
                terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {told}")
