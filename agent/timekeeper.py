"""Watches the host's clock: what it is set to is remembered for later boots, and told.

In one boot the monotonic clock bridges every step. But what was stamped before a step, and is delivered after
a reboot, can be told only by somebody who saw the step; so the buffer keeps how each boot's clocks stood to
each other.
"""

from typing import NamedTuple

import structlog
import trio

from agent.buffer import Buffer, BufferBroken
from agent.clock import Clock

log = structlog.get_logger("clock")

# An event that comes between a step and this look is told rightly, but for a reboot within it.
LOOK_SECONDS = 1.0
# In µs. Less is what it takes to read two clocks one after the other; NTP steps by 128 ms and more, and slews
# both clocks alike below that (ntpd's documentation).
NOTED = 10_000
# In µs. From here on a person may want to know.
TOLD = 1_000_000
NTP = "nothing, if it was set once; if again and again, look what sets it (timedatectl, the hypervisor)"


class Step(NamedTuple):
    """The clock was set: at which new time (µs), and by how much (µs)."""

    at: int
    by: int


class Timekeeper:
    """Counts the steps of the host's clock."""

    def __init__(self, clock: Clock, buffer: Buffer) -> None:
        self.steps = 0
        self.last: Step | None = None
        self._clock = clock
        self._buffer = buffer
        self._ahead: int | None = None

    async def run(self) -> None:
        """Look every second, until cancelled."""
        while True:
            await self.look()
            await trio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Note how the clocks stand to each other, if that is new."""
        now = self._clock.now()
        ahead = now.wall - now.monotonic
        noted = self._buffer.clocks().get(now.boot)
        before = self._ahead if self._ahead is not None else noted
        if before is not None and abs(ahead - before) > TOLD:
            self.steps += 1
            self.last = Step(now.wall, ahead - before)
            seconds = round((ahead - before) / 1_000_000, 3)
            log.warning("the host's clock was set; events keep their instants", seconds=seconds, hint=NTP)
        self._ahead = ahead
        if now.boot and (noted is None or abs(ahead - noted) > NOTED):
            try:
                await self._buffer.note_clock(now.boot, ahead)
            except BufferBroken:
                return  # the buffer tells its own trouble; the next look tries again
