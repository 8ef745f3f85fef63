"""Packs events: deflates a chunk once, joins chunks into one gzip member, opens one again.

A chunk is raw deflate (RFC 1951) ended by a full flush: it stops on a byte boundary and refers to nothing
before it, so chunks can be laid end to end without being opened. isal is 6 to 13 times faster than zlib at
the same ratio; where it has no wheel, zlib does the same work.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

try:
    from isal import isal_zlib as fast
except ImportError:
    fast = None  # type: ignore[assignment]  # the module or nothing

# isal's level 1 packs as tightly as zlib's 2 to 3 at 940 MB/s; higher levels cost more than they save.
LEVEL = 1
# wbits, with a window of 32 KiB: raw deflate, and the two formats around it.
RAW, ZLIB, GZIP = -15, 15, 31

# RFC 1952: magic, deflate, no flags, no time, no extra flags, unknown system.
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
# RFC 1951, 3.2.4: a last block, stored, of no bytes: ends the deflate stream.
FINAL_BLOCK = b"\x01\x00\x00\xff\xff"


# A chunk's bytes from here on are written as they are: a write more costs less than a copy for each
# request. Those of a thousand usual events are fewer, 75 KB.
LARGE_BYTES = 256 * 1024


class Packed(Protocol):
    """Bytes in deflated form, as a `Chunk` carries them."""

    @property
    def packed(self) -> bytes: ...
    @property
    def size(self) -> int: ...
    @property
    def crc(self) -> int: ...


def deflate(data: bytes) -> bytes:
    """Raw deflate of `data`, ended by a full flush."""
    packer, flush = _packer()
    return packer.compress(data) + packer.flush(flush)


def deflate_all(datas: Iterable[bytes], between: bytes) -> tuple[bytes, int, int]:
    """Raw deflate of all, with `between` between them: the bytes, their size and CRC-32 before.

    None is held for longer than it takes.
    """
    packer, flush = _packer()
    packed, size, crc = [], 0, 0
    for data in datas:
        for part in (between, data) if size else (data,):
            packed.append(packer.compress(part))
            size, crc = size + len(part), crc32(part, crc)
    packed.append(packer.flush(flush))
    return b"".join(packed), size, crc


class _Packer(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self, mode: int, /) -> bytes: ...


def _packer() -> tuple[_Packer, int]:
    """What deflates, and how it is flushed in full."""
    if fast is not None:
        return fast.compressobj(LEVEL, fast.DEFLATED, RAW), fast.Z_FULL_FLUSH
    return zlib.compressobj(LEVEL, zlib.DEFLATED, RAW), zlib.Z_FULL_FLUSH


def crc32(data: bytes, before: int = 0) -> int:
    """CRC-32 as gzip uses it, of what had the CRC-32 `before` and then `data`."""
    return fast.crc32(data, before) if fast is not None else zlib.crc32(data, before)


def inflate(packed: bytes, size: int, crc: int) -> bytes:
    """The bytes that `deflate` was given; ValueError where they are not those of `size` and `crc`."""
    opener = zlib.decompressobj(RAW)
    try:
        data = opener.decompress(packed, size + 1)
    except zlib.error as error:
        raise ValueError(f"not raw deflate: {error}") from error
    if len(data) != size or crc32(data) != crc:
        raise ValueError("the packed bytes are not what was written")
    return data


_BROKEN: tuple[type[Exception], ...] = (
    (zlib.error,) if fast is None else (zlib.error, fast.error)  # type: ignore[assignment]  # its stub errs
)


def open_stream(packed: bytes, wbits: int, most: int) -> bytes | None:
    """The first stream in `packed`, or one byte more than `most` of a longer one.

    None where it is not whole, or not of that format.
    """
    opener = zlib.decompressobj(wbits) if fast is None else fast.decompressobj(wbits)
    try:
        data = opener.decompress(packed, most + 1)
    except _BROKEN:
        return None
    return data if opener.eof or len(data) > most else None


def stored(data: bytes) -> bytes:
    """`data` (at most 65535 bytes) as a stored deflate block: what is not worth packing (RFC 1951, 3.2.4)."""
    return struct.pack("<BHH", 0, len(data), len(data) ^ 0xFFFF) + data


def member(head: bytes, chunks: Sequence[Packed], tail: bytes) -> tuple[bytes, ...]:
    """One gzip member of `head`, the chunks' bytes with commas between them, and `tail`; in pieces.

    One member only: many servers' readers stop after the first. Large chunks are not copied.
    """
    comma, comma_crc = stored(b","), crc32(b",")
    parts = [GZIP_HEADER, stored(head)]
    crc, size = crc32(head), len(head)
    for number, chunk in enumerate(chunks):
        if number:
            parts.append(comma)
            crc, size = combine(crc, comma_crc, 1), size + 1
        parts.append(chunk.packed)
        crc, size = combine(crc, chunk.crc, chunk.size), size + chunk.size
    parts += (stored(tail), FINAL_BLOCK)
    crc, size = combine(crc, crc32(tail), len(tail)), size + len(tail)
    parts.append(struct.pack("<II", crc, size & 0xFFFFFFFF))
    return tuple(_pieces(parts))


def _pieces(parts: Sequence[bytes]) -> Iterator[bytes]:
    """The parts in pieces that are worth a write each."""
    small: list[bytes] = []
    for part in parts:
        if len(part) < LARGE_BYTES:
            small.append(part)
            continue
        yield b"".join(small)
        yield part
        small = []
    yield b"".join(small)


def combine(first: int, second: int, second_size: int) -> int:
    """The CRC-32 of two byte strings laid end to end, from theirs and the second's length."""
    if fast is not None:
        return fast.crc32_combine(first, second, second_size)
    return combine_slowly(first, second, second_size)


# CRC-32's polynomial, bits reversed (RFC 1952, section 8).
POLYNOMIAL = 0xEDB88320


def combine_slowly(first: int, second: int, second_size: int) -> int:
    """`combine` without a library: `first` times x^(8·size) modulo the polynomial, plus `second`."""
    return _multiply(_power(8 * second_size), first) ^ second


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC's; bit 31 is x^0."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ POLYNOMIAL if b & 1 else b >> 1
    return product


def _power(exponent: int) -> int:
    """x^exponent modulo the CRC's polynomial, by squaring."""
    power, square = 0x80000000, 0x40000000
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        exponent >>= 1
    return power
