"""The grammar of one syslog line: RFC 5424, RFC 3164 in the dialects that devices speak, or neither."""

import re

import msgspec
from msgspec import UNSET, Raw, UnsetType

from agent.decode.syslog_data import StructuredData, structured
from agent.decode.syslog_time import ZONES, Times

SEVERITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
FACILITIES = (
    *("kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp"),
    *("ntp", "audit", "alert", "clock", *(f"local{number}" for number in range(8))),
)

Word = str | UnsetType


class Properties(msgspec.Struct, omit_defaults=True, gc=False):
    """What a line says, as the properties of its event; what it does not say is not there."""

    message: str
    facility: Word = UNSET
    severity: Word = UNSET
    hostname: Word = UNSET
    app: Word = UNSET
    procid: Word = UNSET
    msgid: Word = UNSET
    syslog_timestamp: Word = UNSET
    structured_data: StructuredData | Raw | UnsetType = UNSET
    sequence: Word = UNSET
    unparsed: bool = False


# A line's properties, and its time in UTC where that is finer than a second.
Parsed = tuple[Properties, str | None]
# Facility and severity.
Priority = tuple[Word, Word]

_PRIORITIES: dict[str, Priority] = {
    f"<{8 * number + level}>": (facility, severity)
    for number, facility in enumerate(FACILITIES)
    for level, severity in enumerate(SEVERITIES)
}
_NO_PRIORITY: Priority = (UNSET, UNSET)
_NIL: dict[str | None, UnsetType] = {"-": UNSET, "": UNSET, None: UNSET}

_ISO = r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}"
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
# The year, if at all, in front, in the middle or, as ctime(3) has it, behind.
_BSD = (
    rf"(?:[0-9]{{4}} )?{_MONTH} {{1,2}}[0-9]{{1,2}}(?: [0-9]{{4}})? [0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}"
    r"(?: [12][0-9]{3}(?=[ :]|\Z))?"
)
_OFFSET = r"[+-][0-9]{2}:?[0-9]{2}"
_TIME = (
    rf"(?P<time>{_BSD}|{_ISO})(?:[.,](?P<fraction>[0-9]+))?"
    rf"(?:(?P<offset>[Zz]|{_OFFSET})|[ ](?P<zone>{'|'.join(ZONES)}|{_OFFSET}))?(?=[ :]|\Z)"
)
# What most lines look like; whatever it does not fit is read by the patterns below, with the same result.
_COMMON = re.compile(
    r"(?:([A-Z][a-z]{2} [ 0-9][0-9] [0-9:]{8})(?! [12][0-9]{3}[ :])"
    r"|(.{10}T[0-9:]{8})(?:\.([0-9]{1,6}))?(Z|[+-][0-9]{2}:[0-9]{2})) "
    r"(?:(?:([a-zA-Z0-9_.-]+) )?([a-zA-Z0-9_./()-]{1,128})(?:\[([a-zA-Z0-9_.-]*)\])?:(?: |\Z)"
    r"|([a-zA-Z0-9_.-]+) (?![^ :\[]*[:\[]))(.*)",
    re.DOTALL,
)
# How a message begins that needs a closer look: Cisco's mnemonic, a byte order mark.
_CLOSER = frozenset(("%", "\ufeff"))
# A tag ends with a colon, or with a process id in brackets and perhaps a colon; JSON and `@cee:` are none.
_TAG = re.compile(
    r"(?!@cee:|%)(?P<app>[^\s\[\]{}\"\\]{1,128})"
    r"(?:\[(?P<procid>[^\s\[\]]{0,128})\](?:(?P<colon>:)|(?=\s|\Z))|(?<!:):(?=\s|\Z)) ?"
)
# Cisco's %FACILITY-SUBFACILITY-SEVERITY-MNEMONIC; 64: longer than any of its own.
_WORD = "[A-Za-z0-9_]{1,64}"
_MNEMONIC = re.compile(rf"%(?P<msgid>(?P<app>{_WORD})(?:-{_WORD}){{0,4}}?-[0-7]-{_WORD}) ?: ?")
# What Cisco writes in front of the time: its name and the sequence number, in either order, and whether its
# clock is set; and in place of the time how long it has been up.
_NAME = r"(?![0-9]+:)[A-Za-z0-9_./-]{1,255}"
_NUMBER = r"[0-9]{1,20}"
_FRONT = re.compile(
    rf"(?:: ?)?(?:(?P<host>{_NAME}): ?)?(?:(?P<sequence>{_NUMBER}): ?)?(?:(?P<name>{_NAME}): ?)?[*.]?" + _TIME
)
_UNTIMED = re.compile(
    rf"(?:: ?)?(?:(?P<sequence>{_NUMBER}): )?(?=(?:(?:[0-9]{{1,4}}[ywdhms]){{1,4}}: |[0-9:.]{{7,16}}: )?%)"
)
_PLAIN_TIME = re.compile(_TIME)
# Behind Cisco's time: a zone that may be unknown, or with a space before the colon its name.
_BEHIND = re.compile(r" (?:[A-Z]{2,5}|(?P<host>[^\s:]{1,255}) ): ?(?=%)")


def parse(line: str, times: Times) -> Parsed:
    """What a line says; it has no line end, and line breaks within it are newlines."""
    if not line.startswith("<"):
        return _timed(line, _PLAIN_TIME, _NO_PRIORITY, times) or _unparsed(line, _NO_PRIORITY)
    end = line.find(">", 1, 5) + 1
    priority = _PRIORITIES.get(line[:end])
    if priority is None:
        return _unparsed(line, _NO_PRIORITY)
    if line.startswith("1 ", end):
        return _rfc5424(line, priority, times) or _unparsed(line[end:], priority)
    return _common(line, end, priority, times) or _rfc3164(line[end:], priority, times)


def _unparsed(text: str, priority: Priority) -> Parsed:
    return Properties(text, *priority, unparsed=True), None


def _rfc5424(line: str, priority: Priority, times: Times) -> Parsed | None:
    """A line of RFC 5424; None where it breaks the grammar."""
    try:
        _, when, hostname, app, procid, msgid, rest = line.split(" ", 6)
    except ValueError:
        return None
    if not (hostname and app and procid and msgid):
        return None
    data: StructuredData | Raw | UnsetType = UNSET
    if rest.startswith("- "):
        message = rest[2:]
    elif rest == "-":
        message = ""
    elif (found := structured(rest)) is not None:
        data, message = found
    else:
        return None
    time: Word = UNSET
    stamp: str | None = None
    if when != "-":
        zone = "Z" if when[-1] in "Zz" else when[-6:]
        digits = when[20 : -len(zone)]
        if digits:
            if when[19] != "." or not (digits.isascii() and digits.isdigit()):
                return None
        elif len(when) != 19 + len(zone):
            return None
        told = times.told(when[:19], digits, zone)
        if told is None:
            return None
        time, stamp = told
    facility, severity = priority
    return Properties(
        message.removeprefix("\ufeff"),
        facility,
        severity,
        UNSET if hostname == "-" else hostname,
        UNSET if app == "-" else app,
        UNSET if procid == "-" else procid,
        UNSET if msgid == "-" else msgid,
        time,
        data,
    ), stamp


def _common(line: str, at: int, priority: Priority, times: Times) -> Parsed | None:
    """A line of RFC 3164 as most programs write it; None where it needs a closer look."""
    found = _COMMON.match(line, at)
    if found is None:
        return None
    bsd, iso, fraction, offset, hostname, app, procid, bare, message = found.groups()
    hostname = hostname or bare
    if hostname in ZONES or app in ZONES or message[:1] in _CLOSER:
        return None
    told = times.told(bsd or iso, fraction, offset or "")
    if told is None:
        return None
    facility, severity = priority
    time, stamp = told
    return Properties(
        message,
        facility,
        severity,
        _NIL.get(hostname, hostname),
        _NIL.get(app, app),
        _NIL.get(procid, procid),
        UNSET,
        time,
    ), stamp


def _rfc3164(text: str, priority: Priority, times: Times) -> Parsed:
    """What stands behind a PRI, if not RFC 5424."""
    timed = _timed(text, _FRONT, priority, times)
    if timed is not None:
        return timed
    if (untimed := _UNTIMED.match(text)) is not None:
        properties = Properties(text[untimed.end() :], *priority, sequence=untimed["sequence"] or UNSET)
        # How long it has been up is told nowhere else, so it stays in the message.
        uptime, percent, rest = properties.message.partition("%")
        if (mnemonic := _MNEMONIC.match(percent + rest)) is not None:
            properties.message = uptime + (percent + rest)[mnemonic.end() :]
            properties.app, properties.msgid = mnemonic["app"], mnemonic["msgid"]
            return properties, None
    if (tag := _TAG.match(text)) is not None and (tag["procid"] is None or tag["colon"]):
        properties = Properties("", *priority)
        _read_content(properties, text)
        return properties, None
    return _unparsed(text, priority)


def _timed(text: str, pattern: re.Pattern[str], priority: Priority, times: Times) -> Parsed | None:
    """A line with a time; None where there is none or no such date."""
    front = pattern.match(text)
    if front is None:
        return None
    told = times.told(front["time"], front["fraction"], front["offset"] or front["zone"] or "")
    if told is None:
        return None
    properties = Properties("", *priority, syslog_timestamp=told[0])
    rest = text[front.end() :]
    if rest.startswith(":"):
        _read_content(properties, rest[1:].removeprefix(" "))
    elif (behind := _BEHIND.match(rest)) is not None:
        properties.hostname = behind["host"] or UNSET
        _read_content(properties, rest[behind.end() :])
    else:
        _read_named(properties, rest.lstrip(" "))
    if pattern is _FRONT:
        if front["sequence"]:
            properties.sequence = front["sequence"]
        name = front["host"] or front["name"]
        if name is not None:
            if properties.msgid is UNSET:  # not Cisco's: a tag, and a message that begins with a time
                return None
            properties.hostname = name
    return properties, told[1]


def _read_named(properties: Properties, text: str) -> None:
    """What stands behind a time: the host's name, unless a tag or JSON comes first, and the content."""
    if _TAG.match(text) is None and not text.startswith(("{", "@cee:", "%")):
        hostname, _, text = text.partition(" ")
        properties.hostname = _NIL.get(hostname, hostname)
    _read_content(properties, text)


def _read_content(properties: Properties, text: str) -> None:
    """A tag, Cisco's mnemonic, or both, where they are there, and the message."""
    tag = _TAG.match(text)
    if tag is not None:
        text = text[tag.end() :]
        app, procid = tag["app"], tag["procid"]
        properties.app, properties.procid = _NIL.get(app, app), _NIL.get(procid, procid)
    if (mnemonic := _MNEMONIC.match(text)) is not None:
        text = text[mnemonic.end() :]
        properties.msgid = mnemonic["msgid"]
        if tag is None:
            properties.app = mnemonic["app"]
        elif tag["app"].isdigit() and tag["procid"] is None:  # a sequence number behind the host's name
            properties.app, properties.sequence = mnemonic["app"], tag["app"]
    properties.message = text.removeprefix("\ufeff")
