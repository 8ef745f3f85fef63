"""Tells the time of both clocks, and which boot the second one belongs to."""

import time
from pathlib import Path

from agent.events import Instant


def read_boot() -> str:
    """The kernel's id of this boot; empty where there is none to read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


# Goes on while the host sleeps; not every system has it.
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock:
    """The host's clocks."""

    def __init__(self) -> None:
        self._boot = read_boot()

    def now(self) -> Instant:
        """This moment."""
        return Instant(time.time_ns() // 1000, time.clock_gettime_ns(_BOOT_CLOCK) // 1000, self._boot)
