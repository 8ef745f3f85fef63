"""Has signals wait in the kernel until the agent asks for them: in its start, its end, and its replacement.

A handler has gaps: it is not there yet, it is there no more, or it ran in a worker thread just before an
exec, which forgets that. What waits is forgotten by none of these (signal(7), execve(2)).
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*ENDING, signal.SIGHUP)

# sigset_t has 1,024 bits in glibc and musl; a signalfd_siginfo is 128 bytes, its number first (signalfd(2)).
SET_BYTES, TOLD_BYTES, NUMBER_BYTES = 128, 128, 4


def hold_signals() -> None:
    """From now on they wait. Call before the first thread is made: one that does not hold them takes them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """For a block that may never come to its end, with nothing begun yet: SIGTERM and SIGINT just leave."""
    for number in ENDING:
        signal.signal(number, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        yield
    finally:
        hold_signals()


def _leave(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


class Waiting:
    """The signals that wait; readable where there are some. It takes none before it is asked."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        wanted = ctypes.create_string_buffer(SET_BYTES)
        for number in SIGNALS:
            libc.sigaddset(wanted, int(number))
        # SFD_NONBLOCK and SFD_CLOEXEC are these, as signalfd(2) has it.
        self._descriptor: int = libc.signalfd(-1, wanted, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            why = ctypes.get_errno()
            raise OSError(why, os.strerror(why), "signalfd")

    def fileno(self) -> int:
        """To wait on."""
        return self._descriptor

    def take(self) -> int:
        """The next one. Raises `BlockingIOError` where there is none."""
        return int.from_bytes(os.read(self._descriptor, TOLD_BYTES)[:NUMBER_BYTES], sys.byteorder)

    def close(self) -> None:
        """What waits goes on waiting."""
        os.close(self._descriptor)
