"""Where the commands print: what stdin, stdout and stderr are, whatever the command was started with."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agent import AgentError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# What a shell says of a command that Ctrl-C has ended: 128 and the signal's number.
INTERRUPTED = 130


class CannotPrint(AgentError):
    """Nothing more can be written to stdout."""


class _Stdout(io.FileIO):
    """Stdout, where a full disk is told as every other error is."""

    _broken = False

    def write(self, data: "ReadableBuffer", /) -> int:
        if self._broken:  # what was printed before is flushed once more at the end
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except BrokenPipeError:
            raise  # whoever read has seen enough: click ends the command without a word
        except OSError as error:
            self._broken = True
            why = f"the output cannot be written: {error.strerror}"
            raise CannotPrint(why, "send it to a disk with room, or to a pipe") from error


def open_streams() -> None:
    """Make all three usable, and stdout tell in whichever encoding what it can, the rest as escapes.

    One that was closed becomes /dev/null: else the buffer's file would take its number, and be written to by
    whatever prints there.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number in closed:
        os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    if sys.stderr is None:
        sys.stderr = _writing(io.FileIO(2, "w", closefd=False), "utf-8")
    stdout = _Stdout(1, "w", closefd=False)
    sys.stdout = _writing(stdout, sys.stdout.encoding if sys.stdout else "utf-8")


def _writing(raw: io.FileIO, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=raw.isatty()
    )


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends a command without a word, wherever it came."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if _is_interrupt(error):
            raise SystemExit(INTERRUPTED) from None
        raise


def _is_interrupt(error: BaseException) -> bool:
    """Also one that a nursery gathered, or that came while a class was made, which Python 3.11 wraps."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_interrupt, error.exceptions))
    return any(isinstance(one, KeyboardInterrupt) for one in (error, error.__cause__, error.__context__))


def legible(json: bytes | str) -> str:
    """JSON for stdout: on a terminal what that could obey is written as JSON's own escapes: the same JSON."""
    text = json if isinstance(json, str) else json.decode("utf-8", "backslashreplace")
    if text.isprintable() or not sys.stdout.isatty():
        return text
    return "".join(char if char.isprintable() or char == "\n" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    from json import dumps

    return " " if char in "\t\r" else dumps(char)[1:-1]  # these two stand between JSON's values only
