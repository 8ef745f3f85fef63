"""Carries one batch to PostHog by the protocol in force, and brings its verdict back.

It knows what an attempt needs: key, headers, the time in the batch's own clock, which try of it this is. When
to go is left to `pace`, what becomes of the events to `shipment`.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol
from urllib.request import getproxies

import structlog
import trio

from agent import crash
from agent.checks import wrong_key
from agent.config import Project
from agent.deliver import v1, wire
from agent.deliver.client import BODY_START, Reply
from agent.deliver.clocks import Clocks, told, written
from agent.deliver.reply import read_reply, server_clock
from agent.deliver.verdict import Absent, Batch, Damaged, Refused, Retry, Verdict
from agent.events import Instant, label_of
from agent.metrics import Metrics
from agent.veil import sent_by

log = structlog.get_logger("deliver")

# After v1 was found not to be served, the next batch after this time asks for it again: an installation is
# updated by the week, and one request in an hour burdens nobody.
ABSENT_SECONDS = 3600.0


class Posting(Protocol):
    """What posts a body; `client.Client` is one."""

    async def post(
        self, url: str, body: Sequence[bytes], headers: Mapping[str, str], *, most: int = BODY_START
    ) -> Reply | Retry | Refused: ...


class Attempt(NamedTuple):
    """One batch's way so far: what stays the same over all of its requests, and how many there were."""

    number: int
    request_id: str
    created_at: str
    tries: int


class Courier:
    """One project's way out. `ahead`: how far the host's clock is ahead of PostHog's (µs), None: unknown.

    `statuses` are of requests with the project's own key, `other_statuses` of those with keys of clients.
    """

    def __init__(
        self,
        project: Project,
        client: Posting,
        metrics: Metrics,
        now: Callable[[], Instant],
        clocks: Callable[[], Mapping[str, int]],
    ) -> None:
        self.statuses: Counter[int] = Counter()
        self.other_statuses: Counter[int] = Counter()
        self.ahead: int | None = None
        self._project = project
        self._settings = project.delivery
        self._client = client
        self._metrics = metrics
        self._now = now
        self._clocks = clocks
        self._posthog: int | None = None
        self._date = ""
        host = project.host.rstrip("/")
        self._batch_url, self._v1_url = host + wire.PATH, host + v1.PATH
        self._headers = wire.headers(
            {name: value.reveal() for name, value in self._settings.headers.items()},
            self._settings.compression,
        )
        self._beside_key = sent_by(self._settings, getproxies().values())
        self._absent_until = 0.0

    @property
    def protocol(self) -> str:
        """By which protocol the next batch goes."""
        if self._settings.protocol != "auto":
            return self._settings.protocol
        return "v1" if trio.current_time() >= self._absent_until else "batch"

    async def carry(self, batch: Batch, last: Attempt | None) -> tuple[Verdict | Damaged, Attempt | None]:
        """One request, or two where v1 turns out not to be served; and what the next one must know.

        None for what no project's key can be: not every text can be sent in v1's header, and that would be
        taken for a wrong host.
        """
        if batch.key is not None and (wrong := wrong_key(batch.key)):
            return Refused("key", f"a key that a client sent {wrong}"), last
        if self.protocol == "v1" and not (batch.long and self._settings.protocol == "auto"):
            attempt = self._attempt(batch, last)
            verdict = await self._by_v1(batch, attempt)
            if not isinstance(verdict, Absent):
                return verdict, attempt
            if self._settings.protocol == "v1":
                why = (
                    f'{verdict.why}: the v1 protocol is not served there; protocol = "auto" would use /batch'
                )
                return Refused("host", why), attempt
            if self._absent_until == 0.0:
                log.info("v1 is not served; /batch is used", project=self._project.name, why=verdict.why)
            self._absent_until = trio.current_time() + ABSENT_SECONDS
        return await self._by_batch(batch), last

    def _attempt(self, batch: Batch, last: Attempt | None) -> Attempt:
        if last is not None and last.number == batch.number:
            return last._replace(tries=last.tries + 1)
        return Attempt(batch.number, str(uuid.uuid4()), written(self._now().wall), 1)

    def _key(self, batch: Batch) -> str:
        if batch.key is not None:
            return batch.key
        return self._project.api_key.reveal() if self._project.api_key else ""

    def _secrets(self, batch: Batch) -> tuple[str, ...]:
        """What no answer's words may repeat."""
        return (self._key(batch), *self._beside_key)

    def _sent_at(self, batch: Batch) -> int | None:
        return told(batch.pieces[0], self._now(), Clocks(self._clocks(), self._posthog))

    async def _by_batch(self, batch: Batch) -> Verdict | Damaged:
        moment = self._sent_at(batch)
        body = wire.body(
            batch,
            self._key(batch),
            None if moment is None else written(moment),
            historical_migration=self._settings.historical_migration or batch.historical,
            compression=self._settings.compression,
        )
        if isinstance(body, Damaged):
            return body
        reply = await self._post(batch, self._batch_url, body, self._headers, BODY_START)
        if isinstance(reply, Reply):
            now = self._now().wall
            return read_reply(
                reply.status, reply.headers, reply.body_start, now, secrets=self._secrets(batch)
            )
        return reply

    async def _by_v1(self, batch: Batch, attempt: Attempt) -> Verdict | Damaged | Absent:
        moment = self._sent_at(batch)
        body = v1.body(
            batch,
            attempt.created_at,
            historical_migration=self._settings.historical_migration or batch.historical,
            compression=self._settings.compression,
        )
        if isinstance(body, Damaged):
            return body
        headers = v1.headers(
            self._headers,
            self._key(batch),
            request_id=attempt.request_id,
            attempt=attempt.tries,
            # Where nothing is known of the clocks, PostHog's time of receipt is the best that it can take.
            request_timestamp=written(batch.pieces[0].received_at if moment is None else moment),
        )
        most = BODY_START + v1.RESULT_BYTES * batch.events
        reply = await self._post(batch, self._v1_url, body, headers, most)
        if isinstance(reply, Reply):
            now = self._now().wall
            return v1.read(reply.status, reply.headers, reply.body_start, now, secrets=self._secrets(batch))
        return reply

    async def _post(
        self, batch: Batch, url: str, body: Sequence[bytes], headers: Mapping[str, str], most: int
    ) -> Reply | Retry | Refused:
        """One request, measured and counted."""
        started = trio.current_time()
        crash.point("post.due")
        reply = await self._client.post(url, body, headers, most=most)
        crash.point("post.read")
        status = reply.status if isinstance(reply, Reply) else 0
        (self.statuses if batch.key is None else self.other_statuses)[status] += 1
        self._metrics.requests.labels(label_of(self._project.name, batch.key), str(status)).inc()
        self._metrics.request_seconds.observe(trio.current_time() - started)
        self._metrics.request_body_bytes.observe(sum(map(len, body)))
        if isinstance(reply, Reply):
            self._look_at_date(reply.headers)
        return reply

    def _look_at_date(self, headers: Mapping[str, str]) -> None:
        """Learn PostHog's clock, once a second: it is told to the second, and reading it takes a while."""
        text = headers.get("date", "")
        if text == self._date:
            return
        self._date = text
        if (clock := server_clock(headers)) is not None:
            now = self._now()
            self._posthog, self.ahead = clock - now.monotonic, now.wall - clock
