"""Tells the time of both clocks, and which boot the second one belongs to."""

import os
import time
from datetime import UTC, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from agent import AgentError
from agent.events import Instant


def read_boot() -> str:
    """The kernel's id of this boot; empty where there is none to read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


# Goes on while the host sleeps; not every system has it.
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class ZoneError(AgentError):
    """There is no such time zone on this host."""


def zone(name: str) -> tzinfo:
    """A time zone by its name, the host's own for an empty one (`TZ`, else /etc/localtime, else UTC).

    Raises `ZoneError`.
    """
    name = name or os.environ.get("TZ", "").removeprefix(":")
    try:
        if name:
            return ZoneInfo(name)
        with open("/etc/localtime", "rb") as file:
            return ZoneInfo.from_file(file)
    except FileNotFoundError:
        return UTC
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        hint = "write it like Europe/Berlin; `timedatectl list-timezones` shows them (package tzdata)"
        raise ZoneError(f"there is no time zone {name!r} on this host", hint) from error


class Clock:
    """The host's clocks."""

    def __init__(self) -> None:
        self._boot = read_boot()

    def now(self) -> Instant:
        """This moment."""
        return Instant(time.time_ns() // 1000, time.clock_gettime_ns(_BOOT_CLOCK) // 1000, self._boot)
