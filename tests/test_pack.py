"""`agent.pack`: what is packed comes out again, and joined chunks are one gzip member for every reader."""

import gzip
import json
import zlib
from contextlib import suppress
from random import Random
from types import ModuleType
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import pack

isal: ModuleType | None = vars(pack)["fast"]

texts = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda seed, times: seed * times, st.binary(min_size=1, max_size=40), st.integers(0, 3000)),
)


class Piece(NamedTuple):
    """Packed bytes with what `member` needs to know of them."""

    packed: bytes
    size: int
    crc: int


def piece(data: bytes) -> Piece:
    return Piece(pack.deflate(data), len(data), pack.crc32(data))


@pytest.fixture(params=["isal", "zlib"])
def packer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType | None:
    """Both ways to pack: with isal where it has a wheel, and without it."""
    if request.param == "isal" and isal is None:
        pytest.skip("isal has no wheel here")
    module = isal if request.param == "isal" else None
    monkeypatch.setattr(pack, "fast", module)
    return module


SAMPLES = (b"", b"a", b"{}", b'{"event":"a"}' * 5000, bytes(range(256)) * 300)


@pytest.mark.parametrize("data", SAMPLES, ids=len)
@pytest.mark.usefixtures("packer")
def test_inflate_gives_back_what_deflate_was_given(data: bytes) -> None:
    """A chunk comes out as it went in, packed by isal or by zlib."""
    assert pack.inflate(*piece(data)) == data


@given(texts)
def test_inflate_gives_back_anything(data: bytes) -> None:
    """Whatever the bytes are, they survive."""
    assert pack.inflate(*piece(data)) == data


def test_what_one_packer_packs_the_other_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer written with isal is read on a host without it, and the other way round."""
    if isal is None:
        pytest.skip("isal has no wheel here")
    data = b'{"event":"a"},' * 999
    fast = piece(data)
    monkeypatch.setattr(pack, "fast", None)
    slow = piece(data)
    assert pack.inflate(*fast) == data
    monkeypatch.setattr(pack, "fast", isal)
    assert pack.inflate(*slow) == data
    assert fast.crc == slow.crc


@given(st.binary(max_size=200), st.lists(texts, max_size=6), st.binary(max_size=50))
def test_joined_chunks_are_one_gzip_member(head: bytes, datas: list[bytes], tail: bytes) -> None:
    """Readers that stop after the first member get everything, and readers that go on find nothing more."""
    joined = b"".join(pack.member(head, [piece(data) for data in datas], tail))
    whole = head + b",".join(datas) + tail
    assert gzip.decompress(joined) == whole
    reader = zlib.decompressobj(31)
    assert reader.decompress(joined) == whole
    assert (reader.eof, reader.unused_data) == (True, b"")


@pytest.mark.usefixtures("packer")
def test_a_member_is_readable_with_either_packer() -> None:
    """The checksum of the whole is right whichever library adds the checksums of the parts."""
    parts = [json.dumps({"event": name}).encode() for name in ("a", "b" * 70_000, "c")]
    joined = b"".join(pack.member(b"[", [piece(part) for part in parts], b"]"))
    reader = zlib.decompressobj(31)
    assert json.loads(reader.decompress(joined))[2] == {"event": "c"}
    assert (reader.eof, reader.unused_data) == (True, b"")


def test_large_chunks_are_not_copied() -> None:
    """They are pieces of their own; what is small lies together, and is worth a write."""
    large = [piece(Random(number).randbytes(pack.LARGE_BYTES)) for number in (1, 2)]
    small = [piece(b"%d" % number) for number in range(100)]
    pieces = pack.member(b"[", [*small, large[0], *small, large[1]], b"]")
    assert len(pieces) == 5
    assert pieces[1] is large[0].packed
    assert pieces[3] is large[1].packed
    whole = b",".join(
        zlib.decompressobj(-15).decompress(one.packed) for one in (*small, large[0], *small, large[1])
    )
    assert gzip.decompress(b"".join(pieces)) == b"[" + whole + b"]"


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_checksums_add_up_without_a_library(first: bytes, second: bytes) -> None:
    """Our own arithmetic agrees with zlib's over the joined bytes."""
    added = pack.combine_slowly(zlib.crc32(first), zlib.crc32(second), len(second))
    assert added == zlib.crc32(first + second)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**33))
def test_checksums_add_up_as_in_isal(first: int, second: int, size: int) -> None:
    """For any checksums and lengths our own arithmetic gives isal's answer."""
    if isal is None:
        pytest.skip("isal has no wheel here")
    assert pack.combine_slowly(first, second, size) == isal.crc32_combine(first, second, size)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_damage_is_a_value_error(data: bytes, draw: st.DataObject) -> None:
    """Any changed or missing byte is noticed, or harmless: never other bytes, never another exception."""
    good = piece(data)
    at = draw.draw(st.integers(0, len(good.packed) - 1))
    changed = bytearray(good.packed)
    changed[at] ^= draw.draw(st.integers(1, 255))
    for bad in (bytes(changed), good.packed[:at]):
        with suppress(ValueError):
            assert pack.inflate(bad, good.size, good.crc) == data


@pytest.mark.parametrize("size", [0, 4, 6])
def test_another_size_is_damage(size: int) -> None:
    """A chunk that says another size than it has is damaged, and a bomb is not inflated past it."""
    with pytest.raises(ValueError, match="not what was written"):
        pack.inflate(pack.deflate(b"12345"), size, zlib.crc32(b"12345"[:size]))


@pytest.mark.parametrize("size", [0, 1, 65535])
def test_stored_blocks_hold_up_to_their_limit(size: int) -> None:
    """A stored block of any size that the format allows is read back."""
    data = b"x" * size
    assert zlib.decompressobj(pack.RAW).decompress(pack.stored(data) + pack.FINAL_BLOCK) == data
