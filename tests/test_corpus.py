"""The corpus of syslog lines: whole, without doubles, of one mind with the rules, and read so by the decoder.

`corpus/syslog.jsonl` has one object a line, grouped by dialect: `group`, `origin` (where the line is
public, or which device sends it), `line` (or `hex`, where its bytes are not UTF-8 or end in a NUL), `at`
(the time of receipt), `zone` (the source's time zone, UTC without it), `note` (the reading chosen where
there is another) and `expect` (the event: its name, distinct_id, timestamp or null for the time of receipt,
uuid if it has its own, and all its properties but the source's defaults). The receiving host is called
"here". A NUL inside a line is the line break that framing replaced.
"""

import json
import re
from collections import Counter
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from agent.decode.syslog import Syslog
from agent.envelope import Flaws
from agent.events import Instant, Read

Record = dict[str, Any]

CORPUS = Path(__file__).parent / "corpus" / "syslog.jsonl"
RECORDS: list[Record] = [json.loads(line) for line in CORPUS.read_text("utf-8").split("\n") if line]

# RFC 5424, tables 1 and 2, by the names of syslog.conf(5).
FACILITIES = [
    "kern",
    "user",
    "mail",
    "daemon",
    "auth",
    "syslog",
    "lpr",
    "news",
    "uucp",
    "cron",
    "authpriv",
    "ftp",
]
FACILITIES += ["ntp", "audit", "alert", "clock", *(f"local{number}" for number in range(8))]
SEVERITIES = ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"]

# What each group has at least, so that a dialect is not lost by an edit.
LEAST = {
    "rfc5424": 60,
    "cisco": 45,
    "rfc3164": 80,
    "no-pri": 60,
    "local": 15,
    "esxi": 15,
    "json": 15,
    "not-syslog": 15,
    "bytes": 5,
    "multi-line": 5,
    "clock": 15,
}
KEYS = {"group", "origin", "line", "hex", "at", "zone", "note", "expect"}
TEXTS = [
    "message",
    "facility",
    "severity",
    "hostname",
    "app",
    "procid",
    "msgid",
    "syslog_timestamp",
    "sequence",
]
# How Cisco marks the time of a clock that was never set.
NEVER_SET = re.compile(r"(?:^|[ >])\*[A-Z][a-z]{2} ")
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")


def raw(record: Record) -> bytes:
    """The line as framing hands it on."""
    return bytes.fromhex(record["hex"]) if "hex" in record else record["line"].encode()


def text(record: Record) -> str:
    """The line as it is read: UTF-8, or else every byte as Latin-1."""
    try:
        return raw(record).decode()
    except UnicodeDecodeError:
        return raw(record).decode("latin-1")


def priority(line: str) -> tuple[int | None, str]:
    """A valid priority, and what follows it."""
    found = re.match(r"<(0|[1-9]\d{0,2})>", line)
    if found is None or int(found[1]) > 191:
        return None, line
    return int(found[1]), line[found.end() :]


def own_events() -> list[Record]:
    """Records of lines that carry an event of their own."""
    return [record for record in RECORDS if record["expect"]["event"] != "syslog"]


def syslog_events() -> list[Record]:
    """Records of lines that are made an event by the mapping."""
    return [record for record in RECORDS if record["expect"]["event"] == "syslog"]


def test_it_is_as_large_and_as_mixed_as_promised() -> None:
    """There are 300 lines and more, and enough of each dialect, which stand together."""
    groups = Counter(record["group"] for record in RECORDS)
    assert len(RECORDS) >= 300
    assert set(groups) == set(LEAST)
    assert [group for group, least in LEAST.items() if groups[group] < least] == []
    order = [record["group"] for record in RECORDS]
    assert sum(a != b for a, b in pairwise(order)) == len(groups) - 1


def test_no_line_is_there_twice() -> None:
    """Every line is there once, whatever its time of receipt."""
    assert [line for line, times in Counter(map(raw, RECORDS)).items() if times > 1] == []


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: text(record)[:60])
def test_a_record_is_well_formed(record: Record) -> None:
    """A record names its origin, has one line without a line end, and expects an event that is complete."""
    assert set(record) <= KEYS
    assert len(record["origin"]) > 10
    assert ("line" in record) != ("hex" in record)
    assert b"\n" not in raw(record)
    assert datetime.fromisoformat(record["at"]).utcoffset() == timedelta(0)
    assert ZoneInfo(record.get("zone", "UTC"))
    expect = record["expect"]
    assert set(expect) - {"uuid"} == {"event", "distinct_id", "timestamp", "properties"}
    assert expect["event"]
    assert expect["distinct_id"]
    assert expect["timestamp"] is None or RFC_3339.fullmatch(expect["timestamp"])


@pytest.mark.parametrize("record", syslog_events(), ids=lambda record: text(record)[:60])
def test_the_expected_properties_follow_the_rules(record: Record) -> None:
    """Properties are of the known names and types, and say what the line says."""
    properties, line = record["expect"]["properties"], text(record)
    number, rest = priority(line)
    assert set(properties) <= {*TEXTS, "structured_data", "unparsed"}
    assert all(isinstance(properties[name], str) for name in TEXTS if name in properties)
    if number is None:
        assert not {"facility", "severity"} & set(properties)
    else:
        assert properties["facility"] == FACILITIES[number // 8]
        assert properties["severity"] == SEVERITIES[number % 8]
    assert record["expect"]["distinct_id"] == properties.get("hostname", "here")
    for name in ("hostname", "app", "procid", "msgid", "sequence"):
        assert properties.get(name, "-")
        assert name not in properties or properties[name] in rest
    assert rest.rstrip("\0").replace("\0", "\n").endswith(properties["message"])
    assert not properties["message"].startswith("\ufeff")
    if "unparsed" in properties:
        assert properties["unparsed"] is True
        assert properties["message"] == rest.rstrip("\0").replace("\0", "\n")
        assert set(properties) <= {"message", "facility", "severity", "unparsed"}
    for element in properties.get("structured_data", {}).values():
        values = [
            one for value in element.values() for one in (value if isinstance(value, list) else [value])
        ]
        assert all(isinstance(value, str) for value in values)


@pytest.mark.parametrize("record", syslog_events(), ids=lambda record: text(record)[:60])
def test_the_expected_times_follow_the_rules(record: Record) -> None:
    """The event has the line's time in UTC if that has a fraction, and of a clock that was set.

    The year is the last that there was.
    """
    timestamp, stamp = record["expect"]["timestamp"], record["expect"]["properties"].get("syslog_timestamp")
    if stamp is None:
        assert timestamp is None
        return
    found = RFC_3339.fullmatch(stamp)
    assert found is not None
    assert found[2] not in {"+00:00", "-00:00"}
    instant = datetime.fromisoformat(stamp)
    if found[1] is None or NEVER_SET.search(text(record)):
        assert timestamp is None
    else:
        assert timestamp.endswith(f"{found[1]}Z")
        assert datetime.fromisoformat(timestamp) == instant
    leap_day = (instant.month, instant.day) == (2, 29)
    late = datetime.fromisoformat(record["at"]) - instant
    assert timedelta(days=-1) <= late <= timedelta(days=4 * 366 if leap_day else 366)


@pytest.mark.parametrize("record", own_events(), ids=lambda record: text(record)[:60])
def test_an_event_in_a_line_is_expected_as_it_is(record: Record) -> None:
    """A line that carries an event gives that event, and of the header at most the distinct_id."""
    line, expect = text(record), record["expect"]
    event = json.loads(line[line.index("{") :])
    assert expect["event"] == event["event"]
    assert expect["properties"] == event.get("properties", {})
    assert expect["timestamp"] == event.get("timestamp")
    assert expect.get("uuid") == event.get("uuid")
    wanted = expect["distinct_id"]
    assert wanted == event.get("distinct_id", wanted)
    assert "distinct_id" in event or wanted == "here" or wanted in line


def read_line(record: Record) -> Record:
    """What the decoder makes of a record's line, in the form of what is expected."""
    decoder = Syslog(
        event="syslog",
        distinct_id="{hostname}",
        hostname="here",
        zone=ZoneInfo(record.get("zone", "UTC")),
        max_event=1_000_000,
    )
    wall = int(datetime.fromisoformat(record["at"]).timestamp() * 1e6)
    decoded = decoder.decode([Read(raw(record) + b"\n", Instant(wall, 1, "boot"))], Flaws())
    [envelope] = decoded.envelopes
    return {
        "event": envelope.event,
        "distinct_id": envelope.distinct_id,
        "timestamp": envelope.timestamp,
        "properties": json.loads(bytes(envelope.properties)),
        "uuid": envelope.uuid,
    }


def with_instant(event: Record) -> Record:
    """An event whose timestamp is an instant, however it was written."""
    timestamp = event["timestamp"]
    return {"uuid": None, **event, "timestamp": timestamp and datetime.fromisoformat(timestamp)}


@pytest.mark.parametrize(
    "record", [pytest.param(record, id=f"{n}-{record['group']}") for n, record in enumerate(RECORDS, 1)]
)
def test_the_decoder_reads_it_so(record: Record) -> None:
    """A line becomes the event that is expected of it."""
    assert with_instant(read_line(record)) == with_instant(record["expect"])
