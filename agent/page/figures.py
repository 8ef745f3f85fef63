"""The status page's figures: a status document as HTML, one piece for each part of the page.

The page is made of these, and its script asks for them again; so it shows the same with a script and without.
Nothing is added to the document: what it leaves out where it is not private, no piece shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent.events import SHED_AT_THE_DOOR
from agent.page.concerns import Concern, concerns
from agent.page.markup import Content, Html, html, joined, table, tag
from agent.units import format_age

Document = Mapping[str, Any]

MEAN = {
    "rejected": "PostHog refused it (400) while it took others of the same shipment",
    "too_large": "too large for PostHog, alone in its request (413)",
    "dropped": "PostHog's v1 protocol refused it",
    "too_long": "its name or id is longer than the v1 protocol takes",
}


def figures(document: Document, history: Document) -> dict[str, str]:
    """Each part of the page by its id; `title` is the window's, and a text."""
    found = concerns(document)
    parts = {
        "about": _about(document),
        "verdict": _verdict(found),
        "attention": _attention(found),
        "tiles": _tiles(document, history),
        "sources": _sources(document["sources"]),
        "projects": _projects(document["projects"], document["other"]),
        "dead": _dead(document),
        "books": _books(document["books"]),
        "rejected": _last_rejected(document["rejects"]),
    }
    title = f"capture-agent: {_in_short(found)}"
    return {"title": title, **{name: str(part) for name, part in parts.items()}}


def _in_short(found: Sequence[Concern]) -> str:
    return f"{len(found)} to look at" if found else "all well"


def _about(document: Document) -> Html:
    up = format_age(document["uptime_seconds"])
    return html(f"{document['version']}, {document['state']}, up {up}, process {document['pid']}")


def _verdict(found: Sequence[Concern]) -> Html:
    """Read aloud whenever it changes, hence without what changes by the second."""
    if not found:
        return tag("span", "All is well.", "good")
    return joined((tag("span", f"{concern.what}.", concern.level) for concern in found), " ")


def _attention(found: Sequence[Concern]) -> Html:
    if not found:
        return tag("p", "Nothing is held, and there is room in the buffer.")
    return tag("ul", joined(map(_concern, found)))


def _concern(concern: Concern) -> Html:
    facts = tag("p", concern.facts, "facts") if concern.facts else Html()
    what = tag("p", tag("strong", ": ".join(filter(None, (concern.what, concern.why))) + "."))
    return tag("li", joined((what, facts, tag("p", concern.todo))), concern.level)


def _tiles(document: Document, history: Document) -> Html:
    buffer = document["buffer"]
    limit, disk, oldest = buffer["limit_bytes"], buffer["disk_bytes"], buffer["oldest_seconds"]
    filled = buffer["filled"]
    meter = f'<meter min="0" max="1" high="0.8" value="{filled}" aria-hidden="true"></meter>'
    size = Html(f"{meter} {filled:.0%}")
    shown: tuple[tuple[str, Content, str], ...] = (
        ("In", _rate(history["in_per_second"]), "events per second"),
        ("Out", _rate(history["out_per_second"]), "events per second"),
        ("Waiting", buffer["events"], "events in the buffer"),
        ("Oldest", "none" if oldest is None else format_age(oldest), "since it was received"),
        ("Full", size, f"{disk / 2**20:,.1f} of {limit / 2**20:,.0f} MiB on disk"),
        ("Dead letters", buffer["dead_letters"], "kept, refused by PostHog"),
    )
    return joined(
        tag("div", joined((tag("dt", name), tag("dd", value, "value"), tag("dd", unit, "unit"))))
        for name, value, unit in shown
    )


def _rate(rates: Sequence[float]) -> str:
    """The newest; until the first is there, what it waits for."""
    if not rates:
        return "measuring"
    return f"{rates[-1]:,.0f}" if rates[-1] >= 10 or not rates[-1] else f"{rates[-1]:,.1f}"


def _sources(sources: Sequence[Document]) -> Html:
    titles = ("Source", "Received", "Accepted", "Rejected", "Why", "Kernel drops", "Clients")
    return table(
        titles,
        (
            (
                _named(source["name"], f"{source['kind']} at {source['address']}"),
                source["received"],
                source["accepted"],
                sum(source["rejected"].values()),
                _counts(source["rejected"]),
                source["dropped"],
                source["connections"],
            )
            for source in sources
        ),
    )


def _named(name: str, more: str) -> Html:
    return joined((tag("span", name, "name"), tag("span", more, "more")), " ")


def _counts(counts: Mapping[str, int]) -> Content:
    """What stands behind a number, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return joined((tag("span", f"{name}: {count:,}", "unbroken") for name, count in ordered), " ") or None


def _answers(requests: Mapping[str, int]) -> Content:
    return _counts({"none" if status == "0" else status: count for status, count in requests.items()})


def _projects(projects: Sequence[Document], other: Document | None) -> Html:
    rows: list[tuple[Content, ...]] = [
        (
            _named(project["name"], f"to {project['host']}" if project["host"] else "to nowhere"),
            _state(project),
            project["delivered"],
            sum(project["dead"].values()),
            _answers(project["requests"]),
        )
        for project in projects
    ]
    if other:
        name = _named("other", "keys that clients sent")
        dead = sum(other["dead"].values())
        rows.append((name, None, other["delivered"], dead, _answers(other["requests"])))
    return table(("Project", "State", "Delivered", "Dead", "Answers"), rows)


def _state(project: Document) -> Html:
    if held := project["held"]:
        return tag("span", f"held ({held['reason']})", "bad")
    if project["next_try_seconds"] is not None:
        return tag("span", "waits to try again", "warn")
    return tag("span", "flows", "good")


def _dead(document: Document) -> Html:
    rows = list(_dead_rows(document))
    if not rows:
        return tag("p", "PostHog has refused no event.")
    todo = joined(
        (
            "Ask on the host: ",
            tag("code", "capture-agent dead-letter list"),
            " tells which events and why, ",
            tag("code", "dead-letter replay"),
            " sends them again, ",
            tag("code", "dead-letter purge"),
            " forgets them.",
        )
    )
    kept = f"{document['buffer']['dead_letters']:,} are kept now. "
    return joined((table(("Project", "Reason", "In all", "Meaning"), rows), tag("p", joined((kept, todo)))))


def _dead_rows(document: Document) -> Iterator[tuple[Content, ...]]:
    labelled = [(project["name"], project["dead"]) for project in document["projects"]]
    if document["other"]:
        labelled.append(("other", document["other"]["dead"]))
    for name, dead in labelled:
        for reason, count in dead.items():
            yield name, tag("code", reason), count, MEAN.get(reason)


def _books(books: Document) -> Html:
    """Both identities, line by line: a difference is what is just being booked."""
    shed = books["shed"]
    at_the_door = {reason: count for reason, count in shed.items() if reason in SHED_AT_THE_DOOR}
    later = {reason: count for reason, count in shed.items() if reason not in SHED_AT_THE_DOOR}
    came = _account(
        "What was received",
        [("Received", books["received"])],
        [("Accepted", books["accepted"]), ("Rejected", books["rejected"]), *_shed(at_the_door)],
    )
    went = _account(
        "What became of the accepted",
        [("Accepted", books["accepted"]), ("Replayed", books["replayed"])],
        [
            ("Delivered", books["delivered"]),
            ("Dead", books["dead"]),
            *_shed(later),
            ("In the buffer", books["buffered"]),
        ],
    )
    verdict = (
        tag("p", "The books balance: each event is accounted for.", "good")
        if books["balanced"]
        else tag("p", "Events are just being booked. At a quiet moment the books must balance.", "warn")
    )
    return joined((verdict, tag("div", joined((came, went)), "accounts")))


def _shed(shed: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(f"Shed ({reason})", count) for reason, count in sorted(shed.items())] or [("Shed", 0)]


def _account(caption: str, left: Sequence[tuple[str, int]], right: Sequence[tuple[str, int]]) -> Html:
    difference = sum(count for _, count in left) - sum(count for _, count in right)
    less = ((f"less {name.lower()}", count) for name, count in right)
    return table(("Entry", "Events"), [*left, *less, ("Difference", difference)], caption)


def _last_rejected(rejects: Sequence[Document]) -> Html:
    """On the socket only; elsewhere the document has none."""
    if not rejects:
        return Html()
    rows = [
        (
            reject["at"],
            reject["source"],
            tag("code", reject["reason"]),
            tag("code", reject["sample"], "sample"),
        )
        for reject in rejects
    ]
    return joined((tag("h2", "Last rejected"), table(("At", "Source", "Reason", "Its beginning"), rows)))
