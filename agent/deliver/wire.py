"""How a batch is written for PostHog's `/batch`.

What a reply means is left to `reply`, when to send to `pace`, what becomes of the events to `shipment`.
"""

import zlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from agent import __version__, pack
from agent.deliver.verdict import Batch, Damaged

Compression = Literal["gzip", "none"]

# Every installation serves it (`rust/capture/src/router.rs`).
PATH = "/batch/"

# A chunk of few events packs badly, since it may not refer to its neighbours. Joined as they are, batches of
# 50 to 1000 events of 300 bytes come to 4.8 times gzip's bytes in chunks of 1 event, to 2.1 in chunks of 5,
# to 1.25 in chunks of 32, and to at most 1.17 in chunks of 64; the agent is to stay under 1.2.
FEW_EVENTS = 64
# Up to here zlib's level 6 repacks a batch (4 µs an event, 8 % smaller); beyond, there are so many small
# chunks that the host is busy after all, and isal's level 1 (0.4 µs) is what it can afford.
TIGHT_SIZE = 128 * 1024
TIGHT_LEVEL = 6


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

    Chunks are laid end to end unopened, unless they hold few events each. `Damaged` can therefore only
    come of small chunks or of `compression = "none"`; another broken chunk shows when PostHog refuses it
    and the shipment opens it.
    """
    tail = b"]}"
    if compression == "gzip" and batch.events >= FEW_EVENTS * len(batch.pieces):
        return pack.member(head, batch.pieces, tail)
    opened = []
    for piece in batch.pieces:
        try:
            opened.append(pack.inflate(piece.packed, piece.size, piece.crc))
        except ValueError as error:
            return Damaged(piece, str(error))
    data = b",".join(opened)
    if compression == "none":
        return (head + data + tail,)
    if len(data) <= TIGHT_SIZE:
        return (zlib.compress(head + data + tail, TIGHT_LEVEL, wbits=31),)  # 31: a gzip member
    return pack.member(head, [Repacked(pack.deflate(data), len(data), pack.crc32(data))], tail)


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
