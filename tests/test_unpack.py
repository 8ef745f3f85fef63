"""What a request is packed in, and that no bomb gets far."""

import base64
import gzip
import json
import tracemalloc
import zlib
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.decode.request import Answer, Request
from agent.decode.unpack import LZ64_BYTES, inflate_v1, unpack
from agent.events import Instant

AT = Instant(1_795_000_000_000_000, 1, "boot")
TEXT = b'{"event":"e+ /\xc3\xbc","token":"phc_a","distinct_id":"d"}'
LZ64 = b"NobwRApgbhB2AuYBcYAkAHAhgc2gSwgHcwAaMdAJwHt0IL4CBnZceKgazmXIAsBjAPqZSYACZ5GDWH3gC8o7goC+SgLpA==="
LZ64_TEXT = b'[{"event":"$pageview","properties":{"token":"phc_a","distinct_id":"d"}}]'
FORM = "application/x-www-form-urlencoded"
LIMIT = 100_000


def opened(body: bytes = b"", path: str = "/batch/", query: str = "", **headers: str) -> bytes | Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    unpacked = unpack(Request(path, query, named, body, AT, LIMIT))
    return unpacked if isinstance(unpacked, Answer) else unpacked.text


def refused(*arguments: str | bytes, **named: str) -> int:
    outcome = opened(*arguments, **named)  # type: ignore[arg-type]  # as `opened`'s
    assert isinstance(outcome, Answer)
    return outcome.status


B64 = base64.b64encode(TEXT)
ZIPPED = gzip.compress(TEXT, mtime=0)  # the same in every run, as it names tests
PACKED = quote(base64.b64encode(ZIPPED), safe="").encode()


@pytest.mark.parametrize(
    ("body", "query", "headers"),
    [
        (TEXT, "", {}),
        (ZIPPED, "", {"content_encoding": "gzip"}),
        (ZIPPED, "compression=gzip-js&_=1", {}),
        (ZIPPED, "", {}),  # known by its magic bytes
        (ZIPPED + gzip.compress(b"[]", mtime=0), "", {}),  # the first member, as PostHog reads it
        (B64, "", {}),
        (base64.b64encode(ZIPPED), "compression=base64", {}),
        (b"data=" + quote(TEXT, safe="").encode(), "", {"content_type": FORM}),
        (urlencode({"data": B64.decode()}).encode(), "", {"content_type": f"{FORM}; charset=UTF-8"}),
        (b"data=" + B64 + b"&compression=base64", "", {"content_type": FORM}),  # its plus signs unescaped
        (b"", "data=" + quote(TEXT, safe=""), {}),
        (b"", "compression=base64&data=" + quote(B64, safe=""), {}),
        (b"", "data=" + B64.decode(), {}),
        (b"data=" + PACKED, "compression=gzip", {"content_type": FORM}),
        (b"data=" + PACKED + b"&compression=gzip-js", "", {"content_type": FORM}),
        (b"data=" + PACKED, "", {"content_type": FORM, "content_encoding": "gzip"}),
        (b"", "compression=gzip&data=" + PACKED.decode(), {}),
        (base64.b64encode(ZIPPED), "compression=gzip", {}),
        (base64.b64encode(ZIPPED), "", {"content_encoding": "gzip"}),
        (gzip.compress(B64, mtime=0), "compression=gzip", {}),
        (base64.b64encode(b"data=" + PACKED), "compression=gzip", {"content_type": FORM}),
    ],
)
def test_every_wrapping_is_taken_off(body: bytes, query: str, headers: dict[str, str]) -> None:
    """The text is the same however it was packed."""
    path = "/batch/" if "compression=base64" in query else "/e/"
    assert opened(body, path, query, **headers) == TEXT


@pytest.mark.parametrize("hint", ["lz64", "lz-string"])
def test_lz64(hint: str) -> None:
    """As a body, in a form and with a header."""
    assert opened(LZ64, query=f"compression={hint}") == LZ64_TEXT
    assert opened(LZ64, content_encoding=hint) == LZ64_TEXT
    form = urlencode({"data": LZ64.decode(), "compression": hint}).encode()
    assert opened(form, content_type=FORM) == LZ64_TEXT


@pytest.mark.parametrize(
    ("status", "body", "query", "headers"),
    [
        (400, b"", "", {}),
        (400, b"", "data=", {}),
        (400, b"\x1f\x8b\x08 no gzip", "", {}),
        (400, ZIPPED[:-9], "", {}),
        (400, TEXT, "compression=gzip", {}),
        (400, TEXT, "compression=lz64", {}),
        (400, zlib.compress(TEXT), "", {"content_encoding": "deflate"}),
        (400, b"(\xb5/\xfd", "", {"content_encoding": "zstd"}),
        (400, b"\x8b", "", {"content_encoding": "br"}),
        (400, TEXT, "", {"content_type": FORM}),
        (400, b"data=x" + b"&a=b" * 200, "", {"content_type": FORM}),
        (400, TEXT, "a&" * 200, {}),
        (413, b" " * (LIMIT + 1), "", {}),
        (413, gzip.compress(b" " * (LIMIT + 1), mtime=0), "", {}),
        (413, b"A" * (LZ64_BYTES + 1), "compression=lz64", {}),
    ],
)
def test_what_cannot_be_opened_is_refused(
    status: int, body: bytes, query: str, headers: dict[str, str]
) -> None:
    """With PostHog's status."""
    assert refused(body, query=query, **headers) == status


def test_a_form_of_latin_1_is_read() -> None:
    """As PostHog has it: what is no UTF-8 is told as such, and the event is taken."""
    assert opened(b"data=%FCber%C3%BC\xfc", content_type=FORM) == "\ufffdber\xfc\ufffd".encode()


def test_exactly_the_limit_is_not_over_it() -> None:
    """Packed or not."""
    text = json.dumps(" " * (LIMIT - 2)).encode()
    assert opened(text) == opened(gzip.compress(text)) == text


def test_a_bomb_is_stopped() -> None:
    """A gigabyte in a megabyte costs no more memory and time than the limit."""
    bomb = zlib.compressobj(wbits=31)
    body = b"".join(bomb.compress(bytes(2**20)) for _ in range(256)) + bomb.flush()
    tracemalloc.start()
    assert refused(body) == 413
    assert tracemalloc.get_traced_memory()[1] < 10 * LIMIT
    tracemalloc.stop()


def test_v1_opens_deflate_in_both_forms() -> None:
    """With and without zlib's header, and gzip; what is broken is told as such."""
    raw = zlib.compressobj(wbits=-15)
    assert inflate_v1(raw.compress(TEXT) + raw.flush(), "deflate", LIMIT) == TEXT
    assert inflate_v1(zlib.compress(TEXT), "deflate", LIMIT) == TEXT
    assert inflate_v1(ZIPPED, "gzip", LIMIT) == TEXT
    assert inflate_v1(TEXT, "gzip", LIMIT) is None
    assert inflate_v1(zlib.compress(TEXT)[:-1], "deflate", LIMIT) is None


@given(
    st.binary(max_size=100) | st.text("dat_=&%2+ABCD/", max_size=100).map(str.encode),
    st.sampled_from(["", "compression=lz64", "compression=gzip", "compression=b64", "data=%", "data=YQ=="]),
    st.sampled_from(["", FORM, "application/json"]),
    st.sampled_from(["/e/", "/batch"]),
)
def test_nothing_raises(body: bytes, query: str, kind: str, path: str) -> None:
    """Whatever a client sends, it is text or a refusal."""
    assert isinstance(opened(body, path, query, content_type=kind), bytes | Answer)
