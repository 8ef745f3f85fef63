"""Reads lines of RFC 3164 in all the dialects that devices speak, Cisco's headers among them."""

import re

from agent.decode.syslog_time import ZONES, Times
from agent.decode.syslog_words import NO_PRIORITY, Parsed, Priority, Properties, Word

# Wherever it is tried on many lines, `(?:x|)` stands for `(?:x)?`, which takes `re` half as long again.
_CLOCK = "[0-9]{2}:[0-9]{2}:[0-9]{2}"
_ISO = rf"[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}[Tt ]{_CLOCK}"
_YEAR_BEHIND = "(?: [12][0-9]{3}(?![^ :])|)"
# The year, if at all, in front, in the middle or, as ctime(3) has it, behind.
_BSD = rf"(?:[0-9]{{4}} |)[A-Za-z]{{3}} {{1,2}}[0-9]{{1,2}} (?:[0-9]{{4}} |){_CLOCK}{_YEAR_BEHIND}"
# With hours alone, only offsets that some place has: UTC-12 to UTC+14.
_OFFSET = "[+-](?:[0-9]{2}:?[0-9]{2}|0[0-9]|1[0-4])"
# A zone, and those that only Cisco's mnemonic behind tells from a name: in small letters, or not known here.
_ZONES, _SMALL_ZONES = "|".join(ZONES), "|".join(ZONES).lower()
_ZONE = (
    rf"(?P<zone>(?:{_ZONES}|{_OFFSET})(?![^ :])|(?:{_SMALL_ZONES})(?=: ?%))"
    r"|(?:UTC|GMT)(?P<ahead>[+-](?:0?[0-9]|1[0-4])(?::?[0-5][0-9]|))(?![^ :])|[A-Z]{2,6}(?=: ?%)"
)
# As date(1) has it, the year stands behind the zone.
_TIME = (
    rf"(?P<time>(?P<bsd>{_BSD})|{_ISO})(?:[.,](?P<fraction>[0-9]+)|)"
    rf"(?:[ ](?:{_ZONE})|(?P<offset>[Zz]|{_OFFSET})|)(?(bsd)(?P<year>{_YEAR_BEHIND}))(?![^ :])"
)
# A tag ends with a colon, or with a process id in brackets and perhaps a colon; JSON and `@cee:` are none.
_TAG = re.compile(
    r"(?!@cee:|%)(?P<app>[^\s\[\]{}\"\\]{1,128})"
    r"(?:\[(?P<procid>[^\s\[\]]{0,128}+)\](?:(?P<colon>:)|(?!\S))|(?<!:):(?!\S)) ?"
)
_NIL = frozenset((None, "", "-"))
# Cisco's %FACILITY-SEVERITY-MNEMONIC; facilities may have hyphens, and 64 is longer than any of its words.
_WORD = "[A-Za-z0-9_]{1,64}+"
_FACILITY, _SEVERITY_MNEMONIC = f"{_WORD}(?:-{_WORD}){{0,4}}?", f"-[0-7]-{_WORD}"
_MNEMONIC = re.compile(f"%(?P<msgid>(?P<app>{_FACILITY}){_SEVERITY_MNEMONIC}) ?: ?")
# How long a device has been up, which Cisco tells where it has no clock.
_WEEKS = "(?:[0-9]{1,4}[ywdhms]){1,4}"
_UPTIME = rf"(?:{_WEEKS}|[0-9:.]{{7,16}}): "
# What Cisco writes in front of the time: a lone colon, its name and the sequence number, in either order, and
# what is wrong with its clock: `*` where it was never set, or not by anything reliable, `.` where it was, and
# only NTP is away. What a `*` stands before is no time that an event can have.
_NAME = rf"(?!(?:[0-9]+|{_WEEKS}):)[A-Za-z0-9_./-]{{1,255}}+"
_HEAD = (
    rf"(?:(?P<lone>: ?)|)(?:(?P<host>{_NAME}): ?|)"
    rf"(?:(?P<sequence>[0-9]{{1,20}}+):(?: |(?![0-9]))(?(host)|(?:(?P<name>{_NAME}): ?|))|)"
)
_FRONT = re.compile(rf"{_HEAD}(?:(?P<unset>\*)|\.|){_TIME}")
_UNTIMED = re.compile(rf"{_HEAD}(?P<uptime>{_UPTIME}|)(?=%|\S{{1,255}}: %)")
# What may stand behind the time: a zone that is not known and, behind Cisco's colon, the device's name.
_UNKNOWN_ZONE = re.compile(" [A-Z]{2,6}(?=:)")
_ORIGIN = re.compile(rf"(?P<host>[^\s:%]{{1,255}}+) (?=%{_FACILITY}{_SEVERITY_MNEMONIC} ?:)")
# What AIX puts in front of what it relays.
_FORWARDED = re.compile(r"Message forwarded from (?P<host>[^\s:]{1,255}): ?")


def read(text: str, priority: Priority, times: Times) -> Parsed | None:
    """What stands behind a PRI, if not RFC 5424; None where it is not syslog."""
    text = text.lstrip(" ")
    front = _FRONT.match(text)
    timed = _timed(text, front, priority, times) if front is not None else None
    return timed or _untimed(text, priority)


def read_bare(line: str, times: Times) -> Parsed | None:
    """A line without a PRI; None where it does not begin with a time."""
    front = _FRONT.match(line)
    return _timed(line, front, NO_PRIORITY, times) if front is not None and not front.start("time") else None


def _timed(text: str, front: re.Match[str], priority: Priority, times: Times) -> Parsed | None:
    """A line with a time; None where there is no such date, or a tag and a time look like Cisco's head."""
    lone, host, sequence, name, unset, when, _, fraction, zone, ahead, offset, year = front.groups()
    told = times.told(when + year if year else when, fraction, offset or zone or _ahead(ahead))
    if told is None:
        return None
    facility, severity = priority
    name = host or name
    properties = Properties("", facility, severity, name, None, None, None, told[0], None, sequence)
    rest = text[front.end() :]
    sure = lone or sequence
    if sure and (unknown := _UNKNOWN_ZONE.match(rest)) is not None:
        rest = rest[unknown.end() :]
    _read_behind(properties, rest)
    if properties.msgid is None:
        if sure and rest.startswith(":"):
            properties.app = properties.procid = None
            properties.message = rest[1:].removeprefix(" ").removeprefix("\ufeff")
        elif name is not None:
            return None
    return properties, None if unset else told[1]


def _ahead(ahead: str | None) -> str:
    """How far a zone is ahead of UTC, with all its digits; "" where nothing is said."""
    if ahead is None:
        return ""
    digits = ahead[1:].replace(":", "")
    hours, minutes = (digits, "00") if len(digits) <= len("12") else (digits[:-2], digits[-2:])
    return f"{ahead[0]}{hours:0>2}:{minutes}"


def _read_behind(properties: Properties, rest: str) -> None:
    """What stands behind a time: the host's name, unless a tag or JSON comes first, and the content."""
    tag = None
    if rest.startswith(":"):
        text = rest[1:].removeprefix(" ")
        if not text.startswith("%"):
            if properties.hostname is None and (origin := _ORIGIN.match(text)) is not None:
                properties.hostname = origin["host"]
                text = text[origin.end() :]
            tag = _TAG.match(text)
    else:
        text = rest.lstrip(" ")
        tag = _TAG.match(text)
        if properties.hostname is None and tag is None and not text.startswith(("{", "@cee:", "%")):
            hostname, text = _parted(text)
            properties.hostname = _word(hostname)
            tag = _TAG.match(text)
    _read_content(properties, text, tag)


def _parted(text: str) -> tuple[str, str]:
    """The host's name and what follows it."""
    hostname, _, behind = text.partition(" ")
    if hostname == "Message" and (forwarded := _FORWARDED.match(text)) is not None:
        return forwarded["host"], text[forwarded.end() :]
    if behind.startswith((":%", ": %")):  # as ASA writes it
        behind = behind[1:].removeprefix(" ")
    return hostname, behind


def _read_content(properties: Properties, text: str, tag: re.Match[str] | None) -> None:
    """Cisco's mnemonic behind the tag, where they are there, and the message."""
    if tag is not None:
        text = text[tag.end() :]
        app, procid, _ = tag.groups()
        properties.app, properties.procid = _word(app), _word(procid)
    if text.startswith("%") and (mnemonic := _MNEMONIC.match(text)) is not None:
        text = text[mnemonic.end() :]
        properties.msgid, facility = mnemonic.groups()
        if tag is None:
            properties.app = facility
        elif procid is None and app.isdecimal():  # a sequence number behind the host's name
            properties.app, properties.sequence = facility, app
        elif procid is None and properties.hostname is None:  # not a program but the device
            properties.app, properties.hostname = facility, properties.app
    properties.message = text.removeprefix("\ufeff")


def _word(text: str | None) -> Word:
    """A name, where it is one."""
    return None if text in _NIL else text


def _untimed(text: str, priority: Priority) -> Parsed | None:
    """A line without a time: Cisco's, or one with a tag; None where it is neither."""
    if "%" in text and (head := _UNTIMED.match(text)) is not None:
        host, name, sequence, uptime = head.group("host", "name", "sequence", "uptime")
        properties = Properties("", *priority, hostname=host or name, sequence=sequence)
        content = text[head.end() :]
        _read_content(properties, content, _TAG.match(content))
        if properties.msgid is not None:
            # How long it has been up is told nowhere else, so it stays in the message.
            properties.message = (uptime or "") + properties.message
            return properties, None
    tag = _TAG.match(text)
    if tag is not None and (tag["procid"] is None or tag["colon"]):
        properties = Properties("", *priority)
        _read_content(properties, text, tag)
        return properties, None
    return None
