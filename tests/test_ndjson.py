"""Framing: lines are the same however the network cuts them."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.decode.ndjson import LineReader, Unfinished, count_lines, first_lines


def read(pieces: list[bytes], longest: int = 20, *, handed: bool = False) -> tuple[bytes, int, bytes]:
    """Whole lines, how many were refused, and what is left at the end.

    If it is `handed`, another reader goes on at each piece, as after a reload.
    """
    reader = LineReader(longest)
    lines, refused = b"", 0
    for piece in pieces:
        if handed:
            left = msgspec.json.encode(reader.unfinished())
            reader = LineReader(longest)
            reader.resume(msgspec.json.decode(left, type=Unfinished))
        lines += reader.feed(piece)
        refused += reader.take_refused() is not None
    return lines, refused, reader.finish()


@given(st.lists(st.binary(max_size=15).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.data())
def test_cuts_do_not_matter(lines: list[bytes], data: st.DataObject) -> None:
    """Any way of cutting the bytes gives the same lines."""
    blob = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(blob)), max_size=6)))
    pieces = [blob[start:end] for start, end in zip([0, *cuts], [*cuts, len(blob)], strict=True)]
    whole, _, last = blob.rpartition(b"\n")
    assert read(pieces) == (whole + b"\n" if b"\n" in blob else b"", 0, last) == read(pieces, handed=True)


@given(st.integers(1, 50))
def test_a_long_line_is_refused_once(size: int) -> None:
    """It is dropped up to its newline, however it comes; its neighbours stay."""
    blob = b"before\n" + b"x" * 100 + b"\nafter\n"
    pieces = [blob[start : start + size] for start in range(0, len(blob), size)]
    lines, refused, last = read(pieces)
    assert read(pieces, handed=True) == (lines, refused, last)
    kept = [line for line in lines.split(b"\n") if len(line) <= 20]
    assert kept == [b"before", b"after", b""]
    assert refused + (len(lines.split(b"\n")) - len(kept)) == 1
    assert last == b""


def test_a_line_that_has_become_too_long_is_refused_once() -> None:
    """A reader that goes on with a smaller bound drops what another one held up to its newline."""
    before, reader = LineReader(50), LineReader(20)
    assert before.feed(b"x" * 40) == b""
    reader.resume(before.unfinished())
    assert reader.feed(b"x" * 8 + b"\nafter\n") == b"after\n"
    assert reader.take_refused() == b"x" * 40


def test_what_is_held_is_bounded() -> None:
    """Megabytes without a newline leave nothing behind."""
    reader = LineReader(1000)
    for _ in range(1000):
        reader.feed(b"x" * 5000)
        assert reader.pending <= 1001
    assert reader.finish() == b""


@given(st.lists(st.sampled_from((b"", b" \r", b"a", b"b ")), max_size=12), st.data())
def test_the_first_lines_are_cut_off_whole(lines: list[bytes], data: st.DataObject) -> None:
    """As many as are asked for that are not blank, each with its end; the next is what comes behind."""
    blob = b"".join(line + b"\n" for line in lines) + b"last\n"
    count = data.draw(st.integers(0, count_lines(blob) - 1))
    first = first_lines(blob, count)
    assert (blob[: len(first)], count_lines(first)) == (first, count)
    assert not first or first.endswith(b"\n")
    assert blob[len(first) :].split(b"\n")[0].strip()
