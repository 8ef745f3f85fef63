"""`agent.veil`: a secret is taken out of a text however it is written there, and nothing else is."""

import json
from base64 import b64encode
from collections.abc import Callable
from html import escape
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import Delivery, Secret
from agent.veil import sent_by, without, without_keys

WAYS: tuple[Callable[[str], str], ...] = (
    str,
    escape,
    quote,
    lambda text: quote(text, safe="").lower(),
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    lambda text: "".join(f"\\u{ord(char):04X}" for char in text),
    lambda text: "".join(f"&#{ord(char)};" for char in text),
    lambda text: "".join(f"&#x{ord(char):x};" for char in text),
    lambda text: b64encode(text.encode()).decode(),
)
PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=64)


@given(PRINTABLE, st.sampled_from(WAYS))
@settings(deadline=None)
def test_a_secret_is_found_in_each_way(secret: str, way: Callable[[str], str]) -> None:
    """What JSON, URLs, HTML and basic authentication write is the secret too."""
    told = without(b"[" + way(secret).encode() + b"]", [secret])
    assert told.rstrip(b"=]") == b"[***"


@given(PRINTABLE, st.binary(max_size=200))
@settings(deadline=None)
def test_no_text_is_an_error(secret: str, text: bytes) -> None:
    """Whatever the text, and whatever the secret; what has none of it stays."""
    told = without(text, [secret, "", "short"])
    assert told == text or b"***" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bad key phc_abc-DEF_1", "bad key ***"),
        ("phx_a,phs_b;pha_c", "***,***;***"),
        ("a project's key (phc_...)", "a project's key (phc_...)"),
        ("triumph_a", "triumph_a"),
    ],
)
def test_keys_of_posthogs_show_by_their_beginning(text: str, told: str) -> None:
    """Nobody need know one to hide it."""
    assert without_keys(text) == told


def test_what_is_sent_beside_the_key() -> None:
    """Headers, whole and by their words, and the passwords of proxies; not where they are."""
    delivery = Delivery(
        headers={"Authorization": Secret("Bearer abc")},
        proxy=Secret("http://us%65r:p%2Fw@proxy.example:3128"),
    )
    found = sent_by(delivery, ["http://a:b@c", "http://nobody", "http://[broken"])
    assert set(found) == {"Bearer abc", "Bearer", "abc", "user:p/w", "p/w", "a:b", "b"}
