"""What the agent counts and measures, as prometheus-client collectors.

The books belong to the buffer, in whose transactions they are kept; here they are only shown. So a counter
never runs ahead of the disk, and none is lost or counted twice by a crash.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from agent.buffer import SHED, Books, Stats
from agent.events import REASONS

PREFIX = "capture_agent_"

# From a page cache's microseconds to a disk that stalls.
COMMIT_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
# From a neighbour's to the default timeout of 30 s.
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# From one event's body to the 20 MiB that PostHog takes on the wire.
BODY_BUCKETS = (512.0, 2048.0, 8192.0, 32768.0, 131072.0, 524288.0, 2097152.0, 20971520.0)
# From a linger of half a second to an outage of a week.
DELIVERY_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 3600.0, 86400.0, 604800.0)

HOLDS = ("key", "billing", "host", "breaker", "rejected", "unconfigured")
DEAD_REASONS = ("rejected", "too_large", "dropped", "too_long")


class DeliveryFacts(NamedTuple):
    """What is shown of one project's deliveries, or of all with keys that clients sent."""

    project: str
    concurrency: int | None  # None where they have none of their own
    held: Collection[str]  # the reasons; none when nothing is held
    ahead: int | None  # the host's clock, of PostHog's (µs)


class Pulled(NamedTuple):
    """What is asked for at each scrape. `drops_known` names the sources whose kernel drops are known."""

    sources: Sequence[str]
    projects: Sequence[str]
    drops_known: Callable[[], Iterable[str]]
    turned_away: Callable[[], Mapping[str, int]]
    flag_calls: Callable[[], Mapping[str, Mapping[str, int]]]
    http_answers: Callable[[], Mapping[str, Mapping[int, int]]]
    books: Callable[[], Books]
    stats: Callable[[], Stats]
    balanced: Callable[[], bool]
    writable: Callable[[], bool]
    deliveries: Callable[[], Iterable[DeliveryFacts]]
    clock_steps: Callable[[], int]
    now: Callable[[], int]
    build: Mapping[str, str]


class Metrics:
    """Everything that is pushed at a joint, and the registry that `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            PREFIX + "requests",
            "Requests to PostHog by status; 0 is no answer",
            ("project", "status"),
            registry=self.registry,
        )
        self.request_seconds = self._histogram("request_seconds", "From request to reply", REQUEST_BUCKETS)
        self.request_body_bytes = self._histogram("request_body_bytes", "Bytes on the wire", BODY_BUCKETS)
        self.commit_seconds = self._histogram("commit_seconds", "One group commit", COMMIT_BUCKETS)
        self.accept_to_delivered_seconds = self._histogram(
            "accept_to_delivered_seconds", "From receipt to settlement, once a chunk", DELIVERY_BUCKETS
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)

    def pull(self, pulled: Pulled) -> None:
        """From now on show these too."""
        self.registry.register(_Pulling(pulled))


class _Pulling(Collector):
    """The books and gauges, made anew for each scrape; each series exists from the first one."""

    def __init__(self, pulled: Pulled) -> None:
        self._pulled = pulled

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask before the buffer is open."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        books = self._pulled.books()
        yield from self._of_sources(books)
        yield from self._of_projects(books)
        yield _counter("events_shed", "Lost on purpose or by damage", books, "shed", by_reason=SHED)
        yield _counter("events_replayed", "Dead letters sent again", books, "replayed")
        yield _counter("dead_purged", "Dead letters that a person had forgotten", books, "purged")
        yield _counter("dead_evicted", "Dead letters pushed out by newer ones", books, "dead_evicted")
        text = "1 while both identities of the books hold, 0 where an event vanished uncounted"
        yield GaugeMetricFamily(PREFIX + "books_balanced", text, value=self._pulled.balanced())
        yield from self._of_buffer()
        yield from self._of_deliveries()
        text = "How often the host's clock was set by more than a second since the start"
        yield CounterMetricFamily(PREFIX + "clock_steps", text, value=self._pulled.clock_steps())
        build = GaugeMetricFamily(PREFIX + "build_info", "Always 1", labels=list(self._pulled.build))
        build.add_metric(list(self._pulled.build.values()), 1)
        yield build

    def _of_sources(self, books: Books) -> Iterator[Metric]:
        sources = self._pulled.sources
        for name, joint, text in (
            ("events_received", "received", "Recognised as an attempt at an event"),
            ("events_accepted", "accepted", "Committed to the buffer"),
            ("events_truncated", "truncated", "Accepted with an id or name cut"),
            ("events_restamped", "restamped", "Accepted with the time of receipt for an unreadable one"),
        ):
            yield _labelled(name, text, books, joint, "source", sources)
        yield _labelled(
            "events_rejected", "Refused at the door", books, "rejected", "source", sources, reasons=REASONS
        )
        known = [source for source in sources if source in set(self._pulled.drops_known())]
        if known:
            text = "Dropped by the kernel before they could be read"
            yield _labelled("datagrams_dropped", text, books, "dropped", "source", known, only=True)
        text = "Closed as their user may not send here, since the start"
        family = CounterMetricFamily(PREFIX + "connections_turned_away", text, labels=["source"])
        for source, count in self._pulled.turned_away().items():
            family.add_metric([source], count)
        yield family
        text = "Flag calls of SDKs since the start: passed on to PostHog, or answered while it was away"
        family = CounterMetricFamily(PREFIX + "flag_calls", text, labels=["source", "answer"])
        for source, calls in self._pulled.flag_calls().items():
            for answer, count in calls.items():
                family.add_metric([source, answer], count)
        yield family
        text = "Requests of clients since the start, by the status of their answer"
        family = CounterMetricFamily(PREFIX + "http_answers", text, labels=["source", "status"])
        for source, answers in self._pulled.http_answers().items():
            for status, count in answers.items():
                family.add_metric([source, str(status)], count)
        yield family

    def _of_projects(self, books: Books) -> Iterator[Metric]:
        projects = self._pulled.projects
        yield _labelled("events_delivered", "Taken by PostHog", books, "delivered", "project", projects)
        text = "Taken by PostHog with a remark, beside those without"
        yield _labelled("events_warned", text, books, "warned", "project", projects)
        text = "Refused by PostHog for good"
        yield _labelled("events_dead", text, books, "dead", "project", projects, reasons=DEAD_REASONS)

    def _of_buffer(self) -> Iterator[Metric]:
        stats = self._pulled.stats()
        waited = 0.0 if stats.oldest is None else max(0.0, (self._pulled.now() - stats.oldest) / 1_000_000)
        for name, text, value in (
            ("buffer_events", "Events in the buffer", stats.events),
            ("buffer_bytes", "Packed bytes of the events in the buffer", stats.bytes),
            ("buffer_disk_bytes", "Bytes of all the buffer's files", stats.disk_bytes),
            ("buffer_limit_bytes", "What the buffer's files may grow to", stats.limit_bytes),
            ("buffer_free_bytes", "What still fits into the buffer", stats.free_bytes),
            ("buffer_waiting", "Writes that wait for room in the buffer, or for its disk", stats.waiting),
            ("buffer_writable", "0 where the last write to the buffer failed", self._pulled.writable()),
            ("buffer_oldest_seconds", "How long the oldest event has waited", waited),
            ("dead_letters", "Events that PostHog refused, kept", stats.dead_letters),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)

    def _of_deliveries(self) -> Iterator[Metric]:
        concurrency = GaugeMetricFamily(
            PREFIX + "delivery_concurrency", "Requests that may be under way", labels=["project"]
        )
        held = GaugeMetricFamily(
            PREFIX + "delivery_held",
            "1 while nothing is sent until something changes",
            labels=["project", "reason"],
        )
        ahead = GaugeMetricFamily(
            PREFIX + "clock_ahead_seconds",
            "The host's clock less PostHog's, by its last answer; absent until there was one",
            labels=["project"],
        )
        for facts in self._pulled.deliveries():
            if facts.ahead is not None:
                ahead.add_metric([facts.project], facts.ahead / 1_000_000)
            if facts.concurrency is not None:
                concurrency.add_metric([facts.project], facts.concurrency)
            for reason in HOLDS:
                held.add_metric([facts.project, reason], float(reason in facts.held))
        yield concurrency
        yield held
        yield ahead


def _counter(
    name: str, text: str, books: Books, joint: str, by_reason: Sequence[str] = ()
) -> CounterMetricFamily:
    """One joint's totals over all labels, by reason or as one."""
    sums = dict.fromkeys(by_reason or ("",), 0)
    for (where, _, reason), total in books.items():
        if where == joint:
            key = reason if by_reason else ""
            sums[key] = sums.get(key, 0) + total
    family = CounterMetricFamily(PREFIX + name, text, labels=["reason"] if by_reason else None)
    for reason, total in sums.items():
        family.add_metric([reason] if by_reason else [], total)
    return family


def _labelled(
    name: str,
    text: str,
    books: Books,
    joint: str,
    label: str,
    values: Sequence[str],
    *,
    reasons: Sequence[str] = ("",),
    only: bool = False,
) -> CounterMetricFamily:
    """One joint's totals by source or project; those no longer configured too, unless `only` is set."""
    totals = {(value, reason): 0 for value in values for reason in reasons}
    for (where, value, reason), total in books.items():
        if where == joint and (not only or value in values):
            totals[value, reason] = total
    labels = [label] if reasons == ("",) else [label, "reason"]
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, total in totals.items():
        family.add_metric(list(key[: len(labels)]), total)
    return family
