"""`agent.portal`: a page for people is known, and nothing else is taken for one."""

import pytest

from agent.portal import is_html


@pytest.mark.parametrize(
    "page",
    [
        b"<html>",
        b"<HTML lang=en>",
        b"\xef\xbb\xbf<!doctype html>",
        b"\r\n\t <!DOCTYPE HTML PUBLIC>",
        b"<!-- portal --><html>",
        b"<script>location='/login'</script>",
        b'<meta http-equiv="refresh" content="0">',
        b"<head><title>x</title>",
        b"<html",
    ],
)
def test_html_is_known_by_its_beginning(page: bytes) -> None:
    """A portal that calls its page JSON is a portal all the same."""
    assert is_html({"content-type": "application/json"}, page)


@pytest.mark.parametrize("body", [b"<3", b"<headline>", b"ok <html>", b"<htmlish", b"1<a>"])
def test_what_is_not_html_is_not_taken_for_it(body: bytes) -> None:
    """Any other body is what its sender says it is."""
    assert not is_html({"content-type": "text/plain"}, body)
