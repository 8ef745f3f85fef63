"""logfmt: what a line says, and that no line harms another."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.decode.logfmt import Logfmt, _pairs, _pairs_at_once
from agent.envelope import Flaws
from agent.events import Instant, Read

AT = Instant(1_795_000_000_123_456, 1, "boot")
FORMAT = Logfmt(10_000)


def properties_of(line: str | bytes) -> dict[str, Any]:
    """The properties of one good line, whose event and id are laid before it."""
    text = line.encode() if isinstance(line, str) else line
    decoded = FORMAT.decode([Read(b"event=e distinct_id=d " + text + b"\n", AT)], Flaws())
    assert not decoded.rejects, decoded.rejects
    [envelope] = decoded.envelopes
    found: dict[str, Any] = json.loads(bytes(envelope.properties))
    return found


def reason(line: bytes) -> str:
    """Why one line is refused."""
    decoded = FORMAT.decode([Read(line + b"\n", AT)], Flaws())
    [reject] = decoded.rejects
    assert not decoded.envelopes
    return reject.reason


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("plan=pro", {"plan": "pro"}),
        ("amount=12.5 n=-3 e=1e3 z=0", {"amount": 12.5, "n": -3, "e": 1000.0, "z": 0}),
        ("id=007 v=1.2.3 ip=10.0.0.1 plus=+5 hex=0x1f dash=-", None),
        ("long=12345678901234567890 card=4111111111111111", None),
        ("price=12345678901234.56 rate=0.3000000000000000444 low=-1234567.123456789e5", None),
        (
            "ip=1.2.3.4.5.6.7.8.9.0.1.2.3.4.5.6 n=1234567.12345678",
            {"ip": "1.2.3.4.5.6.7.8.9.0.1.2.3.4.5.6", "n": 1234567.12345678},
        ),
        ("n=-123456789.012345 e=123456789012345e20", {"n": -123456789.012345, "e": 123456789012345e20}),
        ("big=1e100 small=1e99", {"big": "1e100", "small": 1e99}),
        ("huge=1e999 nan=NaN", {"huge": "1e999", "nan": "NaN"}),
        (
            "yes=true no=false nothing=null other=truely",
            {"yes": True, "no": False, "nothing": None, "other": "truely"},
        ),
        ('q="12.5" t="true" empty="" bare=', {"q": "12.5", "t": "true", "empty": "", "bare": ""}),
        ("debug verbose", {"debug": True, "verbose": True}),
        ('msg="a \\"quoted\\" word" path="C:\\\\tmp"', {"msg": 'a "quoted" word', "path": "C:\\tmp"}),
        (r'ctl="a\tb\nc\u00fc\x41\101\U0001F600"', {"ctl": "a\tb\ncüAA😀"}),
        (
            r'pair="\ud83d\ude00" half="\ud83d!" beyond="\UFFFFFFFF"',
            {"pair": "😀", "half": "\ufffd!", "beyond": "\ufffd"},
        ),
        ("a=1 a=2 a=3", {"a": 3}),
        ("ü=ö url=http://h/p?a=b&c=d", {"ü": "ö", "url": "http://h/p?a=b&c=d"}),
        ("  a=1\t b=2  ", {"a": 1, "b": 2}),
        ("$set=x err.code=5 a-b_c/d=1", {"$set": "x", "err.code": 5, "a-b_c/d": 1}),
    ],
)
def test_values(line: str, told: dict[str, Any] | None) -> None:
    """Quotes make a text, numbers and words are JSON's; what no double holds exactly stays a text."""
    if told is None:
        told = dict(pair.split("=", 1) for pair in line.split())
    assert properties_of(line) == told


def test_own_fields() -> None:
    """Name, id, uuid and time are the event's own, as texts but for a numeric time."""
    line = b"event=404 distinct_id=007 uuid=0197a5c07e1c7abc8def0123456789ab timestamp=1767323045 a=1\n"
    [envelope] = FORMAT.decode([Read(line, AT)], Flaws()).envelopes
    assert (envelope.event, envelope.distinct_id, envelope.timestamp) == ("404", "007", 1767323045)
    assert envelope.uuid == "0197a5c07e1c7abc8def0123456789ab"
    assert json.loads(bytes(envelope.properties)) == {"a": 1}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"plan=pro", "missing_event"),
        (b'event="" a=1', "missing_event"),
        (b"event distinct_id=d", "missing_event"),
        (b"event=e uuid", "bad_uuid"),
        (b'event=e a="unterminated', "malformed_logfmt"),
        (b'event=e a="b"c=d', "malformed_logfmt"),
        (b"event=e =5", "malformed_logfmt"),
        (b'event=e a"b', "malformed_logfmt"),
        (b"event=e a=\xff", "bad_utf8"),
        (b"event=e a=" + b"x" * 10_000, "too_large"),
    ],
)
def test_refusals(line: bytes, why: str) -> None:
    """Each rule that is broken has its name, and the lines around it are not touched."""
    assert reason(line) == why
    good = b"event=e distinct_id=d\n"
    decoded = FORMAT.decode([Read(good + b"\r\n" + line + b"\n", AT), Read(good, AT)], Flaws())
    assert [(reject.read, reject.line) for reject in decoded.rejects] == [(0, 1)]
    assert (decoded.lines, decoded.places) == ([2, 1], [(0, 0), (1, 0)])


def test_long_names_and_ids_are_cut_and_counted() -> None:
    """As of every other format."""
    flaws = Flaws()
    [envelope] = FORMAT.decode(
        [Read(b"event=%b distinct_id=%b\n" % (b"n" * 201, b"d" * 300), AT)], flaws
    ).envelopes
    assert (envelope.event, envelope.distinct_id, flaws.truncated) == ("n" * 200, "d" * 200, 1)


@pytest.mark.parametrize(
    "hostile",
    [
        b"a" * 900_000 + b'"',
        b'a="' + b"\\" * 900_000,
        b'a="' * 300_000,
        b"a=" * 450_000,
        b"= " * 450_000,
        b'"' * 900_000,
    ],
)
def test_no_line_costs_more_than_its_length(hostile: bytes) -> None:
    """A line made to be slow is read at once; at the square of its length it would take hours."""
    decoded = Logfmt(1_000_000).decode([Read(hostile + b"\n", AT)], Flaws())
    assert len(decoded.rejects) == 1


@given(
    st.lists(
        st.binary(max_size=60) | st.text(alphabet='ab=" \\\nnux07', max_size=40).map(str.encode), max_size=5
    )
)
def test_any_bytes(parts: list[bytes]) -> None:
    """Nothing is raised, and each line that is not empty is one event or one refusal."""
    blob = b"\n".join(parts) + b"\n"
    decoded = FORMAT.decode([Read(blob, AT)], Flaws())
    count = sum(1 for line in blob.split(b"\n") if line.strip())
    assert decoded.lines == [count]
    assert len(decoded.envelopes) + len(decoded.rejects) == count
    for envelope in decoded.envelopes:
        json.loads(bytes(envelope.properties))


@given(st.dictionaries(st.from_regex(r"[a-z.]{1,8}", fullmatch=True), st.text(max_size=12), max_size=4))
def test_what_go_quotes_is_read_back(pairs: dict[str, str]) -> None:
    """A text in quotes, with its quotes and backslashes escaped, comes back whole."""
    own = {
        key: text.encode(errors="replace").decode()
        for key, text in pairs.items()
        if key not in {"event", "uuid"}
    }
    own = {key: text for key, text in own.items() if key not in {"distinct_id", "timestamp"}}
    quoted = {key: json.dumps(text) for key, text in own.items()}
    assert properties_of(" ".join(f"{key}={text}" for key, text in quoted.items())) == own


# White space that is not ASCII's, or that only some call so: it ends no pair.
NO_SPACE = "\xa0\u3000\x85\u2028\x1c\x1d\x1e\x1f"


@pytest.mark.parametrize("char", NO_SPACE)
@pytest.mark.parametrize("neighbour", [b"", b'event=e a="b\\""', b"event=e a\tb=1"])
def test_a_line_means_the_same_whatever_its_neighbours_are(char: str, neighbour: bytes) -> None:
    """Only ASCII's white space ends a pair, also where a line beside it wants a closer look."""
    line = f"event=e city=New{char}York b=2\n".encode()
    envelope = FORMAT.decode([Read(line + neighbour + b"\n", AT)], Flaws()).envelopes[0]
    assert json.loads(bytes(envelope.properties)) == {"city": f"New{char}York", "b": 2}


ODD = st.text(alphabet='ab="= 1t{},:\\\t\v\f\r\x7fé' + NO_SPACE, max_size=30)
PAIR = st.tuples(
    st.sampled_from(["event", "a", "é", "distinct_id", "uuid", "timestamp", "$set"]),
    st.sampled_from(
        [
            *("=1", "=-0", "=-0.5e3", "=true", "=x", '="1"', '=" a=b "', '=""', "=0123", "=a=b", "", "="),
            *("=123456789012345", "=1234567890123456", "=1.23456789012345", "=1.234567890123456", "=-1.2.3"),
        ]
    ),
)
# What may stand between pairs: a space mostly, so that most lines are ordinary.
GAP = st.just(" ") | st.sampled_from(" \t\v\f\r" + NO_SPACE)
LINE = st.lists(st.tuples(PAIR.map("".join), GAP).map("".join), max_size=5).map("".join)


@given(st.lists(ODD | LINE, min_size=1, max_size=4))
def test_the_quick_way_reads_as_the_thorough_one(texts: list[str]) -> None:
    """Where ordinary lines are read all at once, they say the same as one by one."""
    lines = [line for line in (text.encode().strip() for text in texts) if line]
    quick = _pairs_at_once(lines)
    # As JSON, for what is equal to Python can be written in several ways.
    assert quick is None or list(map(json.dumps, quick)) == [
        json.dumps(_pairs(line.decode())) for line in lines
    ]


def test_ordinary_lines_are_read_at_once() -> None:
    """Values in quotes, numbers and words do not make a line extraordinary."""
    lines = [b'event="a b" distinct_id=5 n=1.5 ok=true q="7" e=""', b"event=e distinct_id=d a=b", b'a="x"']
    assert _pairs_at_once(lines) == [
        {"event": "a b", "distinct_id": "5", "n": 1.5, "ok": True, "q": "7", "e": ""},
        {"event": "e", "distinct_id": "d", "a": "b"},
        {"a": "x"},
    ]
