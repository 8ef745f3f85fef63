"""Has systemd know how the agent is: one line for people, and signs of life that only progress earns.

A sign of life says that the loop turns, that the buffer's writer took up an errand and that the deliveries'
tasks are at work; not that PostHog answers, nor that the disk has room: starting anew would mend neither.
"""

from collections.abc import Mapping
from typing import Protocol

import structlog
import trio

from agent.buffer import Buffer
from agent.notify import Notices

log = structlog.get_logger("agent")

# How often the line for people may change.
STATUS_SECONDS = 1.0
# sd_watchdog_enabled(3) recommends to speak at half of the time.
SPEAK_AT = 1 / 2


class Ways(Protocol):
    """The agent's ways out, by project: what each does, and whether one is wedged."""

    @property
    def ways(self) -> Mapping[str, str]:
        """The state of each; empty where events go out."""

    def wedged(self) -> str:
        """Which is, and why; empty where none is."""


class Pulse:
    """Speaks for one agent that takes events; `outside` is there once it is loaded."""

    def __init__(self, notices: Notices, buffer: Buffer) -> None:
        self.outside: Ways | None = None
        self._notices = notices
        self._buffer = buffer
        self._wedged = ""

    async def run(self) -> None:
        """Say that it is ready, then how it is, until cancelled; nothing where nobody listens."""
        if not self._notices.heard:
            return
        line = self._line()
        await self._notices.ready(line)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._show, line)
            if self._notices.watchdog:
                nursery.start_soon(self._live, self._notices.watchdog * SPEAK_AT)

    async def _show(self, shown: str) -> None:
        """Tell the line for people, when it is another."""
        while True:
            await trio.sleep(STATUS_SECONDS)
            if (line := self._line()) != shown:
                shown = line
                await self._notices.status(line)

    async def _live(self, every: float) -> None:
        """Give signs of life."""
        while True:
            started = trio.current_time()
            await self._written(every)
            if self._going():
                await self._notices.alive()
            await trio.sleep_until(started + every)

    async def _written(self, patience: float) -> None:
        """Until the writer has answered; a late answer is one too."""
        with trio.move_on_after(patience) as waiting:
            await self._buffer.answer()
        if not waiting.cancelled_caught:
            return
        log.error(
            "the buffer's writer does not answer",
            hint="look for a disk that hangs (dmesg); systemd starts the agent anew if it stays so",
        )
        await self._buffer.answer()
        log.info("the buffer's writer answers again")

    def _going(self) -> bool:
        """Whether no delivery is wedged; a change is logged."""
        why = self.outside.wedged() if self.outside is not None else ""
        if why and not self._wedged:
            log.error(
                "a delivery makes no progress",
                why=why,
                hint="systemd starts the agent anew if it stays so; please report it",
            )
        elif self._wedged and not why:
            log.info("all deliveries make progress")
        self._wedged = why
        return not why

    def _line(self) -> str:
        ways = self.outside.ways if self.outside is not None else {}
        return status_line(self._buffer.stats().events, ways, self._buffer.trouble)


def status_line(events: int, ways: Mapping[str, str], trouble: str) -> str:
    """What a person reads in `systemctl status`: what waits, and what keeps it from going out.

    `ways` has each project's state, empty where its events go out.
    """
    said = [f"{events:,} event{'' if events == 1 else 's'} buffered"]
    if trouble:
        said.append(f"the buffer cannot be written: {trouble}")
    going = sum(not state for state in ways.values())
    if going:
        said.append(f"{going} project{'' if going == 1 else 's'} delivering")
    several = len(ways) > 1
    waiting = [name for name, state in ways.items() if state == "waiting"]
    if waiting:
        said.append("waiting to try again" + (f": {', '.join(waiting)}" if several else ""))
    held = [
        f"{state} ({name})" if several else state
        for name, state in ways.items()
        if state not in ("", "waiting")
    ]
    if held:
        said.append(f"held: {', '.join(held)}")
    return ", ".join(said)
