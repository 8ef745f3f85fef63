"""Sets up the log: one line per change of state on stderr, for people, for tools, or as JSON.

Into systemd's journal each line begins with its priority (`<3>`), as sd-daemon(3) describes.
"""

import logging
import sys
from collections.abc import Mapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# Severities of syslog (RFC 5424, table 2).
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def set_up(
    level: str, style: Literal["auto", "json"], env: Mapping[str, str], stream: TextIO = sys.stderr
) -> None:
    """Write what is at least as grave as `level` to `stream`."""
    processors: list[Processor] = [structlog.processors.add_log_level]
    if "JOURNAL_STREAM" not in env:
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
    if "JOURNAL_STREAM" in env:
        processors.append(_prioritised)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)


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
