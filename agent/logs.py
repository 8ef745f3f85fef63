"""Sets up the log: one line per change of state on stderr, for people, for tools, or as JSON.

Into systemd's journal each line begins with its priority (`<3>`), as sd-daemon(3) describes. It promises that
a line that comes again and again is written a few times a minute, and then with how often it came.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# Severities of syslog (RFC 5424, table 2).
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

# So many lines of one kind in a minute tell a person all there is; whoever flaps, flaps by the second.
ENOUGH = 5
WINDOW_SECONDS = 60.0
# Kinds of lines that are remembered: the agent's own are fewer, and libraries may write anything.
KINDS = 256
# Fields of a line that are made anew, or have passed, when it is told later.
OWN = ("level", "event", "exc_info")


def set_up(
    level: str, style: Literal["auto", "json"], env: Mapping[str, str], stream: TextIO = sys.stderr
) -> "Repetition":
    """Write what is at least as grave as `level` to `stream`; what is withheld is to be closed at the end."""
    journal = _is_journal(stream, env)
    repetition = Repetition(time.monotonic)
    processors: list[Processor] = [structlog.processors.add_log_level, repetition]
    if not journal:
        processors.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    if style == "json":
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    elif stream.isatty():
        processors.append(structlog.dev.ConsoleRenderer())
    else:
        first = ["timestamp", "level", "event"]
        processors += [
            structlog.processors.format_exc_info,
            _one_line,
            structlog.processors.LogfmtRenderer(key_order=first, drop_missing=True),
        ]
    if journal:
        processors.append(_prioritised)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)
    return repetition


def _is_journal(stream: TextIO, env: Mapping[str, str]) -> bool:
    """Whether what is written there goes to the journal: who inherits the variable may write elsewhere.

    It holds device and inode of the unit's own stdout or stderr (systemd.exec(5), JOURNAL_STREAM).
    """
    if not (told := env.get("JOURNAL_STREAM")):
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # a stream of no descriptor, or a closed one
        return False
    return told == f"{found.st_dev}:{found.st_ino}"


class _Kind:
    """Lines of one kind: since when they are counted, how many of them there were, and the last."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.written = self.withheld = 0
        self.last: EventDict = {}


class Repetition:
    """Withholds what repeats; the next line of any kind after a minute is preceded by how often it came."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """Let a line pass, or raise `structlog.DropEvent`."""
        if "repeated" in event:
            return event
        now = self._now()
        for name in [name for name, kind in self._kinds.items() if now - kind.since >= WINDOW_SECONDS]:
            self._close(self._kinds.pop(name))
        # Two lines of one kind may differ in their reasons and figures, not in what and whom they are about.
        name = (event["level"], event["event"], event.get("project"), event.get("source"))
        if name not in self._kinds and len(self._kinds) >= KINDS:
            self._close(self._kinds.pop(next(iter(self._kinds))))
        kind = self._kinds.setdefault(name, _Kind(now))
        if kind.written >= ENOUGH:
            kind.withheld += 1
            kind.last = dict(event)
            raise structlog.DropEvent
        kind.written += 1
        return event

    def close(self) -> None:
        """Tell of all that is withheld, at the end."""
        while self._kinds:
            self._close(self._kinds.popitem()[1])

    @staticmethod
    def _close(kind: _Kind) -> None:
        """The last line that was withheld, with how many there were."""
        if kind.withheld:
            last = {name: value for name, value in kind.last.items() if name not in OWN}
            level = logging.getLevelNamesMapping()[str(kind.last["level"]).upper()]
            structlog.get_logger().log(level, kind.last["event"], **last, repeated=kind.withheld)


class _Forward(logging.Handler):
    """What libraries log becomes a line like any other."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def _one_line(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A traceback's lines in one, for logfmt."""
    if isinstance(text := event.get("exception"), str):
        event["exception"] = text.replace("\n", " | ")
    return event


def _prioritised(_logger: WrappedLogger, method: str, line: Any) -> str:
    """`Any`: structlog has one type for all of its steps, and the last ones pass on a text."""
    return f"<{_PRIORITIES.get(method, 6)}>{line}"
