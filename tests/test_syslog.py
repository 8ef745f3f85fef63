"""Syslog: what each dialect's lines become, when they say that they were written, and that none is lost."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.decode import syslog_data, syslog_devices, syslog_line, syslog_time
from agent.decode.lines import Lines
from agent.decode.objects import Json
from agent.decode.syslog import Syslog
from agent.decode.syslog_time import Times
from agent.envelope import LONGEST, Envelope, Flaws, Stamp, complete
from agent.events import Instant, Read
from agent.pack import inflate
from agent.vouch import Door, Rules

BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 10, 15, 12, 0, tzinfo=UTC)


def wall(moment: datetime) -> int:
    return int(moment.timestamp() * 1e6)


def decoder(**changes: Any) -> Syslog:
    given = {"event": "syslog", "distinct_id": "{hostname}", "hostname": "here", "zone": BERLIN}
    return Syslog(**{**given, "max_event": 1_000_000, **changes})


def envelopes_of(*lines: bytes, at: datetime = NOW, by: Syslog | None = None) -> list[Envelope]:
    read = Read(b"".join(line + b"\n" for line in lines), Instant(wall(at), 1, "boot"))
    decoded = (by or decoder()).decode([read], Flaws())
    assert (decoded.rejects, decoded.places) == ([], None)
    assert decoded.lines == [len(decoded.envelopes)]
    return decoded.envelopes


def one(line: str | bytes, **how: Any) -> dict[str, Any]:
    """The properties of what one line becomes."""
    [envelope] = envelopes_of(line if isinstance(line, bytes) else line.encode(), **how)
    assert envelope.event == "syslog"
    properties: dict[str, Any] = json.loads(bytes(envelope.properties))
    return properties


def told(**properties: Any) -> dict[str, Any]:
    return properties


# --- RFC 5424 --------------------------------------------------------------------------------------

SD = '[exampleSDID@32473 iut="3" eventSource="Application" eventID="1011"]'
SD_READ = {"exampleSDID@32473": {"iut": "3", "eventSource": "Application", "eventID": "1011"}}


@pytest.mark.parametrize(
    ("line", "properties"),
    [
        (  # RFC 5424, 6.5, example 1
            "<34>1 2003-10-11T22:14:15.003Z mymachine.example.com su - ID47 - \ufeff'su root' failed",
            told(
                message="'su root' failed",
                facility="auth",
                severity="crit",
                hostname="mymachine.example.com",
                app="su",
                msgid="ID47",
                syslog_timestamp="2003-10-11T22:14:15.003Z",
            ),
        ),
        (  # example 2
            "<165>1 2003-08-24T05:14:15.000003-07:00 192.0.2.1 myproc 8710 - - %% It's time to make.",
            told(
                message="%% It's time to make.",
                facility="local4",
                severity="notice",
                hostname="192.0.2.1",
                app="myproc",
                procid="8710",
                syslog_timestamp="2003-08-24T05:14:15.000003-07:00",
            ),
        ),
        (  # example 3
            f"<165>1 2003-10-11T22:14:15.003Z mymachine.example.com evntslog - ID47 {SD} \ufeffAn event",
            told(
                message="An event",
                facility="local4",
                severity="notice",
                hostname="mymachine.example.com",
                app="evntslog",
                msgid="ID47",
                syslog_timestamp="2003-10-11T22:14:15.003Z",
                structured_data=SD_READ,
            ),
        ),
        (  # example 4
            f'<165>1 2003-10-11T22:14:15.003Z a evntslog - ID47 {SD}[examplePriority@32473 class="high"]',
            told(
                message="",
                facility="local4",
                severity="notice",
                hostname="a",
                app="evntslog",
                msgid="ID47",
                syslog_timestamp="2003-10-11T22:14:15.003Z",
                structured_data={**SD_READ, "examplePriority@32473": {"class": "high"}},
            ),
        ),
        ("<0>1 - - - - - -", told(message="", facility="kern", severity="emerg")),
        ("<191>1 - - - - - - ", told(message="", facility="local7", severity="debug")),
        ("<13>1 - - - - - -  two", told(message=" two", facility="user", severity="notice")),
        (  # as Heroku's drains write it, without structured data
            "<40>1 2012-11-30T06:45:29+00:00 host app web.3 - State changed",
            told(
                message="State changed",
                facility="syslog",
                severity="emerg",
                hostname="host",
                app="app",
                procid="web.3",
                syslog_timestamp="2012-11-30T06:45:29Z",
            ),
        ),
    ],
)
def test_rfc5424(line: str, properties: dict[str, Any]) -> None:
    """The RFC's own examples, and the least that it allows."""
    assert one(line) == properties


@pytest.mark.parametrize(
    ("data", "read", "message"),
    [
        ("[a]", {"a": {}}, ""),
        ("[a] m", {"a": {}}, "m"),
        ("[a][b]", {"a": {}, "b": {}}, ""),
        ('[a x=""] m', {"a": {"x": ""}}, "m"),
        ('[a x="1" x="2" x="3"]', {"a": {"x": ["1", "2", "3"]}}, ""),
        ('[a x="1"][a y="2"] m', {"a": {"x": "1", "y": "2"}}, "m"),
        ('[a x="1"][b z="2"][a y="3"] m', {"a": {"x": "1", "y": "3"}, "b": {"z": "2"}}, "m"),
        ('[a x="1"][a x="2"]', {"a": {"x": ["1", "2"]}}, ""),
        (r'[a x="q\"b\\s\]e\n" y="2"] m', {"a": {"x": 'q"b\\s]e\\n', "y": "2"}}, "m"),
        (r'[a x="\\"] m', {"a": {"x": "\\"}}, "m"),
        ('[a x="]" y="] "] m "] n', {"a": {"x": "]", "y": "] "}}, 'm "] n'),
        ('[a x="1"] [b y="2"] m', {"a": {"x": "1"}}, '[b y="2"] m'),
        ('[a%s %d="%s"] 100 %', {"a%s": {"%d": "%s"}}, "100 %"),
        ('[a x="\x01\u2028ü"] ü', {"a": {"x": "\x01\u2028ü"}}, "ü"),
        ('[a x="1" ] m', {"a": {"x": "1"}}, "m"),
    ],
)
def test_structured_data(data: str, read: dict[str, Any], message: str) -> None:
    """Escapes are undone, a repeated parameter is a list, repeated elements are one."""
    properties = one(f"<13>1 - - - - - {data}")
    assert (properties["structured_data"], properties["message"]) == (read, message)


NAMES = st.sampled_from(["a", "b", "a%s", "x@1", "["])
VALUES = st.text('ab"\\] =%[\0ü', max_size=6)


def data_of(elements: list[tuple[str, list[tuple[str, str]]]]) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("]", "\\]")

    def params(pairs: list[tuple[str, str]]) -> str:
        return "".join(f' {name}="{escaped(value)}"' for name, value in pairs)

    return "".join(f"[{name}{params(pairs)}]" for name, pairs in elements)


DATA = st.lists(st.tuples(NAMES, st.lists(st.tuples(NAMES, VALUES), max_size=3)), min_size=1, max_size=3)


@given(DATA, st.sampled_from(["", " ", ' m "] n', " [x]"]))
@settings(deadline=None)
def test_structured_data_comes_back(elements: list[tuple[str, list[tuple[str, str]]]], message: str) -> None:
    """Whatever is written by the RFC's rules is read as it was."""
    found = syslog_data.structured(data_of(elements) + message)
    assert found is not None
    assert found[1] == message[1:]
    read = json.loads(syslog_data._encode(found[0]))
    wanted: dict[str, dict[str, list[str]]] = {}
    for name, pairs in elements:
        for key, value in pairs:
            wanted.setdefault(name, {}).setdefault(key, []).append(value)
        wanted.setdefault(name, {})
    assert read == {
        name: {key: many if len(many) > 1 else many[0] for key, many in params.items()}
        for name, params in wanted.items()
    }


@given(st.text('a="\\] [%\0', max_size=25))
@settings(deadline=None, max_examples=300)
def test_the_short_way_through_data_ends_where_the_long_way_does(text: str) -> None:
    """A shape that is known and the grammar give the same."""
    text = '[a x="' + text
    quick, slow = syslog_data.structured(text), syslog_data._elements(text)
    assert (quick is None) == (slow is None)
    if quick is not None and slow is not None:
        assert json.loads(syslog_data._encode(quick[0])) == slow[0]
        assert quick[1] == slow[1]


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "1 ",
        "1 2003-10-11T22:14:15Z host app - -",
        "1 2003-10-11T22:14:15Z host app - - ",
        "1 2003-10-11T22:14:15Z host app - - -m",
        "1 2003-10-11T22:14:15Z host app - - [a",
        '1 2003-10-11T22:14:15Z host app - - [a x="1]',
        '1 2003-10-11T22:14:15Z host app - - [a x="1"',
        '1 2003-10-11T22:14:15Z host app - - [a x="1\\"]',
        "1 2003-10-11T22:14:15Z host app - - [a x=1]",
        '1 2003-10-11T22:14:15Z host app - - [ a x="1"]',
        '1 2003-10-11T22:14:15Z host app - - [a x="1"]m',
        "1 2003-10-11T22:14:15Z  app - - - m",
        "1 2003-10-11T22:14:15 host app - - - m",
        "1 2003-10-11T22:14:15.Z host app - - - m",
        "1 2003-10-11T22:14:15,5Z host app - - - m",
        "1 2003-10-11T22:14:15UTC+01 host app - - - m",
        "1 2003-10-11T22:14:15+0100 host app - - - m",
        "1 2003-02-29T22:14:15Z host app - - - m",
        "1 2003-10-11T24:14:15Z host app - - - m",
        "1 2003-10-11T22:14:15+24:00 host app - - - m",
        "1 Oct host app - - - m",
        "1 Z host app - - - m",
        "2 2003-10-11T22:14:15Z host app - - - m",
        "10 2003-10-11T22:14:15Z host app - - - m",
    ],
)
def test_broken_rfc5424(text: str) -> None:
    """What breaks the grammar stays whole behind its PRI."""
    assert one(f"<13>{text}") == told(message=text, facility="user", severity="notice", unparsed=True)


# --- RFC 3164 and its dialects ---------------------------------------------------------------------

OCT = "2026-10-11T22:14:15+02:00"


@pytest.mark.parametrize(
    ("line", "properties"),
    [
        ("Oct 11 22:14:15 mymachine su: 'su root' failed", ("mymachine", "su", None, "'su root' failed")),
        ("Oct 11 22:14:15 su: 'su root' failed", (None, "su", None, "'su root' failed")),
        ("Oct 11 22:14:15 systemd[1]: Started.", (None, "systemd", "1", "Started.")),
        ("Oct 11 22:14:15 h CROND(pam_unix)[12]: x", ("h", "CROND(pam_unix)", "12", "x")),
        ("Oct 11 22:14:15 h postfix/smtpd[123]: x: y", ("h", "postfix/smtpd", "123", "x: y")),
        ("Oct 11 22:14:15 h systemd-logind[1]: x", ("h", "systemd-logind", "1", "x")),
        ("Oct 11 22:14:15 h app[12] x", ("h", "app", "12", "x")),
        ("Oct 11 22:14:15 app[12] x", (None, "app", "12", "x")),
        ("Oct 11 22:14:15 h app[12]:x", ("h", "app", "12", "x")),
        ("Oct 11 22:14:15 h app[]: x", ("h", "app", None, "x")),
        ("Oct 11 22:14:15 h app[-]: x", ("h", "app", None, "x")),
        ("Oct 11 22:14:15 h app:  x ", ("h", "app", None, " x ")),
        ("Oct 11 22:14:15 h app:", ("h", "app", None, "")),
        ("Oct 11 22:14:15 h app: ", ("h", "app", None, "")),
        ("Oct 11 22:14:15 h a message: or so", ("h", None, None, "a message: or so")),
        ("Oct 11 22:14:15 h -- MARK --", ("h", None, None, "-- MARK --")),
        ("Oct 11 22:14:15 h", ("h", None, None, "")),
        ("Oct 11 22:14:15 - app: x", (None, "app", None, "x")),
        ("Oct 11 22:14:15", (None, None, None, "")),
        ("Oct 11 22:14:15 ", (None, None, None, "")),
        ("Oct 11 22:14:15  h app: x", ("h", "app", None, "x")),
        ("Oct 11 22:14:15 192.0.2.1 app: x", ("192.0.2.1", "app", None, "x")),
        ("Oct 11 22:14:15 fe80::1 app[1]: x", ("fe80::1", "app", "1", "x")),
        ("Oct 11 22:14:15 fe80:: app[1]: x", ("fe80::", "app", "1", "x")),
        ("Oct 11 22:14:15 h kernel: [12.345] x", ("h", "kernel", None, "[12.345] x")),
        ('Oct 11 22:14:15 h {"a": 1}', ("h", None, None, '{"a": 1}')),
        ('Oct 11 22:14:15 {"a": 1}', (None, None, None, '{"a": 1}')),
        ("Oct 11 22:14:15 h " + "t" * 128 + ": x", ("h", "t" * 128, None, "x")),
        ("Oct 11 22:14:15 h " + "t" * 129 + ": x", ("h", None, None, "t" * 129 + ": x")),
        ("Oct 11 22:14:15 U7PG2,f09f,v4.0: hostapd: x", (None, "U7PG2,f09f,v4.0", None, "hostapd: x")),
        ("Oct 11 22:14:15 MikroTik system,info a: x", ("MikroTik", None, None, "system,info a: x")),
        ("Oct 11 22:14:15 h %x: y", ("h", None, None, "%x: y")),
        ("Oct 11 22:14:15 UTC su: x", (None, "su", None, "x")),
        ("Oct 11 22:14:15 UTC h su: x", ("h", "su", None, "x")),
        ("Oct 11 22:14:15 est h: x", ("est", "h", None, "x")),
        ("Oct 11 22:14:15 CRON: x", (None, "CRON", None, "x")),
        ("Oct 11 22:14:15 -x y: z", ("-x", "y", None, "z")),
        ("Oct 11 22:14:15 h: z y %x: z", (None, "h", None, "z y %x: z")),
        ("Oct 11 22:14:15: z y %x: z", (None, None, None, "z y %x: z")),
        ("Oct 11 22:14:15 h : %x", ("h", None, None, "%x")),
        ("Oct 11 22:14:15 Message forwarded from h: su[1]: x", ("h", "su", "1", "x")),
        ("Oct 11 22:14:15 Message forwarded from h: and so on", ("h", None, None, "and so on")),
        ("Oct 11 22:14:15 Message su: x", ("Message", "su", None, "x")),
        ("Oct 11 22:14:15 Message: x", (None, "Message", None, "x")),
        ("OCT 11 22:14:15 h su: x", ("h", "su", None, "x")),
        ("oct 11 22:14:15 h su: x", ("h", "su", None, "x")),
        ("Oct 11 22:14:15 2026  h su: x", ("h", "su", None, "x")),
        ("Oct 11 22:14:15 UTC 2026 h su: x", ("h", "su", None, "x")),
        ("Oct 11 22:14:15 UTC 2026  h su: x", ("h", "su", None, "x")),
        ("2026-10-11 22:14:15 1234 [Note] x", ("1234", None, None, "[Note] x")),
    ],
)
def test_rfc3164(line: str, properties: tuple[str | None, ...]) -> None:
    """Host, tag, process id and message, each where it is there; with a PRI and without."""
    names = ("hostname", "app", "procid", "message")
    wanted = {name: value for name, value in zip(names, properties, strict=True) if value is not None}
    wanted["syslog_timestamp"] = "2026-10-11T22:14:15Z" if "UTC" in line else OCT
    assert one(line) == wanted
    for pri in ("<38>", "<38> "):
        assert one(pri + line) == {**wanted, "facility": "auth", "severity": "info"}


@pytest.mark.parametrize(
    ("time_text", "stamp", "utc"),
    [
        ("Oct  1 22:14:15", "2026-10-01T22:14:15+02:00", None),
        ("Oct 1 22:14:15", "2026-10-01T22:14:15+02:00", None),
        ("Oct 01 22:14:15", "2026-10-01T22:14:15+02:00", None),
        ("Oct 11 22:14:15.123", "2026-10-11T22:14:15.123+02:00", "2026-10-11T20:14:15.123Z"),
        ("Oct 11 22:14:15,123", "2026-10-11T22:14:15.123+02:00", "2026-10-11T20:14:15.123Z"),
        ("Oct 11 22:14:15.123456789", "2026-10-11T22:14:15.123456+02:00", "2026-10-11T20:14:15.123456Z"),
        ("Oct 11 22:14:15 EST", "2026-10-11T22:14:15-05:00", None),
        ("Oct 11 22:14:15.5 CEST", "2026-10-11T22:14:15.5+02:00", "2026-10-11T20:14:15.5Z"),
        ("Oct 11 22:14:15 +0100", "2026-10-11T22:14:15+01:00", None),
        ("Oct 11 22:14:15 +01:00", "2026-10-11T22:14:15+01:00", None),
        ("Oct 11 22:14:15Z", "2026-10-11T22:14:15Z", None),
        ("Oct 11 22:14:15.5 JST", "2026-10-11T22:14:15.5+09:00", "2026-10-11T13:14:15.5Z"),
        ("Oct 11 22:14:15 IST", "2026-10-11T22:14:15+05:30", None),
        ("Oct 11 22:14:15 NZDT 2025", "2025-10-11T22:14:15+13:00", None),
        ("Oct 11 22:14:15.5 -05", "2026-10-11T22:14:15.5-05:00", "2026-10-12T03:14:15.5Z"),
        ("Oct 11 22:14:15+14", "2026-10-11T22:14:15+14:00", None),
        ("2026-10-11 22:14:15.5+02", "2026-10-11T22:14:15.5+02:00", "2026-10-11T20:14:15.5Z"),
        ("Oct 11 22:14:15 UTC+1", "2026-10-11T22:14:15+01:00", None),
        ("Oct 11 22:14:15 GMT+2", "2026-10-11T22:14:15+02:00", None),
        ("Oct 11 22:14:15 UTC+02:00", "2026-10-11T22:14:15+02:00", None),
        ("Oct 11 22:14:15.5 UTC-5", "2026-10-11T22:14:15.5-05:00", "2026-10-12T03:14:15.5Z"),
        ("Oct 11 22:14:15 UTC-0330", "2026-10-11T22:14:15-03:30", None),
        ("Oct 11 22:14:15 GMT-03:30 2026", "2026-10-11T22:14:15-03:30", None),
        ("2016 Mar  1 18:46:11", "2016-03-01T18:46:11+01:00", None),
        ("Mar  1 2016 18:46:11", "2016-03-01T18:46:11+01:00", None),
        ("Mar  1 18:46:11 2016", "2016-03-01T18:46:11+01:00", None),
        ("Mar  1 18:46:11 2016 UTC", "2016-03-01T18:46:11Z", None),
        ("Aug 24 05:34:00 CST 1987", "1987-08-24T05:34:00-06:00", None),
        ("Aug 24 05:34:00.5 +0100 1987", "1987-08-24T05:34:00.5+01:00", "1987-08-24T04:34:00.5Z"),
        ("2013-08-28T08:12:32.123Z", "2013-08-28T08:12:32.123Z", "2013-08-28T08:12:32.123Z"),
        (
            "2013-08-28T08:12:32.123456+02:00",
            "2013-08-28T08:12:32.123456+02:00",
            "2013-08-28T06:12:32.123456Z",
        ),
        ("2013-08-28T08:12:32+0530", "2013-08-28T08:12:32+05:30", None),
        ("2013-08-28T08:12:32-00:00", "2013-08-28T08:12:32Z", None),
        ("2013-08-28T08:12:32", "2013-08-28T08:12:32+02:00", None),
        ("2013-08-28 08:12:32,5", "2013-08-28T08:12:32.5+02:00", "2013-08-28T06:12:32.5Z"),
        ("2016-12-31T23:59:60.5Z", "2016-12-31T23:59:59.5Z", "2016-12-31T23:59:59.5Z"),
        ("1969-12-31T23:59:59.5Z", "1969-12-31T23:59:59.5Z", None),
        ("0001-01-01T00:00:00.5+14:00", "0001-01-01T00:00:00.5+14:00", None),
        ("9999-12-31T23:59:59.5-12:00", "9999-12-31T23:59:59.5-12:00", None),
    ],
)
def test_times(time_text: str, stamp: str, utc: str | None) -> None:
    """A line's time keeps its zone and its digits; one finer than a second is the event's own."""
    for pri in ("<13>", ""):
        [envelope] = envelopes_of(f"{pri}{time_text} h app: x".encode())
        properties = json.loads(bytes(envelope.properties))
        assert (properties["syslog_timestamp"], envelope.timestamp) == (stamp, utc)
        assert (properties["hostname"], properties["app"], properties["message"]) == ("h", "app", "x")


# One place for each zone word but those for UTC, by the tz database.
PLACES = {
    "Europe/Lisbon": "WET WEST", "Europe/London": "GMT BST", "Europe/Berlin": "CET CEST",
    "Europe/Helsinki": "EET EEST", "Europe/Moscow": "MSK", "Asia/Jerusalem": "IDT", "Africa/Lagos": "WAT",
    "Africa/Maputo": "CAT", "Africa/Johannesburg": "SAST", "Africa/Nairobi": "EAT", "Asia/Karachi": "PKT",
    "Asia/Kolkata": "IST", "Asia/Jakarta": "WIB", "Asia/Makassar": "WITA", "Asia/Jayapura": "WIT",
    "Asia/Hong_Kong": "HKT", "Asia/Tokyo": "JST", "Asia/Seoul": "KST", "Australia/Perth": "AWST",
    "Australia/Adelaide": "ACST ACDT", "Australia/Sydney": "AEST AEDT", "Pacific/Auckland": "NZST NZDT",
    "America/New_York": "EST EDT", "America/Chicago": "CST CDT", "America/Denver": "MST MDT",
    "America/Los_Angeles": "PST PDT", "America/Anchorage": "AKST AKDT", "America/Adak": "HST HDT",
}  # fmt: skip
# Places that the tz database tells by numbers now, and a name that some of its versions have no place for.
OTHERS = {
    "SGT": "Asia/Singapore",
    "ART": "America/Argentina/Buenos_Aires",
    "BRT": "America/Sao_Paulo",
    "MET": "Europe/Berlin",
    "MEST": "Europe/Berlin",
}


def test_zone_words() -> None:
    """Every word is read as the tz database has it, behind the time of RFC 3164."""
    read = {}
    for word in syslog_time.ZONES:
        properties = one(f"<13>Jul 24 17:59:59.500 {word} h a: tz")
        assert (properties["hostname"], properties["app"], properties["message"]) == ("h", "a", "tz")
        read[word] = datetime.fromisoformat(properties["syslog_timestamp"]).utcoffset()
    zero = timedelta()
    wanted: dict[str, timedelta | None] = {"Z": zero, "UTC": zero}
    for place, words in PLACES.items():
        for month in (1, 7):
            moment = datetime(2026, month, 15, tzinfo=ZoneInfo(place))
            if moment.tzname() in words.split():
                wanted[str(moment.tzname())] = moment.utcoffset()
    for word, place in OTHERS.items():
        month = 7 if word == "MEST" else 1
        wanted[word] = datetime(2026, month, 15, tzinfo=ZoneInfo(place)).utcoffset()
    assert read == wanted


@pytest.mark.parametrize("word", ["XYZ", "AST", "UTC+15", "UTC-5x", "UTC+", "-15", "+5", "CATS", "JSTX"])
def test_what_no_table_knows_is_no_zone(word: str) -> None:
    """It stands where the host's name does, and is taken for one."""
    properties = one(f"<13>Oct 11 22:14:15.500 {word} h a: tz")
    assert (properties["hostname"], properties["message"]) == (word, "h a: tz")
    assert properties["syslog_timestamp"] == "2026-10-11T22:14:15.500+02:00"


@pytest.mark.parametrize(
    ("time_text", "received", "stamp"),
    [
        ("Dec 31 23:59:59", "2027-01-01T00:00:01+01:00", "2026-12-31T23:59:59+01:00"),
        ("Jan  1 00:00:01", "2026-12-31T23:59:59+01:00", "2027-01-01T00:00:01+01:00"),
        ("Jan  1 00:00:01", "2027-01-01T00:00:02+01:00", "2027-01-01T00:00:01+01:00"),
        ("Mar  1 00:00:01", "2026-11-01T00:00:00+01:00", "2026-03-01T00:00:01+01:00"),
        ("Nov 25 12:00:00", "2026-11-24T23:00:00+01:00", "2026-11-25T12:00:00+01:00"),
        ("Nov 27 12:00:00", "2026-11-24T23:00:00+01:00", "2025-11-27T12:00:00+01:00"),
        # Past midnight in UTC+14, and still the day before the last in UTC-12, where it is received.
        ("Jan  1 00:00:01 +14:00", "2026-12-30T22:00:01-12:00", "2027-01-01T00:00:01+14:00"),
        ("Feb 29 12:00:00", "2028-03-01T00:00:00+01:00", "2028-02-29T12:00:00+01:00"),
        ("Feb 29 12:00:00", "2028-02-28T23:00:00+01:00", "2028-02-29T12:00:00+01:00"),
        ("Feb 29 12:00:00", "2028-02-27T20:00:00+01:00", "2024-02-29T12:00:00+01:00"),
        ("Feb 29 12:00:00", "2027-12-01T00:00:00+01:00", "2024-02-29T12:00:00+01:00"),
        ("Feb 29 12:00:00", "2025-01-01T00:00:00+01:00", "2024-02-29T12:00:00+01:00"),
        ("Feb 29 12:00:00", "2104-02-01T00:00:00+01:00", "2096-02-29T12:00:00+01:00"),
        # Clocks go back at 3:00 on 25 October 2026: 2:30 is there twice.
        ("Oct 25 02:30:00", "2026-10-25T00:30:01+00:00", "2026-10-25T02:30:00+02:00"),
        ("Oct 25 02:30:00", "2026-10-25T01:30:01+00:00", "2026-10-25T02:30:00+01:00"),
        ("2026-10-25 02:30:00", "2026-10-25T01:30:01+00:00", "2026-10-25T02:30:00+01:00"),
        ("Oct 25 02:50:00", "2026-10-25T01:25:00+00:00", "2026-10-25T02:50:00+02:00"),
        # A clock may be five minutes ahead, and no more.
        ("Oct 25 02:30:00", "2026-10-25T01:25:00+00:00", "2026-10-25T02:30:00+01:00"),
        ("Oct 25 02:30:01", "2026-10-25T01:25:00+00:00", "2026-10-25T02:30:01+02:00"),
        ("Oct 25 02:30:00", "2026-10-24T23:00:00+00:00", "2026-10-25T02:30:00+02:00"),
        ("Oct 25 02:30:00", "2026-12-01T00:00:00+00:00", "2026-10-25T02:30:00+01:00"),
        # They go forward at 2:00 on 29 March 2026: 2:30 is not there.
        ("Mar 29 01:59:59", "2026-03-29T01:00:00+00:00", "2026-03-29T01:59:59+01:00"),
        ("Mar 29 02:30:00", "2026-03-29T01:30:00+00:00", "2026-03-29T02:30:00+01:00"),
        ("Mar 29 03:00:00", "2026-03-29T01:00:00+00:00", "2026-03-29T03:00:00+02:00"),
    ],
)
def test_the_time_of_receipt_decides(time_text: str, received: str, stamp: str) -> None:
    """Never a year or an hour off: at New Year, on leap days, and when the clocks are changed."""
    line = f"<13>{time_text} h app: x"
    assert one(line, at=datetime.fromisoformat(received))["syslog_timestamp"] == stamp


ZONES = [ZoneInfo(name) for name in ("Europe/Berlin", "America/New_York", "Australia/Sydney", "UTC")]
# Around the ends of summer time in the first three, New Year and a leap day, and at any time.
WRITTEN = st.builds(
    lambda moment, minutes: moment + timedelta(minutes=minutes),
    st.sampled_from(
        [
            datetime(2026, 10, 25, 1, tzinfo=UTC),
            datetime(2026, 11, 1, 6, tzinfo=UTC),
            datetime(2026, 4, 4, 16, tzinfo=UTC),
            datetime(2027, 1, 1, tzinfo=UTC),
            datetime(2028, 2, 29, tzinfo=UTC),
        ]
    ),
    st.one_of(st.floats(-90, 90), st.floats(-500_000, 500_000)),
)


def read_back(written: datetime, zone: ZoneInfo, late: timedelta) -> datetime:
    """When a line without year and zone says that it was written; to the second."""
    line = written.astimezone(zone).strftime("<13>%b %e %H:%M:%S h app: x")
    return datetime.fromisoformat(one(line, at=written + late, by=decoder(zone=zone))["syslog_timestamp"])


@given(WRITTEN, st.sampled_from(ZONES), st.floats(-4, 54))
@settings(deadline=None)
def test_a_line_that_comes_soon_keeps_its_instant(written: datetime, zone: ZoneInfo, minutes: float) -> None:
    """Within an hour, less what a clock may be ahead, nothing is ambiguous."""
    written = written.replace(microsecond=0)
    assert read_back(written, zone, timedelta(minutes=minutes)) == written


@given(WRITTEN, st.sampled_from(ZONES), st.floats(-24, 24 * 360))
@settings(deadline=None)
def test_a_line_that_comes_late_keeps_its_year(written: datetime, zone: ZoneInfo, hours: float) -> None:
    """Up to nearly a year, or a day early, it says of what year it is."""
    written = written.replace(microsecond=0).astimezone(zone)
    found = read_back(written, zone, timedelta(hours=hours))
    assert found.replace(tzinfo=None) == written.replace(tzinfo=None)


def test_each_read_has_its_own_time_of_receipt() -> None:
    """Reads of different years, decoded together, are not confused."""
    times = [datetime(year, 1, 1, 12, tzinfo=UTC) for year in (2026, 2027, 2026)]
    reads = [Read(b"<13>Jan  1 12:00:00 h app: x\n", Instant(wall(at), 1, "boot")) for at in times]
    decoded = decoder().decode(reads, Flaws())
    years = [json.loads(bytes(found.properties))["syslog_timestamp"][:4] for found in decoded.envelopes]
    assert years == ["2026", "2027", "2026"]
    assert decoded.lines == [1, 1, 1]


def test_more_seconds_than_are_remembered() -> None:
    """A long backlog is read as well as a short one."""
    lines = [
        f"<13>1 2020-01-01T{n // 3600:02}:{n // 60 % 60:02}:{n % 60:02}Z h a - - - x" for n in range(9000)
    ]
    stamps = [
        json.loads(bytes(found.properties))["syslog_timestamp"]
        for found in envelopes_of(*map(str.encode, lines))
    ]
    assert stamps == [line[6:26] for line in lines]


CONFIG = "Configured from console by vty2 (10.34.195.36)"
SYS = {"app": "SYS", "msgid": "SYS-5-CONFIG_I", "message": CONFIG}
MAR = {"syslog_timestamp": "2026-03-01T18:46:11+01:00"}
UTC_MAR = {"syslog_timestamp": "2026-03-01T18:46:11Z"}
PLUS_MAR = {"syslog_timestamp": "2026-03-01T19:46:11+01:00"}
AEST_MAR = {"syslog_timestamp": "2026-03-01T18:46:11+10:00"}
R1_29 = {"hostname": "r1", "sequence": "29"}


@pytest.mark.parametrize(
    ("line", "properties"),
    [
        ("29: Mar  1 18:46:11: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, **MAR, "sequence": "29"}),
        ("000029: *Mar  1 18:46:11: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, **MAR, "sequence": "000029"}),
        ("29: .Mar  1 18:46:11 UTC: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, **UTC_MAR, "sequence": "29"}),
        ("29: Mar  1 18:46:11 AEST: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, **AEST_MAR, "sequence": "29"}),
        ("*Mar  1 18:46:11: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, **MAR}),
        ("Mar  1 18:46:11: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, **MAR}),
        (
            "r1: 29: Mar  1 18:46:11: %SYS-5-CONFIG_I: " + CONFIG,
            {**SYS, **MAR, "sequence": "29", "hostname": "r1"},
        ),
        (
            "29: 10.0.0.1: Mar  1 18:46:11: %SYS-5-CONFIG_I: " + CONFIG,
            {**SYS, **MAR, "sequence": "29", "hostname": "10.0.0.1"},
        ),
        (": 2026 Mar  1 18:46:11 UTC: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, **UTC_MAR}),
        ("29: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, "sequence": "29"}),
        ("29: 00:01:27: %SYS-5-CONFIG_I: up", {**SYS, "sequence": "29", "message": "00:01:27: up"}),
        ("29: 1w2d: %SYS-5-CONFIG_I: up", {**SYS, "sequence": "29", "message": "1w2d: up"}),
        (
            "Mar  1 18:46:11 r1 29: %SYS-5-CONFIG_I: " + CONFIG,
            {**SYS, **MAR, "sequence": "29", "hostname": "r1"},
        ),
        (
            "RP/0/RSP0/CPU0:Mar  1 18:46:11.5 UTC: bgp[1052]: %ROUTING-BGP-5-ADJCHANGE : up",
            {
                "hostname": "RP/0/RSP0/CPU0",
                "app": "bgp",
                "procid": "1052",
                "msgid": "ROUTING-BGP-5-ADJCHANGE",
                "message": "up",
                "syslog_timestamp": "2026-03-01T18:46:11.5Z",
            },
        ),
        (
            "Oct 10 2018 12:34:56 localhost CiscoASA[999]: %ASA-6-305011: Built",
            {
                "hostname": "localhost",
                "app": "CiscoASA",
                "procid": "999",
                "msgid": "ASA-6-305011",
                "message": "Built",
                "syslog_timestamp": "2018-10-10T12:34:56+02:00",
            },
        ),
        (
            "Oct 10 2018 12:34:56 fw : %ASA-6-305011: Built",
            {
                "hostname": "fw",
                "app": "ASA",
                "msgid": "ASA-6-305011",
                "message": "Built",
                "syslog_timestamp": "2018-10-10T12:34:56+02:00",
            },
        ),
        ("%ASA-6-305011: Built", {"app": "ASA", "msgid": "ASA-6-305011", "message": "Built"}),
        (" %SYS-5-CONFIG_I: " + CONFIG, SYS),
        (": 29: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, "sequence": "29"}),
        ("29: r1: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, "sequence": "29", "hostname": "r1"}),
        ("r1: 29: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, "sequence": "29", "hostname": "r1"}),
        ("r1: %SYS-5-CONFIG_I: " + CONFIG, {**SYS, "hostname": "r1"}),
        ("29: *Mar  1 18:46:11: r1 %SYS-5-CONFIG_I: x", {**SYS, **R1_29, **MAR, "message": "x"}),
        ("29: *Mar  1 18:46:11: r1: %SYS-5-CONFIG_I: x", {**SYS, **R1_29, **MAR, "message": "x"}),
        ("29: r1: Mar  1 18:46:11 UTC: NTP: (x) %y", {**R1_29, **UTC_MAR, "message": "NTP: (x) %y"}),
        ("29: r1: Mar  1 18:46:11 AEST: a[1]: x", {**R1_29, **AEST_MAR, "message": "a[1]: x"}),
        ("29: r1: Mar  1 18:46:11 XYZT: a[1]: x", {**R1_29, **MAR, "message": "a[1]: x"}),
        (
            "Mar  1 18:46:11 AEST r1: %SYS-5-CONFIG_I: x",
            {**SYS, **AEST_MAR, "hostname": "r1", "message": "x"},
        ),
        ("Mar  1 18:46:11 aest: %SYS-5-CONFIG_I: x", {**SYS, **AEST_MAR, "message": "x"}),
        (
            "Mar  1 18:46:11 AEST: r1 %SYS-5-CONFIG_I: x",
            {**SYS, **AEST_MAR, "hostname": "r1", "message": "x"},
        ),
        (
            "Mar  1 19:46:11 UTC+1 r1: %SYS-5-CONFIG_I: x",
            {**SYS, **PLUS_MAR, "hostname": "r1", "message": "x"},
        ),
        ("29: r1: Mar  1 19:46:11 GMT+1: a: x", {**R1_29, **PLUS_MAR, "message": "a: x"}),
        ("29: r1: Mar  1 19:46:11 +01: a: x", {**R1_29, **PLUS_MAR, "message": "a: x"}),
        (": r1: Mar  1 18:46:11 UTC: x", {**UTC_MAR, "hostname": "r1", "message": "x"}),
        ("29: Mar  1 18:46:11: a: x", {**MAR, "sequence": "29", "message": "a: x"}),
        ("r1: Mar  1 18:46:11: x", {"app": "r1", "message": "Mar  1 18:46:11: x"}),
        ("29: Mar  1 18:46:11 METDST: %SYS-5-CONFIG_I: x", {**SYS, **MAR, "sequence": "29", "message": "x"}),
        ("Mar  1 18:46:11 utc: %SYS-5-CONFIG_I: x", {**SYS, **UTC_MAR, "message": "x"}),
        ("Mar  1 19:46:11 UTC+1: %SYS-5-CONFIG_I: x", {**SYS, **PLUS_MAR, "message": "x"}),
        ("Mar  1 19:46:11 GMT+0100: %SYS-5-CONFIG_I: x", {**SYS, **PLUS_MAR, "message": "x"}),
        ("Mar  1 19:46:11 GMT+01:00: %SYS-5-CONFIG_I: x", {**SYS, **PLUS_MAR, "message": "x"}),
        ("Mar  1 18:46:11 r1: %SYS-5-CONFIG_I: x", {**SYS, **MAR, "hostname": "r1", "message": "x"}),
        ("%A-B_1-C-7-X-Y: x", {"message": "%A-B_1-C-7-X-Y: x", "unparsed": True}),
        ("%A-B_1-C-7-X: x", {"app": "A-B_1-C", "msgid": "A-B_1-C-7-X", "message": "x"}),
        ("%A-8-X: x", {"message": "%A-8-X: x", "unparsed": True}),
    ],
)
def test_cisco(line: str, properties: dict[str, str]) -> None:
    """Sequence numbers, clocks that are not set, zones, names and mnemonics where Cisco puts them."""
    assert one(f"<189>{line}") == {**properties, "facility": "local7", "severity": "notice"}


@pytest.mark.parametrize(
    ("front", "timestamp"),
    [
        ("", "2026-10-15T11:59:58.250Z"),
        (".", "2026-10-15T11:59:58.250Z"),
        ("*", None),
        ("29: ", "2026-10-15T11:59:58.250Z"),
        ("29: .", "2026-10-15T11:59:58.250Z"),
        ("29: *", None),
        ("r1: 29: *", None),
        ("29: r1: *", None),
        ("r1: 29: .", "2026-10-15T11:59:58.250Z"),
    ],
)
def test_a_clock_that_was_never_set(front: str, timestamp: str | None) -> None:
    """Cisco's star: its time is kept, the event has that of the receipt; a dot only says that NTP is away."""
    line = f"<189>{front}Oct 15 11:59:58.250 UTC: %SYS-5-CONFIG_I: x"
    [envelope] = envelopes_of(line.encode())
    assert envelope.timestamp == timestamp
    assert json.loads(bytes(envelope.properties))["syslog_timestamp"] == "2026-10-15T11:59:58.250Z"


def test_esxi() -> None:
    """A time of RFC 3339 in a line of RFC 3164."""
    assert one("<166>2013-08-28T08:12:32.123Z esx1 Hostd: [FFE3 verbose 'x'] text") == told(
        message="[FFE3 verbose 'x'] text",
        facility="local4",
        severity="info",
        hostname="esx1",
        app="Hostd",
        syslog_timestamp="2013-08-28T08:12:32.123Z",
    )


# --- what is not syslog ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "properties"),
    [
        ("<13>su: 'su root' failed", {"app": "su", "message": "'su root' failed"}),
        ("<13>su[12]: failed", {"app": "su", "procid": "12", "message": "failed"}),
        ("<13>su: Oct 11 22:14:15 it was", {"app": "su", "message": "Oct 11 22:14:15 it was"}),
        ("<13>su[12] failed", {"message": "su[12] failed", "unparsed": True}),
        ("<13>just a text", {"message": "just a text", "unparsed": True}),
        ("<13>", {"message": "", "unparsed": True}),
        ("<13>Feb 30 22:14:15 h app: x", {"message": "Feb 30 22:14:15 h app: x", "unparsed": True}),
        ("<13>Oct 11 22:14:15foo", {"message": "Oct 11 22:14:15foo", "unparsed": True}),
        ("<13>  su[12]: failed", {"app": "su", "procid": "12", "message": "failed"}),
        ("<13>  just a text", {"message": "  just a text", "unparsed": True}),
        ("<13>2016 Mar  1 18:46:11 2017 h x", {"message": "2016 Mar  1 18:46:11 2017 h x", "unparsed": True}),
    ],
)
def test_a_priority_but_no_time(line: str, properties: dict[str, Any]) -> None:
    """A tag may still be there; anything else is told as it came."""
    assert one(line) == {"facility": "user", "severity": "notice", **properties}


@pytest.mark.parametrize(
    "line",
    [
        "<>a",
        "<192>Oct 11 22:14:15 h app: x",
        "<999>x",
        "<abc>x",
        "<007>x",
        "<00>x",
        "<-1>x",
        "<1",
        "<13",
        "<13x",
        "<\u0661>x",
        "<13 >1 - - - - - -",
        " <13>Oct 11 22:14:15 h app: x",
        "kernel: a",
        "plain text ",
        "Foo 11 22:14:15 h app: x",
        "29: Mar  1 18:46:11: %SYS-5-CONFIG_I: x",
        "1 2003-10-11T22:14:15Z h app - - - m",
    ],
)
def test_no_syslog(line: str) -> None:
    """A line that is no syslog is the message, whole."""
    assert one(line) == told(message=line, unparsed=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"<13>Oct 11 22:14:15 h app: caf\xc3\xa9 \xf0\x9f\x98\x80", "café \U0001f600"),
        (b"<13>Oct 11 22:14:15 h app: caf\xe9", "café"),
        (b"<13>Oct 11 22:14:15 h app: \x80\x85\xff\xa0", "\x80\x85\xff\xa0"),
        (b"<13>Oct 11 22:14:15 h app: a\0", "a"),
        (b"<13>Oct 11 22:14:15 h app: a\r", "a"),
        (b"<13>Oct 11 22:14:15 h app: a\0\0", "a"),
        (b"<13>Oct 11 22:14:15 h app: a\0  at b\r\0  at c\0", "a\n  at b\r\n  at c"),
        (b"<13>Oct 11 22:14:15 h app: \0 a", "\n a"),
        (b"<13>Oct 11 22:14:15 h app: a\r\tb\x1b[0m ", "a\r\tb\x1b[0m "),
        (b"<13>Oct 11 22:14:15 h app: \xef\xbb\xbfa", "a"),
        (b"<13>1 - h app - - - a\0b", "a\nb"),
        (b"<13>Oct 11 22:14:15 h app: " + b"x" * 65536, "x" * 65536),
    ],
)
def test_text(line: bytes, message: str) -> None:
    """UTF-8, Latin-1 where it is not, line breaks within; alone and beside others."""
    properties = one(line)
    assert properties.pop("message") == message
    assert (properties["hostname"], properties["app"]) == ("h", "app")
    neighbour = b"<13>Oct 11 22:14:15 h app: \xc3\xbc"
    messages = [json.loads(bytes(found.properties))["message"] for found in envelopes_of(neighbour, line)]
    assert messages == ["ü", message]


def test_empty_lines_are_none() -> None:
    """What holds but white space and line ends is no event, and is not counted."""
    read = Read(b"\n \t\n\r\n\0\0\n<13>a\n\n<13>b", Instant(wall(NOW), 1, "boot"))
    decoded = decoder().decode([read, Read(b"", read.at), Read(b"\n", read.at)], Flaws())
    assert (decoded.lines, len(decoded.envelopes), decoded.places) == ([2, 0, 0], 2, None)
    assert decoder().decode([], Flaws()) == Lines([], None, [], [])


def test_a_line_that_is_too_large_is_refused_alone() -> None:
    """Its place and its beginning are told; the line end does not count."""
    small = decoder(max_event=30)
    long = b"<13>Oct 11 22:14:15 h app: " + b"x" * 4
    reads = [
        Read(b"<13>a\n\n" + long + b"\n<13>b\n", Instant(wall(NOW), 1, "boot")),
        Read(long + b"\n" + long[:-1] + b"\r\n", Instant(wall(NOW), 1, "boot")),
    ]
    decoded = small.decode(reads, Flaws())
    assert decoded.lines == [3, 2]
    assert decoded.places == [(0, 0), (0, 2), (1, 1)]
    assert [tuple(reject)[:4] for reject in decoded.rejects] == [
        (0, 1, "too_large", long.decode()),
        (1, 0, "too_large", long.decode()),
    ]
    assert len(decoded.envelopes) == 3


# --- names and ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "distinct_id", "line", "names"),
    [
        ("syslog", "{hostname}", b"<13>Oct 11 22:14:15 h app: x", ("syslog", "h")),
        ("syslog", "{hostname}", b"<13>app: x", ("syslog", "here")),
        ("{app} {severity}", "{hostname}/{app}", b"<13>Oct 11 22:14:15 h app: x", ("app notice", "h/app")),
        ("{app}", "{app}", b"no syslog", ("syslog", "here")),
        ("e", "fixed", b"<13>Oct 11 22:14:15 h app: x", ("e", "fixed")),
        ("e", "{app}{hostname}", b"<13>1 - {app} {severity} - - -", ("e", "{severity}{app}")),
        ("{other}", "{}", b"x", ("{other}", "{}")),
    ],
)
def test_templates(event: str, distinct_id: str, line: bytes, names: tuple[str, str]) -> None:
    """A source may name its events and their persons after what the line says."""
    [envelope] = envelopes_of(line, by=decoder(event=event, distinct_id=distinct_id))
    assert (envelope.event, envelope.distinct_id) == names


def test_long_names_are_cut_and_counted() -> None:
    """At 200 characters, each event once."""
    flaws = Flaws()
    line = b"<13>1 - " + b"h" * 250 + b" " + b"a" * 250 + b" - - - x\n"
    read = Read(line * 2 + b"<13>1 - h a - - - x\n", Instant(wall(NOW), 1, "boot"))
    decoded = decoder(event="{app}").decode([read], flaws)
    assert [(found.event, found.distinct_id) for found in decoded.envelopes] == [
        ("a" * 200, "h" * 200),
        ("a" * 200, "h" * 200),
        ("a", "h"),
    ]
    assert flaws.truncated == 2


# --- events within ---------------------------------------------------------------------------------

EVENT = '{"event":"signup","distinct_id":"user-42","properties":{"plan":"pro"}}'


@pytest.mark.parametrize(
    "front",
    [
        "",
        "@cee:",
        "@cee: ",
        "<13>",
        "<13>@cee: ",
        "<13>Oct 11 22:14:15 h app[1]: ",
        "<13>Oct 11 22:14:15 h app: @cee:",
        "<13>Oct 11 22:14:15 h @cee: ",
        "<13>Oct 11 22:14:15 @cee: ",
        "<13>Oct 11 22:14:15 ",
        "<13>1 2026-10-11T22:14:15.5Z h app - - - ",
        '<13>1 2026-10-11T22:14:15.5Z h app - - [a x="1"] @cee:  ',
    ],
)
def test_a_message_that_is_an_event_is_that_event(front: str) -> None:
    """Nothing of the line's head is added to it, but a distinct id that it lacks."""
    [envelope] = envelopes_of((front + EVENT).encode())
    assert (envelope.event, envelope.distinct_id, envelope.timestamp) == ("signup", "user-42", None)
    assert json.loads(bytes(envelope.properties)) == {"plan": "pro"}
    who = "h" if " h " in front else "here"
    for without in ('{"event":"a"}', '{"event":"a","distinct_id":""}', '{\0"event":\0"a"}\0'):
        [envelope] = envelopes_of((front + without).encode())
        assert (envelope.event, envelope.distinct_id) == ("a", who)


@pytest.mark.parametrize(
    "message",
    [
        '{"a":1}',
        '@cee: {"a":1}',
        '{"event":5}',
        '{"event":""}',
        '{"event":"a"',
        '{"event":"a"} x',
        '{"a":{"event":"a"}}',
        '{"event":"a","properties":{"x":NaN}}',
        '{"event":"a","uuid":"bad"}',
        '{"event":"a","uuid":5}',
        '{"event":"a","uuid":"{0190a6a6-4b3e-7c3f-9d2e-1f0a3b5c7d9-}"}',
        '{"event":"' + "a" * 300 + '","uuid":"bad"}',
        '{"event":"a","distinct_id":{}}',
        '{"event":"a","distinct_id":true}',
        '{"event":"a","properties":null}',
        '{"event":"a","properties":[]}',
        '{"event":"a","properties":"x"}',
        '{"event":"a","properties":{"\\ud800":1}}',
        '{"event":"a","properties":{"$cookieless_mode":1}}',
        '{"event":"a","properties":{"$cookieless\\u005fmode":1}}',
        '{"event":"a","$set":5}',
        '{"event":"a","$set_once":[]}',
        '{"event":"a","$groups":"x"}',
        '{"event":"a","x":' + "[" * 200 + "]" * 200 + "}",
        '["event"]',
        "@cee: x",
        '"event"',
    ],
)
def test_other_json_stays_a_message(message: str) -> None:
    """An object without an event, or one that the door would refuse, is told as text."""
    assert one(f"<13>Oct 11 22:14:15 h app: {message}")["message"] == message
    [one_alone, other] = envelopes_of(f"<13>Oct 11 22:14:15 h app: {message}".encode(), EVENT.encode())
    assert (one_alone.event, other.event) == ("syslog", "signup")


# Fields of JSON messages as their programs may write them, right and wrong.
FIELDS = {
    "distinct_id": ['"user-42"', "42", "4.5", "null", '""', "true", "[]", '"' + "d" * 300 + '"'],
    "uuid": [
        *('""', "null", "5", '"bad"', '"0190a6a6-4b3e-7c3f-9d2e-1f0a3b5c7d9e"'),
        *('"{0190a6a6-4b3e-7c3f-9d2e-1f0a3b5c7d9e}"', '"{0190a6a6-4b3e-7c3f-9d2e-1f0a3b5c7d9-}"'),
    ],
    "timestamp": ['"2026-10-11T22:14:15Z"', '"yesterday"', "1795000000", "{}", "null"],
    "properties": [
        *("{}", ' { "a": 1 } ', "null", "[]", "5", '{"a":"x\\ny"}', r'{"\ud800":1}', r'{"a":"\ud800"}'),
        *('{"$cookieless_mode":true}', '{"$cookieless_mode":1}', r'{"$cookieless\u005fmode":1}'),
        *('{"$set":{"a":1}}', '{"$set":5}', r'{"$set":{"\ud800":1}}', '{"a":1e999}', '{"$agent_uid":1}'),
    ],
    "$set": ['{"a":1}', "null", "5", r'{"\ud800":1}'],
    "$set_once": ["{}", "[]"],
    "$groups": ['{"a":"b"}', '"x"'],
}
MESSAGES = st.fixed_dictionaries(
    {"event": st.sampled_from(['"signup"', '"signup"', '""', '"' + "e" * 300 + '"', r'"\u0073ignup"', "5"])},
    optional={name: st.sampled_from(values) for name, values in FIELDS.items()},
).map(lambda fields: "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}")
RULES = Rules(
    source="s",
    project="p",
    properties={"site": "berlin"},
    made={"$process_person_profile": False},
    distinct_id="h",
    max_event=10_000,
    max_batch_events=1000,
    max_batch_size=2**20,
)


def through(door: Door, lines: Sequence[str]) -> tuple[list[dict[str, Any]], list[int], int]:
    """What comes of lines behind the door: the events, the lines that are refused, and the names cut."""
    decoded = door.vouch([Read("\n".join(lines).encode() + b"\n", Instant(wall(NOW), 1, "boot"))], 1)
    events = [
        event
        for chunk in decoded.chunks
        for event in json.loads(b"[" + inflate(chunk.packed, chunk.size, chunk.crc) + b"]")
    ]
    return events, [reject.line for reject in decoded.rejects], decoded.tally.truncated


@given(st.lists(MESSAGES, min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_no_json_message_is_refused(messages: list[str]) -> None:
    """It is the event that the door would make of it as JSON, or a text where the door would refuse it."""
    plain = Door(msgspec.structs.replace(RULES, made={}), Json(RULES.max_event))
    taken, refused, _ = through(plain, messages)
    lines = [f"<13>Oct 11 22:14:15 h app: {message}" for message in messages]
    events, lost, cut = through(Door(RULES, decoder()), lines)
    assert (len(events), lost) == (len(messages), [])
    assert cut == sum(LONGEST in {len(event["event"]), len(event["distinct_id"])} for event in events)
    wanted = iter(taken)
    for number, (event, message) in enumerate(zip(events, messages, strict=True)):
        if number in refused:
            assert (event["event"], event["distinct_id"]) == ("syslog", "h")
            assert event["properties"]["message"] == message
            assert event["properties"]["app"] == "app"
        else:
            alike = next(wanted)
            names = ("event", "distinct_id", "properties", "options")
            assert [event.get(name) for name in names] == [alike.get(name) for name in names]


# --- what holds for all ----------------------------------------------------------------------------

PARTS = st.sampled_from(
    [
        *(
            "<13>",
            "<191>",
            "<192>",
            "<",
            ">",
            "1 ",
            "- ",
            " ",
            ":",
            ": ",
            "[1]",
            "[",
            "]",
            "%",
            "@cee:",
            "\0",
            "\r",
        ),
        *(
            "Oct 11 22:14:15",
            "Feb 29 01:02:03",
            "Mar  1 2016 18:46:11",
            "2013-08-28T08:12:32.123Z",
            " UTC",
            " UTC:",
        ),
        *(
            "2013-08-28T08:12:32+02:00",
            "29: ",
            "*",
            " host ",
            " app[12]: x",
            " su: x",
            "%SYS-5-CONFIG_I: x",
            "::",
        ),
        *(
            "fe80::1 ",
            " 2018 ",
            '[a x="1"]',
            '[a x="\\"',
            '{"event":"a"}',
            '{"event":',
            "ü",
            "\ufeff",
            "-",
            "a b: c",
            "r1: ",
            " CST 1987 ",
            " JST ",
            " UTC-5 ",
            " GMT-0330",
            " -05",
            " UTC+1: ",
            " METDST: ",
            "Message forwarded from h: ",
        ),
    ]
)
LIKELY = st.lists(PARTS, max_size=8).map("".join)
LINES = st.one_of(
    LIKELY.map(str.encode), st.tuples(LIKELY, st.binary(max_size=8)).map(lambda p: p[0].encode() + p[1])
)


@given(st.lists(st.one_of(LINES, st.binary(max_size=60)), max_size=5))
@settings(max_examples=300, deadline=None)
def test_each_line_is_one_event(lines: list[bytes]) -> None:
    """Whatever its bytes, a line that is not empty is one event that the door takes, alone or not."""
    lines = [line.replace(b"\n", b" ") for line in lines]
    full = [line for line in lines if line.strip(b" \t\v\f\r\0")]
    by = decoder()
    together = envelopes_of(*lines, by=by)
    alone = [found for line in full for found in envelopes_of(line, by=by)]
    assert together == alone
    assert len(together) == len(full)
    for envelope in together:
        assert isinstance(json.loads(bytes(envelope.properties)), dict)
        assert envelope.event
        assert envelope.distinct_id
        flaws = Flaws()
        assert isinstance(complete(envelope, {}, {}, "", Stamp("u", "t"), flaws), dict)
        assert flaws == Flaws()


@given(st.tuples(st.sampled_from(["Oct 11 22:14:15", "2013-08-28T08:12:32.123Z", "Feb 30 22:14:15"]), LIKELY))
@settings(max_examples=400, deadline=None)
def test_the_common_pattern_reads_as_the_others_do(parts: tuple[str, str]) -> None:
    """What most lines look like is read by one pattern, and by the whole grammar the same."""
    text = " ".join(parts)
    times = Times(BERLIN)
    times.receive(wall(NOW))
    common = syslog_line._common(text, times)
    assert common is None or common == syslog_devices.read_bare(text, times)
    common = syslog_line._common(f"<14>{text}", times)
    assert common is None or common == syslog_devices.read(text, ("user", "info"), times)


HOSTILE = [
    b"<13>Oct 11 22:14:15 ",
    b"<13>1 2003-10-11T22:14:15Z h a - - ",
    b"<13>1 - - - - - [a ",
    b'<13>1 - - - - - [a x="',
    b"<13>1 2003-10-11T22:14:15.",
    b"<13>",
    b"<189>29: ",
    b"<189>29: r1: ",
    b"<189>29: r1: Oct 11 22:14:15: ",
    b"<189>Oct 11 22:14:15: ",
    b"<189>%",
    b"",
]
FILLING = [
    *(
        b"a",
        b" ",
        b":",
        b"[",
        b"]",
        b"a:",
        b"a ",
        b"a[",
        b"a-",
        b"0",
        b"0:",
        b"\\",
        b'\\"',
        b'"',
        b' x="1"',
        b"[a]",
    ),
    *(b"{", b"\r", b"\0", b"\xff", b'[a x="1"]', b"%A-", b"1w", b"@cee:", b'"] ', b"Oct 11 22:14:15 "),
]


@pytest.mark.parametrize(
    ("size", "fillings"), [(64 * 1024, FILLING), (900 * 1024, (b"a", b"a-", b'\\"', b"[a]"))]
)
def test_no_line_takes_long(size: int, fillings: Sequence[bytes]) -> None:
    """The worst that a line of any size can do is linear: a microsecond a byte would be far too much."""
    by = decoder()
    for head in HOSTILE:
        for filling in fillings:
            line = head + filling * (size // len(filling) - 30) + b"!"
            assert len(envelopes_of(line, by=by)) == 1
