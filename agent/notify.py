"""Tells the service manager how the agent is doing, in the words of sd_notify(3).

Whoever starts the agent says in NOTIFY_SOCKET where it listens (systemd does for `Type=notify`), and in
WATCHDOG_USEC how long it waits for a sign of life before it starts the agent anew. These variables stay in
the environment: a process that replaces this one is to say the same to the same listener.
"""

import os
import socket
import time
from collections.abc import Mapping

import structlog
import trio

log = structlog.get_logger("agent")

# The kinds of address that sd_notify(3) has for sockets of the host: a path, and a name in the abstract.
PLACES = ("/", "@")


class Notices:
    """What is told to the service manager; nothing where there is none, or none that can be reached.

    `watchdog` is after how many seconds of silence it takes the agent for dead, 0 where it does not.
    """

    def __init__(self, place: str = "", watchdog: float = 0.0) -> None:
        self.watchdog = watchdog
        self._address = f"\0{place[1:]}" if place.startswith("@") else place
        self._lost = False

    @property
    def heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._address)

    async def ready(self, status: str) -> None:
        """The agent takes events."""
        await self._tell("READY=1", _status(status))

    async def status(self, status: str) -> None:
        """One line for people."""
        await self._tell(_status(status))

    async def alive(self) -> None:
        """The agent makes progress; without it systemd ends it when `watchdog` seconds are over."""
        await self._tell("WATCHDOG=1")

    async def reloading(self) -> None:
        """The agent reads its configuration anew; `ready` is to follow."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        await self._tell("RELOADING=1", f"MONOTONIC_USEC={now}")

    async def stopping(self, status: str) -> None:
        """The agent ends."""
        await self._tell("STOPPING=1", _status(status))

    async def _tell(self, *lines: str) -> None:
        """Send it as one datagram. It waits while the listener has no room, as sd_notify(3) does."""
        if not self._address:
            return
        try:
            # Connected anew each time: a listener that was restarted has another socket at the same place.
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                await sock.connect(self._address)
                await sock.send("\n".join(lines).encode())
        except OSError as error:
            if not self._lost:
                log.warning(
                    "the service manager cannot be told how the agent is doing",
                    error=error.strerror,
                    hint="it may end the agent for it: look at NOTIFY_SOCKET and the unit's sandbox",
                )
            self._lost = True
        else:
            self._lost = False


def notices(env: Mapping[str, str]) -> Notices:
    """What the environment says: who listens, and whether this process is watched."""
    place = env.get("NOTIFY_SOCKET", "")
    if not place.startswith(PLACES) or len(place) == 1:
        return Notices()
    return Notices(place, _watchdog(env))


def _watchdog(env: Mapping[str, str]) -> float:
    """After how many seconds of silence this process is taken for dead (sd_watchdog_enabled(3)); 0: never."""
    span, owner = env.get("WATCHDOG_USEC", ""), env.get("WATCHDOG_PID", "")
    if not (span.isascii() and span.isdecimal()) or (owner and owner != str(os.getpid())):
        return 0.0
    return int(span) / 1_000_000


def _status(text: str) -> str:
    """A line of its own, whatever is in it."""
    return "STATUS=" + " ".join(text.split())
