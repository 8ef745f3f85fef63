"""How large the next batch may be: as configured, or as small as PostHog or the way there has shown.

`shipment` finds out which sizes pass; this remembers it from one shipment to the next.
"""

import structlog

from agent.buffer import Limits
from agent.config import Project
from agent.deliver.shipment import CUTS, Shipment

log = structlog.get_logger("deliver")

# How a batch size that PostHog refused is recovered: by this part of itself after each success.
RECOVERY = 1 / 16
# What is out on lease lies in memory, packed. Usual events pack to a fifth; what packs to more than this part
# of itself goes in smaller batches, so that eight of noise are 16 MiB and not 40.
PACKED = 0.4


class Sizes:
    """The sizes of one project's batches, in bytes before compression."""

    def __init__(self, project: Project) -> None:
        self.largest = project.delivery.max_batch_size
        self._project = project
        self._recovery = RECOVERY
        self._cut_size: int | None = None

    @property
    def cuts(self) -> int:
        """After how many connections that end over a batch its size is suspected."""
        return 1 if self._cut_size and self._recovery == RECOVERY else CUTS

    def limits(self, batches: int) -> Limits:
        """What a lease of so many batches may hold."""
        size = self.largest * batches
        return Limits(self._project.delivery.max_batch_events * batches, size, int(size * PACKED))

    def learn(self, shipment: Shipment) -> None:
        """What one shipment teaches the next."""
        if self._cut_size is not None and shipment.largest_accepted >= self._cut_size:
            self._cut_size = None  # it was an outage, and not the size
        most = self._project.delivery.max_batch_size
        if (size := shipment.split_size or shipment.cut_size) is not None:
            self.largest = max(1, size // 2)
            self._recovery = RECOVERY
            if shipment.split_size is None:
                # Connections may have ended for any reason: the first time the size is soon tried again.
                self._recovery = RECOVERY if self._cut_size else 1.0
                self._cut_size = size
            log.info("PostHog takes smaller batches only", project=self._project.name, bytes=self.largest)
        elif shipment.accepted and self.largest < most:
            self.largest = min(self.largest + max(1, int(self.largest * self._recovery)), most)
