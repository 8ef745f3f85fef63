"""Forms and queries: the fields that Python finds, and no form that costs more than its length."""

import tracemalloc
from urllib.parse import parse_qsl, quote_plus

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.decode.form import MOST_FIELDS, SLICE_BYTES, fields_of

MANY = st.text("ab4D%=&+ _.\t\r\nü€", max_size=40) | st.text(max_size=40)


def python_reads(form: str) -> dict[str, bytes]:
    return {name: value.encode() for name, value in parse_qsl(form, keep_blank_values=True)}


@given(MANY | st.dictionaries(MANY, MANY, max_size=4).map(lambda fields: "&".join(map(quote_plus, fields))))
@example("a=%3D%3d%25%253D%2541%%41%=\r\n=41==%E2%82%AC%e2%82")
def test_python_reads_the_same(form: str) -> None:
    """Whatever is escaped, and whatever only looks like it."""
    assert fields_of(form.encode()) == python_reads(form)


@given(st.lists(st.sampled_from(["%C3%BC", "ü", "%", "+", "=", "a", "%4", "%zz"]), max_size=20))
def test_no_escape_is_cut_in_halves(pieces: list[str]) -> None:
    """Where a slice ends, an escape or letter goes on."""
    form = "data=" + "x" * (SLICE_BYTES - 10) + "".join(pieces)
    assert fields_of(form.encode()) == python_reads(form)


def test_too_many_fields_are_refused() -> None:
    """Nobody sends a hundred."""
    assert fields_of(b"a=1" + b"&" * (MOST_FIELDS - 1)) == {"a": b"1"}
    assert fields_of(b"&" * MOST_FIELDS) is None


@pytest.mark.parametrize("piece", [b"%41", b"%", b"=", b"%4", b"%=", b"\xff", b"+", b"%FF"])
def test_a_form_costs_no_more_than_four_times_itself(piece: bytes) -> None:
    """In memory, however much is escaped in it."""
    form = b"data=" + piece * (4 * 2**20 // len(piece))
    tracemalloc.start()
    found = fields_of(form)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert peak < 4.5 * len(form)
