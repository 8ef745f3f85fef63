"""Reads one syslog line: RFC 5424, RFC 3164 as programs or as devices write it, or no syslog at all."""

import re

from agent.decode import syslog_devices as devices
from agent.decode.syslog_data import structured
from agent.decode.syslog_time import ZONES, Times
from agent.decode.syslog_words import NO_PRIORITY, PRIORITIES, Parsed, Priority, Properties

# In both patterns `(?:x|)` is `(?:x)?` at two thirds of the time: `re` has much to note where it repeats.
_WORD = r"(?:-|([^ ]++)) "
_RFC5424 = re.compile(
    r"<([0-9]{1,3})>1 (?:-|([^ ]{19})(?:\.([0-9]+)|)([Zz]|[+-][0-9]{2}:[0-9]{2})) "
    # Heroku's drains leave the structured data out; what begins as data does and is none is an error.
    rf"{_WORD}{_WORD}{_WORD}{_WORD}(?:-(?: |\Z)|(\[.*)|(?![-\[]|\Z))(.*)",
    re.DOTALL,
)
# What most lines of RFC 3164 look like; whatever it does not fit is read by the whole grammar, with the same
# result. Cisco's mnemonic and a byte order mark in front of the message are left to that, too.
_COMMON = re.compile(
    r"(?:<([0-9]{1,3})>|)(?:([A-Z][a-z]{2} [ 0-9][0-9] [0-9:]{8})(?! (?:[12][0-9]{3}[ :]|UTC-|GMT-))"
    r"|(.{10}T[0-9:]{8})(?:\.([0-9]{1,6})|)(Z|[+-][0-9]{2}:[0-9]{2})) "
    r"(?:([a-zA-Z0-9_.][a-zA-Z0-9_.-]*+) |)"
    r"(?:([a-zA-Z0-9_./()][a-zA-Z0-9_./()-]{0,127}+)(?:\[([a-zA-Z0-9_.][a-zA-Z0-9_.-]*+)\]|):(?: |\Z)"
    r"|(?(6)(?![^ :\[]*[:\[])|(?!)))(?![%\ufeff])(.*)",
    re.DOTALL,
)
# What is no name where a host's or a program's would stand: zones, and how AIX begins what it relays.
_NO_NAMES = frozenset((*ZONES, "Message"))


def parse(line: str, times: Times) -> Parsed:
    """What a line says; it has no line end, and line breaks within it are newlines."""
    modern = line.find(">1 ", 2, 7) > 0
    parsed = _rfc5424(line, times) if modern else _common(line, times)
    if parsed is not None:
        return parsed
    end = line.find(">", 2, 5)
    priority = PRIORITIES.get(line[1:end]) if line.startswith("<") and end > 0 else None
    if priority is None:
        return devices.read_bare(line, times) or _unparsed(line, NO_PRIORITY)
    text = line[end + 1 :]
    if modern:
        return _unparsed(text, priority)
    return devices.read(text, priority, times) or _unparsed(text, priority)


def _unparsed(text: str, priority: Priority) -> Parsed:
    return Properties(text, *priority, unparsed=True), None


def _rfc5424(line: str, times: Times) -> Parsed | None:
    """A line of RFC 5424; None where it breaks the grammar."""
    found = _RFC5424.match(line)
    if found is None:
        return None
    pri, second, fraction, zone, hostname, app, procid, msgid, elements, message = found.groups()
    priority = PRIORITIES.get(pri)
    told = times.told(second, fraction, zone) if second else (None, None)
    if priority is None or told is None:
        return None
    data = None
    if elements:
        read = structured(elements)
        if read is None:
            return None
        data, message = read
    message = message.removeprefix("\ufeff")
    facility, severity = priority
    time, stamp = told
    return Properties(message, facility, severity, hostname, app, procid, msgid, time, data), stamp


def _common(line: str, times: Times) -> Parsed | None:
    """A line of RFC 3164 as most programs write it; None where it needs a closer look."""
    found = _COMMON.match(line)
    if found is None:
        return None
    pri, bsd, iso, fraction, offset, hostname, app, procid, message = found.groups()
    priority = PRIORITIES.get(pri)
    told = times.told(bsd or iso, fraction, offset or "")
    if priority is None or told is None or (hostname or app) in _NO_NAMES:
        return None
    facility, severity = priority
    time, stamp = told
    return Properties(message, facility, severity, hostname, app, procid, None, time), stamp
