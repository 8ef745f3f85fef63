"""The log: for people and tools, with priorities into the journal, and without repetition."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from agent import advice, logs
from agent.deliver.pace import Held

AGENT = Path(__file__).parents[1] / "agent"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The log is the process's: the next test finds it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def _lines(style: str, env: dict[str, str], stderr: object) -> None:
    """A process that logs a line of each level, one with a traceback, and one of a library."""
    code = f"""
import logging, os, structlog
from agent import logs
withheld = logs.set_up("info", {style!r}, os.environ)
log = structlog.get_logger("test")
log.debug("small")
log.info("ready", at="a b")
log.warning("odd")
log.error("broken")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("a mistake")
logging.getLogger("library").warning("of a library")
withheld.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, stderr=stderr, env={**os.environ, **env})  # type: ignore[call-overload]


def test_lines_are_for_tools(tmp_path: Path) -> None:
    """Where nobody looks at a terminal each line is logfmt with its time, also a traceback."""
    with (tmp_path / "log").open("wb") as file:
        _lines("auto", {}, file)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 5
    assert re.fullmatch(r'timestamp=\S+Z level=info event=ready at="a b"', lines[0])
    assert "level=error" in lines[3]
    assert "ZeroDivisionError" in lines[3]
    assert 'level=warning event="of a library"' in lines[4]


@pytest.mark.parametrize("style", ["auto", "json"])
def test_the_journal_gets_priorities(tmp_path: Path, style: str) -> None:
    """Where stderr is the journal's stream, each line begins with its priority and has no time of its own."""
    with (tmp_path / "log").open("wb") as file:
        its = os.fstat(file.fileno())
        _lines(style, {"JOURNAL_STREAM": f"{its.st_dev}:{its.st_ino}"}, file)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line[:3] for line in lines] == ["<6>", "<4>", "<3>", "<3>", "<4>"]
    assert "timestamp" not in lines[0]
    if style == "json":
        assert json.loads(lines[0][3:]) == {"at": "a b", "level": "info", "event": "ready"}


def test_a_stream_that_is_not_the_journals_gets_none(tmp_path: Path) -> None:
    """The variable is inherited by what a service starts, whose stderr may be a file."""
    with (tmp_path / "log").open("wb") as file:
        _lines("auto", {"JOURNAL_STREAM": "8:12345"}, file)
    assert (tmp_path / "log").read_text().startswith("timestamp=")


class Watch:
    """A clock that is told the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _logging(watch: Watch) -> tuple[io.StringIO, logs.Repetition]:
    stream, repetition = io.StringIO(), logs.Repetition(watch)
    structlog.configure(
        processors=[structlog.processors.add_log_level, repetition, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(stream),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    return stream, repetition


def _told(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_what_repeats_is_withheld_and_counted() -> None:
    """After a few of a kind in a minute the rest is told as one line with how often it came; others pass."""
    watch = Watch()
    stream, _ = _logging(watch)
    log = structlog.get_logger()
    for number in range(100):
        log.warning("flaps", project="a", why=f"reason {number}")
    log.warning("flaps", project="b")
    assert len(_told(stream)) == logs.ENOUGH + 1
    watch.now = logs.WINDOW_SECONDS
    log.info("other")
    last = _told(stream)[-2:]
    assert last[0] == {
        "event": "flaps",
        "level": "warning",
        "project": "a",
        "why": "reason 99",
        "repeated": 100 - logs.ENOUGH,
    }
    assert last[1] == {"event": "other", "level": "info"}
    log.warning("flaps", project="a")
    assert "repeated" not in _told(stream)[-1]


def test_what_is_withheld_is_told_at_the_end() -> None:
    """A process that stops within the minute says how often it was."""
    stream, repetition = _logging(Watch())
    for _ in range(7):
        structlog.get_logger().error("broken", exc_info=True)
    repetition.close()
    assert _told(stream)[-1] == {"event": "broken", "level": "error", "repeated": 2}


def test_kinds_of_lines_are_bounded() -> None:
    """A library that never says the same twice takes no memory."""
    stream, repetition = _logging(Watch())
    for number in range(3 * logs.KINDS):
        structlog.get_logger().info(f"line {number}")
    assert len(_told(stream)) == 3 * logs.KINDS
    assert len(repetition._kinds) == logs.KINDS


def test_every_warning_says_what_to_do() -> None:
    """Each line that is a warning or worse has a hint."""
    calls = re.compile(r"log\.(?:warning|error|exception)\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
    found = [
        (path.name, call.group()) for path in AGENT.rglob("*.py") for call in calls.finditer(path.read_text())
    ]
    assert len(found) >= 15
    assert [call for call in found if "hint=" not in call[1]] == []


def test_every_hold_has_advice() -> None:
    """For each reason of a hold there is something to do."""
    assert set(Held.__args__) | {"unconfigured"} == set(advice.HOLDS)  # type: ignore[attr-defined]
