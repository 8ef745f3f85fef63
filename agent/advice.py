"""What to do next about each kind of hold, in the words that logs and commands share."""

from collections.abc import Mapping

# By the reasons of holds (`agent/deliver/keys.py`, `agent/deliver/pace.py`, `agent/status.py`).
HOLDS: Mapping[str, str] = {
    "key": "set project.api_key to the one in PostHog's settings (Project, Project API key), and"
    " project.host to that project's region",
    "billing": "pay the bill or raise the limit in PostHog (Settings, Billing); events wait meanwhile",
    "host": "set project.host to PostHog's address; look for a proxy or a portal on the way",
    "rejected": "`capture-agent status` has PostHog's words; it is asked again by itself; where it refuses"
    " everything, project.host or a proxy is likely at fault",
    "breaker": "it is asked again after delivery.cooldown; `capture-agent doctor` tells what is in the way",
    "unconfigured": "configure a project of that name, and they are delivered",
}

# By `when_full`: what becomes of events when the buffer is full.
WHEN_FULL: Mapping[str, str] = {
    "block": "senders wait",
    "drop_oldest": "the oldest events are dropped for new ones",
    "drop_newest": "new events are dropped",
}

# For holds of keys that clients sent.
FOREIGN_KEYS = 'look for a wrong key in an SDK\'s configuration; keys = "configured" refuses them at the door'

# For what passes by itself once the other side is there again.
AWAY = "nothing, if PostHog is known to be away; else `capture-agent doctor` tells what is in the way"
