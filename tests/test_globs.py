"""Names by globs: which they mean, and that the bytes of a JSON text always show one."""

import json
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.globs import CACHED_LENGTH, Names, finds, wrong_glob
from agent.scan import Laid

GLOBS = st.lists(
    st.text('ab*?[]!-ü"/\\', min_size=1, max_size=5).filter(lambda glob: not wrong_glob(glob)), max_size=3
)
NAME = st.text('abü"/\\[]!-\n', max_size=6)


@given(GLOBS, NAME)
def test_they_mean_what_a_shell_means(globs: list[str], name: str) -> None:
    """A name is meant where one of the globs means it, upper and lower case apart."""
    expected = any(fnmatchcase(name, glob) for glob in globs)
    names = Names(globs)
    assert (name in names) == expected
    assert names.among([name, name + "x" * CACHED_LENGTH]) & {name} == ({name} if expected else set())
    assert bool(names.which(name)) == expected


@given(GLOBS, NAME, st.booleans())
def test_a_name_that_is_meant_is_found_in_json(globs: list[str], name: str, ascii_only: bool) -> None:
    """However it is written; a text that has none may be looked at in vain."""
    key = json.dumps(name, ensure_ascii=ascii_only)
    escaped = "".join(f"\\u{ord(char):04X}" for char in name)
    if name in Names(globs):
        texts = [key, f'"{escaped}"', key.replace("/", "\\/")]
        assert Laid([f"{{{text}:1}}".encode() for text in texts]).which(finds(globs)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("glob", "wrong"),
    [("", "empty"), ("a[b", '"["'), ("[", '"["'), ("[]", '"["'), ("[[]", ""), ("[]]a", ""), ("a*?", "")],
)
def test_what_is_wrong_with_a_glob(glob: str, wrong: str) -> None:
    """A bracket that is not closed is hardly what was meant."""
    assert wrong in wrong_glob(glob)
    assert bool(wrong) == bool(wrong_glob(glob))
