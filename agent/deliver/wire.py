"""How a batch is written for PostHog's `/batch`.

What a reply means is left to `reply`, when to send to `pace`, what becomes of the events to `shipment`.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from agent import __version__, pack
from agent.deliver.verdict import Batch, Damaged
from agent.events import Chunk

Compression = Literal["gzip", "none"]

# Every installation serves it (`rust/capture/src/router.rs`).
PATH = "/batch/"

# A chunk of few events packs badly, since it may not refer to its neighbours. Joined as they are, batches of
# 50 to 1000 events of 300 bytes come to 4.8 times gzip's bytes in chunks of 1 event, to 2.1 in chunks of 5,
# to 1.25 in chunks of 32, and to at most 1.17 in chunks of 64; the agent is to stay under 1.2.
FEW_EVENTS = 64
# Or of few, but of so many bytes (half of the largest chunk): deflate looks back 32 KiB, a sixteenth of them.
FEW_BYTES = 512 * 1024
# Up to here zlib's level 6 repacks a batch (4 µs an event, 8 % smaller); beyond, there are so many small
# chunks that the host is busy after all, and isal's level 1 (0.4 µs) is what it can afford.
TIGHT_SIZE = 128 * 1024
TIGHT_LEVEL = 6
# What is packed anew lies in memory beside the chunks for as long as the request takes. It must be smaller by
# a twentieth, else they go as they are: noise would take twice its bytes, and gain nothing.
WORTHWHILE = 0.95


def body(
    batch: Batch, api_key: str, sent_at: str | None, *, historical_migration: bool, compression: Compression
) -> tuple[bytes, ...] | Damaged:
    """The batch as `/batch` takes it, in pieces; without `sent_at` PostHog takes its times as they are."""
    encode = msgspec.json.encode
    sent = b',"sent_at":' + encode(sent_at) if sent_at is not None else b""
    historical = b',"historical_migration":true' if historical_migration else b""
    return joined(b'{"api_key":%b%b%b,"batch":[' % (encode(api_key), sent, historical), batch, compression)


def joined(head: bytes, batch: Batch, compression: Compression) -> tuple[bytes, ...] | Damaged:
    """The head of a body and the batch's events, in pieces; packed, it is one gzip member.

    Chunks are laid end to end unopened, unless they hold few and small events. `Damaged` can therefore only
    come of small chunks or of `compression = "none"`; another broken chunk shows when PostHog refuses it
    and the shipment opens it.
    """
    tail = b"]}"
    chunks = len(batch.pieces)
    if compression == "gzip" and (batch.events >= FEW_EVENTS * chunks or batch.size >= FEW_BYTES * chunks):
        return pack.member(head, batch.pieces, tail)
    try:
        if compression == "none" or batch.size <= TIGHT_SIZE:
            data = b"".join((head, b",".join(_opened(batch.pieces)), tail))
            return (data if compression == "none" else zlib.compress(data, TIGHT_LEVEL, wbits=pack.GZIP),)
        repacked = Repacked(*pack.deflate_all(_opened(batch.pieces), b","))
    except _Broken as broken:
        return Damaged(broken.piece, str(broken))
    if len(repacked.packed) > WORTHWHILE * sum(len(piece.packed) for piece in batch.pieces):
        return pack.member(head, batch.pieces, tail)
    return pack.member(head, [repacked], tail)


class _Broken(ValueError):
    """A chunk that cannot be opened."""

    def __init__(self, piece: Chunk, why: str) -> None:
        super().__init__(why)
        self.piece = piece


def _opened(pieces: Sequence[Chunk]) -> Iterator[bytes]:
    """One after the other, so that large ones are not all in memory. Raises `_Broken`."""
    for piece in pieces:
        try:
            yield pack.inflate(piece.packed, piece.size, piece.crc)
        except ValueError as error:
            raise _Broken(piece, str(error)) from error


class Repacked(NamedTuple):
    """Several chunks' events packed together, for one request."""

    packed: bytes
    size: int
    crc: int


# What configured headers may not set: where the body ends, how it is coded and whose it is (RFC 9112, 6) ...
FRAMING = frozenset({"content-encoding", "content-length", "content-type", "host", "transfer-encoding"})
# ... and what belongs to the connection rather than to the request (RFC 9110, 7.6.1 and 10.1).
CONNECTION = frozenset({"connection", "expect", "keep-alive", "te", "trailer", "upgrade"})


def headers(configured: Mapping[str, str], compression: Compression) -> dict[str, str]:
    """The request's headers: the configured ones, and ours where they would change how the body is read."""
    # An answer is a line, and read without being opened.
    ours = {"User-Agent": f"capture-agent/{__version__}", "Accept-Encoding": "identity"}
    named = {name.lower() for name in configured}
    chosen = {name: value for name, value in ours.items() if name.lower() not in named}
    chosen |= {name: value for name, value in configured.items() if name.lower() not in FRAMING | CONNECTION}
    chosen["Content-Type"] = "application/json"
    if compression == "gzip":
        chosen["Content-Encoding"] = "gzip"
    return chosen
