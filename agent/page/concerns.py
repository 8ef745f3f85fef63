"""What a status document shows to be wrong, in words for people, and what to do about it."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from agent.advice import WHEN_FULL
from agent.units import format_age

# The document is the agent's own: its fields are what `agent/status.py` says.
Document = Mapping[str, Any]

# Beyond this a person should look before senders have to wait.
FULL_SHARE = 0.8
# PostHog tells its time to the second, and an answer takes its own.
CLOCK_ODD_SECONDS = 60.0


class Concern(NamedTuple):
    """One thing that is wrong: how bad, what, why, the facts that change by the second, and what to do."""

    level: Literal["bad", "warn"]
    what: str
    why: str
    facts: str
    todo: str


class Advice(NamedTuple):
    """Why a project is held, and what ends it."""

    why: str
    todo: str


ADVICE: dict[str, Advice] = {
    "key": Advice(
        "PostHog refuses the key (401 or 403)",
        "Compare api_key with the key in the project's settings in PostHog: it begins with phc_, and a"
        " personal key (phx_) does not do. Check that host is the region in which the project lives. Then"
        " reload the agent.",
    ),
    "billing": Advice(
        "PostHog takes no more events for want of payment (402)",
        "Look at billing in the organisation's settings in PostHog: a limit that was reached, or a bill. The"
        " agent goes on by itself when that is settled.",
    ),
    "host": Advice(
        "what answers at host is not PostHog's capture (a redirect, a 404, a web page)",
        "Compare host with PostHog's addresses (https://us.i.posthog.com, https://eu.i.posthog.com, or your"
        " own), and look for a proxy or a sign-in page of the network between. Then reload the agent if host"
        " was wrong; otherwise it goes on by itself.",
    ),
    "breaker": Advice(
        "as many requests in a row failed as max_attempts allows",
        "PostHog or the way to it fails. Look at the network, the proxy, and PostHog's status page. The agent"
        " tries again after cooldown, and goes on by itself.",
    ),
    "rejected": Advice(
        "PostHog refused all that it was sent, so that no event alone can be blamed",
        "Read PostHog's words: `capture-agent status` on the host. Where they are about the request rather"
        " than about an event, look for a proxy that changes requests. The agent tries again after cooldown.",
    ),
    "unconfigured": Advice(
        "its events wait, but it is not in the configuration",
        "Configure a project of this name, and they are delivered. Until then they keep their place in the"
        " buffer.",
    ),
}

# Of keys that clients sent themselves, the mending is theirs.
ADVICE_ON_CLIENTS_KEYS: dict[str, str] = {
    "key": "Mend the key in the program that sends it: its SDK was given one that PostHog does not know."
    " Other keys' events are delivered meanwhile.",
}


def concerns(document: Document) -> list[Concern]:
    """All there are, the worst first."""
    found = [*_of_buffer(document["buffer"])]
    if document["state"] != "running":
        found.append(Concern("warn", f"The agent is {document['state']}", "", "", "It takes no new events."))
    if (reload := document.get("reload")) and reload["refused"]:
        todo = "It goes on as it was. Mend what `capture-agent check` says, and reload again."
        found.append(Concern("warn", "The last reload was refused", "", f"at {reload['at']}", todo))
    for project in document["projects"]:
        found += _of_project(project)
    return sorted(found, key=lambda concern: concern.level != "bad")


def _of_buffer(buffer: Document) -> Iterator[Concern]:
    share = buffer["filled"]
    if buffer["trouble"]:
        todo = "Senders wait, and nothing acknowledged is lost. Look at the disk: its space, inodes, log."
        yield Concern("bad", "The buffer cannot be written", "", buffer["trouble"], todo)
    elif buffer["waiting"]:
        todo = "Senders wait until events are delivered. Mend what holds delivery, or raise buffer.max_size."
        yield Concern("bad", "The buffer is full", "", f"{buffer['waiting']:,} puts wait for room", todo)
    elif buffer["dropping"]:
        todo = "They are lost. Mend what holds delivery, or raise buffer.max_size."
        what = f"The buffer is full, and {WHEN_FULL[buffer['when_full']]}"
        yield Concern("bad", what, "", f"{buffer['dropping']:,} events so far", todo)
    elif share >= FULL_SHARE:
        then = WHEN_FULL[buffer["when_full"]]
        todo = f"When it is full, {then}. Mend what holds delivery, or raise buffer.max_size."
        yield Concern("warn", "The buffer is almost full", "", f"{share:.0%} of its room", todo)


def _of_project(project: Document) -> Iterator[Concern]:
    name = project["name"]
    if held := project["held"]:
        advice = ADVICE[held["reason"]]
        what = f"Project {name} is held ({held['reason']})"
        yield Concern("bad", what, advice.why, _facts(held), advice.todo)
    for held in project["held_keys"]:
        reason, count = held["reason"], held["keys"]
        keys = "a key that a client sent is" if count == 1 else f"{count} keys that clients sent are"
        todo = ADVICE_ON_CLIENTS_KEYS.get(reason, ADVICE[reason].todo)
        what = f"Project {name}: {keys} held ({reason})"
        yield Concern("warn", what, ADVICE[reason].why, _facts(held), todo)
    if (seconds := project["next_try_seconds"]) is not None:
        facts = f"{project['failures']} failures in a row, next try in {format_age(seconds)}"
        if error := project["last_error"]:
            facts += f"; at {error['at']}: {error['text']}"
        todo = "PostHog or the way to it fails; events wait, and the agent goes on by itself. If PostHog is"
        todo += " well, `capture-agent doctor` tells what is in the way."
        yield Concern("warn", f"Project {name} waits between two tries", "", facts, todo)
    ahead = project["clock_ahead_seconds"]
    if ahead is not None and abs(ahead) > CLOCK_ODD_SECONDS:
        how = "ahead of" if ahead > 0 else "behind"
        todo = "Events keep their instants, but set the clock: NTP is off or cannot reach its servers."
        yield Concern("warn", f"This host's clock is {how} PostHog's", "", format_age(abs(ahead)), todo)


def _facts(held: Document) -> str:
    facts = [str(held.get("why") or "")]
    if (seconds := held["since_seconds"]) is not None:
        facts.append(f"for {format_age(seconds)}")
    if (seconds := held["next_probe_seconds"]) is not None:
        facts.append(f"next try in {format_age(seconds)}")
    return "; ".join(filter(None, facts))
