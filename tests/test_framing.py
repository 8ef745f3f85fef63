"""Framing of syslog streams: messages are the same however they are framed and cut."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.decode.framing import FrameReader
from agent.decode.ndjson import Unfinished
from agent.events import SAMPLE_BYTES


def read(
    pieces: list[bytes], longest: int = 300, *, handed: bool = False
) -> tuple[list[bytes], list[bytes], bytes]:
    """Whole lines, the samples of those that were refused, and what is left at the end.

    If it is `handed`, another reader goes on at each piece, as after a reload.
    """
    reader = FrameReader(longest)
    lines, refused = b"", []
    for piece in pieces:
        if handed:
            left = msgspec.json.encode(reader.unfinished())
            reader = FrameReader(longest)
            reader.resume(msgspec.json.decode(left, type=Unfinished))
        lines += reader.feed(piece)
        if (sample := reader.take_refused()) is not None:
            refused.append(sample)
        assert reader.pending <= max(longest + 2, SAMPLE_BYTES + len(piece))
    assert not lines or lines.endswith(b"\n")
    return lines.split(b"\n")[:-1], refused, reader.finish()


def counted(*messages: bytes) -> bytes:
    return b"".join(b"%d %b" % (len(message), message) for message in messages)


@pytest.mark.parametrize(
    ("stream", "lines", "last"),
    [
        (b"<13>a\n<13>b\n", [b"<13>a", b"<13>b"], b""),
        (b"<13>a\r\n<13>b", [b"<13>a\r"], b"<13>b"),
        (b"<13>a\0<13>b\0", [b"<13>a", b"<13>b"], b""),
        (b"6 <13>a\n5 <13>b", [b"<13>a\0", b"<13>b"], b""),
        (b"8 <13>a\nbc5 <13>d", [b"<13>a\0bc", b"<13>d"], b""),
        (b"5 <13>a\n5 <13>b\r\n", [b"<13>a", b"<13>b"], b""),  # ended as well as counted
        (b'13 {"event":"a"}5 <13>b', [b'{"event":"a"}', b"<13>b"], b""),
        (b"5 <13>a9 <13>", [b"<13>a"], b"<13>"),  # closed within a frame
        (b"5 <13>a9", [b"<13>a"], b"9"),
        (b"5 <13>a<13>b\n5 <13>c\n", [b"<13>a", b"<13>b", b"5 <13>c"], b""),  # a count is broken
        (b"5 <13>a0 <13>b\n", [b"<13>a", b"0 <13>b"], b""),
        (b"5 <13>a1234567890 <13>b\n", [b"<13>a", b"1234567890 <13>b"], b""),
        (b"12 monkeys\nand\n", [b"12 monkeys", b"and"], b""),  # a number, but no count
        (b"2013-08-28T08:12:32Z esx1 Hostd: a\n", [b"2013-08-28T08:12:32Z esx1 Hostd: a"], b""),
        (b"\n\n5 <13>a", [b"<13>a"], b""),
        (b"", [], b""),
        (b"12", [], b"12"),
    ],
)
def test_both_framings(stream: bytes, lines: list[bytes], last: bytes) -> None:
    """The first bytes tell how messages are framed, and nothing is lost where a sender breaks its framing."""
    assert read([stream]) == (lines, [], last)
    assert read([stream[at : at + 1] for at in range(len(stream))]) == (lines, [], last)


@pytest.mark.parametrize(
    ("stream", "due"),
    [
        (b"5 <13>a9 <13>", True),
        (b"5 <13>a9 ", True),  # nothing of the frame but its count
        (b"5 <13>a9", True),
        (b"9 <", True),
        (b"5 <13>a\r\n", False),
        (b"5 <13>a", False),
        (b"5 <13>a<13>b", False),  # a count is broken: lines
        (b"<13>b", False),
        (b"12 ", False),  # nothing says yet that it is a count
    ],
)
def test_more_is_due_of_a_frame_that_has_begun(stream: bytes, due: bool) -> None:
    """An end there cuts it off, as its count says; a line has no such count."""
    reader = FrameReader(300)
    for at in range(len(stream)):
        reader.feed(stream[at : at + 1])
    assert reader.due is due
    reader.finish()
    assert not reader.due


MESSAGES = st.lists(st.binary(max_size=12).map(lambda text: b"<" + text), max_size=6)
STREAMS = st.one_of(
    MESSAGES.map(lambda messages: counted(*messages)),
    MESSAGES.map(b"\n".join),
    MESSAGES.map(b"\0".join),
    st.tuples(MESSAGES, st.binary(max_size=20)).map(lambda both: counted(*both[0]) + both[1]),
    st.binary(max_size=60),
    st.text("0123456789 <\n\0a", max_size=60).map(str.encode),
)


@given(STREAMS, st.data())
def test_cuts_do_not_matter(stream: bytes, data: st.DataObject) -> None:
    """Any way of cutting the bytes gives the same lines."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(pieces) == read([stream]) == read(pieces, handed=True)


@given(MESSAGES)
def test_counted_messages_come_whole(messages: list[bytes]) -> None:
    """What is counted comes as it was, but that a newline within it is NUL."""
    lines = [message.replace(b"\n", b"\0") for message in messages]
    assert read([counted(*messages)]) == (lines, [], b"")


@given(st.integers(1, 1200))
def test_a_long_frame_is_refused_once(size: int) -> None:
    """It is left out to its end, however it comes; its neighbours stay, and a sample of it is kept."""
    long = b"<13>" + b"x\n" * 500
    stream = counted(b"<13>before", long, b"<13>after")
    lines, refused, last = read([stream[at : at + size] for at in range(0, len(stream), size)])
    kept = [line for line in lines if len(line) <= 300]
    assert kept == [b"<13>before", b"<13>after"]
    assert len(refused) + len(lines) - len(kept) == 1
    assert all(sample == long[:SAMPLE_BYTES] for sample in refused)
    assert last == b""


def test_what_is_held_is_bounded() -> None:
    """Megabytes that are announced, or never end, leave nothing behind."""
    for head in (b"999999999 <13>", b"<13>", b"\n", b"5 <13>a\r\n"):
        reader = FrameReader(1000)
        reader.feed(head)
        for _ in range(200):
            reader.feed((b"x" if head.endswith((b">", b"a")) else b"\n") * 5000)
            assert reader.pending <= 1002


def test_an_unfinished_message_can_be_refused_from_outside() -> None:
    """Where too much is held for all clients together, what was refused is skipped and the rest is taken."""
    reader = FrameReader(1000)
    assert reader.feed(b"20 <13>abc") == b""
    reader.refuse()
    assert (reader.pending, reader.take_refused(), reader.take_refused()) == (0, b"<13>abc", None)
    assert reader.feed(b"x" * 13 + b"5 <13>b") == b"<13>b\n"
    for beginning in (b"12", b"<13>abc"):
        reader = FrameReader(1000)
        reader.feed(beginning)
        reader.refuse()
        assert (reader.pending, reader.take_refused()) == (0, beginning)
        assert reader.feed(b"rest\n<13>b\n") == b"<13>b\n"
