"""What one client of a stream is told of its lines: totals, and what was refused."""

import trio

from agent.accept.handed import Totals
from agent.accept.offered import Outcome

# Refusals that wait for a client that does not read; beyond it only the totals count them.
REFUSAL_BYTES = 64 * 1024


class Acknowledgements:
    """One connection's totals, and the refusals that it has not been told."""

    def __init__(self, before: Totals | None = None) -> None:
        before = before or Totals()
        self.lines = before.lines
        self._accepted = before.accepted
        self._rejected = before.rejected
        self._refusals = bytearray(before.refusals)
        self._told = before.told
        self._changed = trio.Event()
        self._ended = False

    def add(self, outcome: Outcome) -> None:
        """A part of a read was settled."""
        for line, reason, lines in outcome.refused:
            for number in range(self.lines + line + 1, self.lines + line + 1 + lines):
                if len(self._refusals) >= REFUSAL_BYTES:
                    break
                self._refusals += b'{"line":%d,"error":"%s"}\n' % (number, reason.encode())
        rejected = sum(refused.lines for refused in outcome.refused)
        self.lines += outcome.lines
        self._rejected += rejected
        self._accepted += outcome.lines - rejected
        self._changed.set()

    def totals(self) -> Totals:
        """How it stands."""
        return Totals(
            lines=self.lines,
            accepted=self._accepted,
            rejected=self._rejected,
            refusals=bytes(self._refusals),
            told=self._told,
        )

    def end(self) -> None:
        """Nothing more will be added."""
        self._ended = True
        self._changed.set()

    async def next(self) -> bytes:
        """What to write next, when there is something; empty at the end, before which something is said."""
        while True:
            totals = (self._accepted, self._rejected)
            if totals != self._told and (self._ended or totals != (0, 0)):
                text = bytes(self._refusals) + b'{"accepted":%d,"rejected":%d}\n' % totals
                self._refusals.clear()
                self._told = totals
                return text
            if self._ended:
                return b""
            self._changed = trio.Event()
            await self._changed.wait()
