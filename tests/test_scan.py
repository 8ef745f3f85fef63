"""Searching many texts at once: every text in which something is, is found."""

import re

from hypothesis import given
from hypothesis import strategies as st

from agent.scan import Laid, pattern, piece


@given(
    st.lists(st.binary(max_size=6).map(lambda text: text.replace(b"\n", b"")), max_size=6),
    st.binary(max_size=2),
)
def test_all_together_are_as_each_alone(texts: list[bytes], wanted: bytes) -> None:
    """What is found in texts laid together is what is found in each."""
    if b"\n" in wanted or not wanted:
        return
    expected = {at for at, text in enumerate(texts) if wanted in text}
    laid = Laid(texts)
    assert laid.which([piece(wanted)]) == expected
    assert laid.which([pattern(re.compile(re.escape(wanted)))]) == expected
    assert laid.which([]) == set()
