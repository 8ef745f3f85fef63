"""What looks like an address or a card's number is found wherever it stands, and little else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.patterns import PATTERNS, is_card, weight
from agent.scan import Laid


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("@email", "bob@example.com", "[redacted]"),
        (
            "@email",
            "from <bob.o'neil+tag@mail.example.co.uk>, to x@y.de.",
            "from <[redacted]>, to [redacted].",
        ),
        ("@email", "https://x.example/?mail=bob%40example.com&a=1", "https://x.example/?mail=[redacted]&a=1"),
        ("@email", "%40bob@example.com", "%40[redacted]"),
        ("@email", "jürgen@exämple.de", "[redacted]"),
        ("@email", '"bob o"@example.com', "[redacted]"),
        ("@email", "bob@[10.0.0.1] bob@[IPv6:::1]", "[redacted] [redacted]"),
        ("@email", "x" * 200 + "@example.com", "[redacted]"),
        ("@email", "100%bob@example.com", "[redacted]"),
        ("@email", "root@web-1, f@https://x.example/a.js, @scope/package, a @ b.c", None),
        ("@card", "4111111111111111", "[redacted]"),
        ("@card", "4111 1111 1111 1111, 3782-822463-10005", "[redacted], [redacted]"),
        ("@card", "4111 1111 1111 1111 123 12/27", "[redacted] 123 12/27"),
        ("@card", "12 4111.1111.1111.1111 7", "12 [redacted] 7"),
        ("@card", "3234 4111 1111 1111 1111", "3234 [redacted]"),
        ("@card", "4111\u00a01111\u00a01111\u00a01111", "[redacted]"),
        ("@card", "4111 - 1111 - 1111 - 1111", None),
        ("@card", "card=5555555555554444;6011111111111117", "card=[redacted];[redacted]"),
        ("@card", "4222222222222 30569309025904 3530111333300000", "[redacted] [redacted] [redacted]"),
        ("@card", "2223003122003222", "[redacted]"),
        ("@card", "4111111111111112 1795000000123456 20261124135206 41111111111111110", None),
        ("@card", "0197a5c0-7e1c-7abc-8def-0123456789ab 2026-11-24T13:52:06.123456Z", None),
        ("@ip", "10.0.0.1", "[redacted]"),
        ("@ip", "from 192.168.1.255:443, 8.8.8.8.", "from [redacted]:443, [redacted]."),
        ("@ip", "IP 10.0.0.1.443 > 010.000.000.001", "IP [redacted].443 > [redacted]"),
        ("@ip", "client:2001:db8::1, [fe80::1%eth0]:443", "client:[redacted], [[redacted]%eth0]:443"),
        ("@ip", "::1 ::ffff:10.0.0.1 2001:DB8:0:0:8:800:200C:417A", "[redacted] [redacted] [redacted]"),
        (
            "@ip",
            "fe80::1.5353 > ff02::fb.5353: fe80::/10",
            "[redacted].5353 > [redacted].5353: [redacted]/10",
        ),
        ("@ip", "1:2:3:4:5:6:10.0.0.1", "1:2:3:4:5:6:[redacted]"),
        ("@ip", "300.1.1.1 1.2.3 13:52:06 aa:bb:cc:dd:ee:ff std::string x :: Int", None),
    ],
)
def test_looks(name: str, text: str, shown: str | None) -> None:
    """Only what has the looks is taken out; what stands around it stays."""
    assert PATTERNS[name].without(text) == (text if shown is None else shown)


ALIKE = {
    "@email": ["a@b.cd", "bob%40x.example", "ü@ö.de"],
    "@card": [
        "4111111111111111",
        "3782 822463 10005",
        "5555\u00a05555\u00a05555\u00a04444",
        "4111-1111-1111-1111",
    ],
    "@ip": ["10.0.0.1", "::1", "2001:db8::ff00:42:8329", "1:2:3:4:5:6:7:8"],
}


def spelled(text: str, plain: list[bool]) -> str:
    """Text in JSON, some of its characters escaped."""
    return "".join(
        char if keep and char.isprintable() else f"\\u{ord(char):04x}"
        for char, keep in zip(text, plain * len(text), strict=False)
    )


@given(
    st.sampled_from([(name, text) for name, texts in ALIKE.items() for text in texts]),
    st.text("ab ,;(", max_size=3),
    st.lists(st.booleans(), min_size=1, max_size=7),
)
@settings(deadline=None)
def test_what_is_taken_out_is_found_however_json_writes_it(
    alike: tuple[str, str], around: str, plain: list[bool]
) -> None:
    """The scan of the bytes never misses a text in which the pattern would take something out."""
    name, text = alike
    text = f"{around} {text} {around}"
    assert PATTERNS[name].without(text) != text
    for written in (spelled(text, plain), json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]):
        laid = Laid([b'{"a":"x"}', f'{{"a":"{written}"}}'.encode(), b'{"b":1}'])
        assert 1 in laid.which(PATTERNS[name].finds)


@given(st.text("0123456789abcdef:.@%40 -\"'[]_\u00a0é", max_size=60))
@settings(max_examples=500)
def test_whatever_a_text_is(text: str) -> None:
    """Nothing raises, and what is left has nothing to take out."""
    for name, pattern in PATTERNS.items():
        shown = pattern.without(text)
        if name != "@ip":  # around an address there may be what is one itself
            assert pattern.without(shown) == shown


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    "text",
    [
        "%",
        "a",
        "@",
        "a@",
        "a.",
        "%40",
        '"',
        "4",
        "4 ",
        "444 ",
        "4111 1111 1111 ",
        "a:",
        ":",
        "::",
        "1.",
        "::1.",
        "a@a.",
        "-",
    ],
)
def test_a_text_of_nothing_but_beginnings(name: str, text: str) -> None:
    """It is looked through at once; at the square of its length it would take minutes."""
    blob = (text * 1_000_000)[:1_000_000]
    weight(blob)
    PATTERNS[name].without(blob)
    Laid([blob.encode()]).which(PATTERNS[name].finds)


def test_luhn() -> None:
    """One digit that is wrong, or two that changed places, are no card's."""
    assert is_card("4111111111111111")
    assert not any(is_card(f"411111111111111{digit}") for digit in "023456789")
    assert is_card("5105105105105100")
    assert not is_card("5015105105105100")
    assert not is_card("4" * 12)
    assert not is_card("")
