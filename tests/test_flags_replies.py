"""`agent.accept.flags.replies`: bounded in age and bytes, the longest unused forgotten first."""

import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.accept.flags.replies import ENTRY_BYTES, Replies, Reply, conditional

ETAG = (b"etag", b'W/"one"')
JSON = (b"content-type", b"application/json")
REPLY = Reply(200, (JSON, ETAG, (b"vary", b"origin"), (b"access-control-allow-origin", b"*")), b"{}")


def test_a_reply_is_found_with_its_age() -> None:
    """Until it is too old; a call that nobody remembers has none."""
    replies = Replies(10.0, 10_000)
    replies.remember(b"k", REPLY, 100.0)
    assert replies.find(b"k", 110.0) == (REPLY, 10.0)
    assert replies.find(b"other", 100.0) is None
    assert not replies.lacks(b"k", 110.0)
    assert replies.lacks(b"k", 110.1)
    assert replies.find(b"k", 110.1) is None
    assert (len(replies), replies.size) == (0, 0)


def test_a_reply_that_is_too_large_is_known_as_such() -> None:
    """Nothing is found for it, yet nobody hopes for it; a cache of no size hopes for nothing."""
    replies = Replies(10.0, 1000)
    replies.remember(b"k", REPLY, 100.0)
    replies.remember(b"k", None, 100.0)
    assert replies.find(b"k", 100.0) is None
    assert not replies.lacks(b"k", 100.0)
    replies.remember(b"k", REPLY._replace(body=b"x" * 1000), 100.0)
    assert (len(replies), replies.size) == (0, 0)
    assert not Replies(10.0, 0).lacks(b"k", 100.0)


@pytest.mark.parametrize(
    ("tag", "kept"), [(b'W/"one"', True), (b'"one"', True), (b"one", True), (b'"two"', False), (b"", False)]
)
def test_a_304_renews_the_reply_that_it_names_or_ends_it(tag: bytes, kept: bool) -> None:
    """The tag says whether ours is still right."""
    replies = Replies(10.0, 10_000)
    replies.remember(b"k", REPLY, 100.0)
    replies.confirm(b"k", tag, 109.0)
    assert replies.find(b"k", 119.0) == ((REPLY, 10.0) if kept else None)
    replies.confirm(b"other", tag, 109.0)


@pytest.mark.parametrize(
    ("tags", "status"),
    [
        (b'W/"one"', 304),
        (b'"one"', 304),
        (b"one", 304),
        (b'"zero", W/"one"', 304),
        (b"*", 304),
        (b"", 200),
        (b'"two"', 200),
        (b'""', 200),
        (b",,", 200),
    ],
)
def test_who_has_it_already_is_told_so(tags: bytes, status: int) -> None:
    """By a 304 with the tag and what browsers need, and without what was about the body."""
    reply = conditional(REPLY, tags)
    assert reply.status == status
    if status == 304:
        assert reply == Reply(304, REPLY.headers[1:])


def test_an_error_is_told_whatever_the_client_has() -> None:
    """Only a 200 is what a tag stands for."""
    error = REPLY._replace(status=404)
    assert conditional(error, b"*") == conditional(error, b'"one"') == error


def test_a_reply_without_a_tag_is_had_by_nobody() -> None:
    """An empty tag is no tag."""
    plain = Reply(200, (JSON,), b"{}")
    assert all(conditional(plain, tags) == plain for tags in (b'""', b'"one"', b"", b"W/"))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["remember", "large", "find", "confirm", "forget"]),
        st.integers(0, 5),
        st.integers(0, 2000),
        st.integers(0, 8),
    )
)


@given(STEPS)
def test_it_never_holds_more_than_it_may_nor_what_is_older(steps: list[tuple[str, int, int, int]]) -> None:
    """Against a plain dict without bounds: what is found is what was last said, and not too old."""
    replies, model, now = (
        Replies(20.0, 4 * ENTRY_BYTES + 2000),
        dict[bytes, tuple[Reply | None, float]](),
        0.0,
    )
    for what, number, size, seconds in steps:
        key, now = b"%d" % number, now + seconds
        match what:
            case "remember":
                model[key] = Reply(200, (ETAG,), os.urandom(size)), now
                replies.remember(key, model[key][0], now)
            case "large":
                model[key] = None, now
                replies.remember(key, None, now)
            case "confirm" if key in model:
                model[key] = model[key][0], now
                replies.confirm(key, b'"one"', now)
            case "forget":
                model.pop(key, None)
                replies.forget(key)
        found = replies.find(key, now)
        if found is not None:
            reply, at = model[key]
            assert found[0] == reply
            assert found[1] <= 20.0
            # A reply that had been too old could not be confirmed any more.
            assert found[1] >= now - at
        elif what == "remember":
            assert size > 1000
        assert replies.size <= 4 * ENTRY_BYTES + 2000


def test_the_longest_unused_goes_first() -> None:
    """To be found, and to be confirmed, is a use."""
    replies = Replies(10.0, 3 * (ENTRY_BYTES + 1000) + 500)
    for key in (b"a", b"b", b"c"):
        replies.remember(key, Reply(200, (), b"x" * 1000), 0.0)
    replies.find(b"a", 1.0)
    replies.remember(b"d", Reply(200, (), b"x" * 1000), 1.0)
    assert [key for key in (b"a", b"b", b"c", b"d") if replies.find(key, 1.0)] == [b"a", b"c", b"d"]


def test_what_it_says_to_hold_is_what_it_holds() -> None:
    """Python's own share is counted: many small replies are no way around the bound."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        replies = Replies(10.0, 1_000_000)
        for number in range(3000):
            headers = tuple((os.urandom(10), os.urandom(20)) for _ in range(6))
            replies.remember(os.urandom(32), Reply(200, headers, os.urandom(50)), float(number) / 1000)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.5 * replies.size < held < 1.1 * 1_000_000
