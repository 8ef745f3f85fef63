"""`agent.deliver.wire`: a body that PostHog reads, byte for byte what was stored."""

import base64
import gzip
import json
import random
import zlib
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent import __version__, pack
from agent.deliver import wire
from agent.deliver.verdict import Batch, Damaged
from agent.events import Chunk

NOW = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z


def chunk(*events: bytes, boot: str = "b", received_at: int = NOW, monotonic: int = 0) -> Chunk:
    data = b",".join(events)
    return Chunk(
        project="default",
        events=len(events),
        size=len(data),
        crc=pack.crc32(data),
        received_at=received_at,
        boot=boot,
        monotonic=monotonic,
        packed=pack.deflate(data),
    )


def batch(*pieces: Chunk) -> Batch:
    size = sum(piece.size for piece in pieces) + len(pieces) - 1
    return Batch(
        project="default", key=None, pieces=pieces, events=sum(piece.events for piece in pieces), size=size
    )


def typical(number: int, rng: random.Random) -> bytes:
    """An event such as a web application sends, about 300 bytes."""
    properties = {
        "$lib": "capture-agent",
        "plan": rng.choice(["free", "pro", "team"]),
        "amount": round(rng.random() * 100, 2),
        "path": f"/app/{rng.choice(['home', 'list', 'item'])}/{rng.randrange(1000)}",
        "duration_ms": rng.randrange(3000),
    }
    return json.dumps(
        {
            "event": rng.choice(["page viewed", "signup", "file opened"]),
            "distinct_id": f"user-{rng.randrange(5000)}",
            "properties": properties,
            "timestamp": f"2026-01-01T12:00:{number % 60:02d}.{rng.randrange(1000000):06d}Z",
            "uuid": str(UUID(int=rng.getrandbits(128))),
        }
    ).encode()


def built(
    sent: Batch, compression: wire.Compression = "gzip", key: str = "phc_k", historical: bool = False
) -> bytes:
    body = wire.body(
        sent, key, "2026-01-01T00:00:00.000Z", historical_migration=historical, compression=compression
    )
    assert isinstance(body, tuple)
    return b"".join(body)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.text(min_size=1))
def test_a_body_holds_every_event_once(sizes: list[int], key: str) -> None:
    """Whatever chunks a batch is made of, PostHog finds one array with all events in their order."""
    numbers = iter(range(sum(sizes)))
    pieces = [chunk(*(b'{"n":%d}' % next(numbers) for _ in range(size))) for size in sizes]
    packed, plain = built(batch(*pieces), key=key), built(batch(*pieces), "none", key=key)
    reader = zlib.decompressobj(31)
    assert reader.decompress(packed) == plain
    assert (reader.eof, reader.unused_data) == (True, b"")
    assert json.loads(plain) == {
        "api_key": key,
        "sent_at": "2026-01-01T00:00:00.000Z",
        "batch": [{"n": number} for number in range(sum(sizes))],
    }


def test_large_chunks_travel_unopened() -> None:
    """The packed bytes of a busy host's chunks are in the body as they rested on disk."""
    pieces = [chunk(*(b'{"n":%d}' % number for number in range(500))) for _ in range(3)]
    body = built(batch(*pieces))
    assert all(piece.packed in body for piece in pieces)


def test_many_small_chunks_are_one_stream() -> None:
    """A busy host that receives its events one by one still sends one gzip member of all."""
    rng = random.Random(1)
    pieces = [chunk(typical(number, rng)) for number in range(600)]
    assert batch(*pieces).size > wire.TIGHT_SIZE
    body = built(batch(*pieces))
    assert len(json.loads(gzip.decompress(body))["batch"]) == 600


def noise(size: int, rng: random.Random) -> bytes:
    """An event that hardly packs."""
    return b'{"n":"%b"}' % base64.b64encode(rng.randbytes(size * 3 // 4))


def test_few_events_that_fill_a_chunk_travel_unopened() -> None:
    """What deflate cannot look back to from the next chunk is not unpacked for that."""
    rng = random.Random(3)
    pieces = [chunk(*(noise(20_000, rng) for _ in range(30))) for _ in range(2)]
    body = wire.joined(b"[", batch(*pieces), "gzip")
    assert isinstance(body, tuple)
    assert [one for one in body if any(one is piece.packed for piece in pieces)] == [
        piece.packed for piece in pieces
    ]


def test_what_does_not_pack_is_not_held_twice() -> None:
    """Where packing small chunks anew gains nothing they go as they are; the body is as whole."""
    rng = random.Random(4)
    pieces = [chunk(*(noise(8_000, rng) for _ in range(55))) for _ in range(3)]
    body = wire.joined(b"[", batch(*pieces), "gzip")
    assert isinstance(body, tuple)
    assert sum(any(one is piece.packed for piece in pieces) for one in body) == 3
    assert len(json.loads(gzip.decompress(b"".join(body))[:-1])) == 165


@pytest.mark.parametrize("count", [50, 500, 1000])
@pytest.mark.parametrize("each", [1, 2, 5, 16, 50, 64, 100])
def test_small_chunks_cost_few_bytes(count: int, each: int) -> None:
    """On a quiet host the bytes on the wire are at most 1.2 times those of the batch gzipped whole."""
    rng = random.Random(7)
    events = [typical(number, rng) for number in range(count)]
    pieces = [chunk(*events[start : start + each]) for start in range(0, count, each)]
    body = built(batch(*pieces))
    assert len(body) <= 1.2 * len(gzip.compress(gzip.decompress(body)))


def test_historical_migration_is_told_at_the_root() -> None:
    """It is a boolean beside the batch, and absent where it is not wanted."""
    assert json.loads(built(batch(chunk(b"{}")), "none", historical=True))["historical_migration"] is True
    assert b"historical" not in built(batch(chunk(b"{}")), "none")


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_a_damaged_chunk_is_named(compression: wire.Compression) -> None:
    """A chunk that cannot be opened is told apart from its neighbours, so that only it is shed."""
    broken = replace(chunk(b"{}"), crc=1)
    sent = batch(chunk(b"{}"), broken)
    body = wire.body(sent, "k", "now", historical_migration=False, compression=compression)
    assert isinstance(body, Damaged)
    assert body.chunk is broken
    assert body.why


def test_configured_headers_cannot_break_the_body() -> None:
    """What frames and codes the body is ours; everything else is the operator's, the User-Agent too."""
    configured = {
        "content-length": "5",
        "Content-Encoding": "br",
        "TRANSFER-ENCODING": "chunked",
        "Host": "elsewhere",
        "content-type": "text/plain",
        "Connection": "close",
        "Expect": "100-continue",
        "X-Team": "data",
    }
    assert wire.headers(configured, "gzip") == {
        "User-Agent": f"capture-agent/{__version__}",
        "Accept-Encoding": "identity",
        "X-Team": "data",
        "Content-Type": "application/json",
        "Content-Encoding": "gzip",
    }
    assert wire.headers({"user-agent": "mine", "accept-encoding": "gzip"}, "none") == {
        "user-agent": "mine",
        "accept-encoding": "gzip",
        "Content-Type": "application/json",
    }


def test_without_a_clock_the_times_are_taken_as_they_are() -> None:
    """Where it is not known what time it is, nothing is said of it, and PostHog corrects nothing."""
    body = wire.body(batch(chunk(b"{}")), "k", None, historical_migration=False, compression="none")
    assert body == (b'{"api_key":"k","batch":[{}]}',)
