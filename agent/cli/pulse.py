"""What changes from one status document to the next: rates, and how they went in the last minute. Pure."""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# The documents are JSON, of which `agent/status.py` says what they have.
Document = dict[str, Any]

# A picture is of the last minute, one bar a second.
KEPT = 60
BARS = "▁▂▃▄▅▆▇█"
# What of each is counted.
SOURCE = ("received", "accepted", "rejected", "dropped")
PROJECT = ("delivered", "dead")
BOOKS = ("received", "accepted", "rejected", "shed", "delivered", "dead")


class Pulse:
    """Fed with status documents as they come, it says how fast everything goes."""

    def __init__(self) -> None:
        self._history: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._before: dict[str, float] = {}
        self._at = 0.0

    def feel(self, document: Document, at: float) -> Document | None:
        """The rates since the document before, which came `at` an earlier second; None of the first one."""
        now, seconds = dict(_totals(document)), at - self._at
        # A total that is new or went back (another buffer) says nothing yet.
        gone = {name: max(0.0, total - self._before.get(name, total)) for name, total in now.items()}
        first = not self._before
        self._before, self._at = now, at
        if first or seconds <= 0:
            return None
        rates = {name: round(steps / seconds, 1) for name, steps in gone.items()}
        rates["buffered"] = document["buffer"]["events"]
        for name, rate in rates.items():
            self._history[name].append(rate)
        projects = [_rates(rates, "project", project["name"], PROJECT) for project in document["projects"]]
        if document["other"]:
            projects.append(_rates(rates, "project", OTHERS, PROJECT))
        return {
            "at": document["clock"]["now"],
            "state": document["state"],
            "seconds": round(seconds, 3),
            "rates": {name: rates[f"books {name}"] for name in BOOKS},
            "sources": [_rates(rates, "source", one["name"], SOURCE) for one in document["sources"]],
            "projects": projects,
            "held": {one["name"]: one["held"]["reason"] for one in document["projects"] if one["held"]},
            "buffer": document["buffer"],
        }

    def picture(self, name: str, width: int) -> str:
        """How one rate went, by the name that `_totals` gives it; and `buffered`, which is no rate."""
        return sparkline(self._history[name], width)


# As in the metrics: what carries another key than a configured project's.
OTHERS = "other"


def _rates(rates: Mapping[str, float], what: str, name: str, joints: Iterable[str]) -> Document:
    found = {joint: rates.get(f"{what} {name} {joint}") for joint in joints}
    return {"name": name, **found}


def _totals(document: Document) -> Iterator[tuple[str, float]]:
    """Everything that is counted, by a name of its own; what is not known (drops) has none."""
    for joint in BOOKS:
        yield f"books {joint}", _total(document["books"][joint])
    for source in document["sources"]:
        for joint in SOURCE:
            if source[joint] is not None:
                yield f"source {source['name']} {joint}", _total(source[joint])
    others = [{**document["other"], "name": OTHERS}] if document["other"] else []
    for project in [*document["projects"], *others]:
        for joint in PROJECT:
            yield f"project {project['name']} {joint}", _total(project[joint])


def _total(counted: float | Mapping[str, float]) -> float:
    """A count, or those by reason together."""
    return sum(counted.values()) if isinstance(counted, Mapping) else counted


def sparkline(values: Iterable[float], width: int) -> str:
    """The newest values as bars, the newest at the right; the highest is as high as a line, 0 has none."""
    shown = list(values)[-width:] if width > 0 else []
    highest = max(shown, default=0)
    bars = (BARS[min(7, int(value / highest * 8))] if value else " " for value in shown)
    return "".join(bars).rjust(width)
