"""What a syslog line can say: the properties of its event, and the names that priorities have."""

import msgspec
from msgspec import Raw

from agent.decode.syslog_data import StructuredData

SEVERITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
FACILITIES = (
    *("kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp"),
    *("ntp", "audit", "alert", "clock", *(f"local{number}" for number in range(8))),
)

Word = str | None


class Properties(msgspec.Struct, omit_defaults=True, gc=False):
    """What a line says, as the properties of its event; what it does not say is not there."""

    message: str
    facility: Word = None
    severity: Word = None
    hostname: Word = None
    app: Word = None
    procid: Word = None
    msgid: Word = None
    syslog_timestamp: Word = None
    structured_data: StructuredData | Raw | None = None
    sequence: Word = None
    unparsed: bool = False


# A line's properties, and its time in UTC where that is finer than a second.
Parsed = tuple[Properties, str | None]
# Facility and severity.
Priority = tuple[Word, Word]

NO_PRIORITY: Priority = (None, None)
# By their digits, and what it is to have none.
PRIORITIES: dict[str | None, Priority] = {None: NO_PRIORITY} | {
    str(8 * number + level): (facility, severity)
    for number, facility in enumerate(FACILITIES)
    for level, severity in enumerate(SEVERITIES)
}
