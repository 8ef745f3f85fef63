"""lz-string's base64 form, as the JavaScript library writes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.decode.lz64 import open_lz64

MOST = 10_000


@pytest.mark.parametrize(
    ("packed", "text"),
    [  # made with lz-string 1.5.0 of npm
        (
            b"NobwRApgbhB2AuYBcYAkAHAhgc2gSwgHcwAaMdAJwHt0IL4CBnZceKgazmXIAsBjAPqZSYACZ5GDWH3gC8o7goC+SgLpA===",
            '[{"event":"$pageview","properties":{"token":"phc_a","distinct_id":"d"}}]',
        ),
        (b"JeGoJLwbgAe6nRQ=", "é€😀" * 3),
    ],
)
def test_what_the_library_packs(packed: bytes, text: str) -> None:
    """Texts with pieces of every kind are opened, also where a form made spaces of plus signs."""
    assert open_lz64(packed, MOST) == text.encode()
    assert open_lz64(packed.replace(b"+", b" "), MOST) == text.encode()


@given(st.binary(max_size=200) | st.text("ABCDwxyz0189+/=", max_size=200).map(str.encode))
def test_anything_else_is_refused(packed: bytes) -> None:
    """Nothing that a client may send raises or outgrows the limit by more than a piece."""
    opened = open_lz64(packed, 100)
    assert opened is None or len(opened) < 4000


def test_a_bomb_stops_at_the_limit() -> None:
    """Each code of this one names the piece before and one more: its text grows with the square."""
    bits = "01"[::-1] + format(ord("A"), "016b")[::-1]
    for code in range(4, 5000):
        bits += format(code, f"0{code.bit_length()}b")[::-1]
    bits += "0" * (-len(bits) % 6)
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    packed = bytes(alphabet[int(bits[at : at + 6], 2)] for at in range(0, len(bits), 6))
    opened = open_lz64(packed, MOST)
    assert opened is not None
    assert MOST < len(opened) < 2 * MOST
