"""Takes the JSON text out of a request: from its body, form or query, whatever it is packed in.

As PostHog does (`rust/capture/src/payload/`, `utils.rs`), in bounded memory. Of a gzip stream only the first
member is read, as there. More lenient than PostHog: base64 is also opened in a query, where a hint says so,
and around the gzip of a form.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import NamedTuple

from agent.decode.form import fields_of
from agent.decode.lz64 import open_lz64
from agent.decode.request import Answer, Request
from agent.pack import GZIP, RAW, ZLIB, open_stream

LEGACY = ("/e", "/track", "/capture", "/engage")  # are looked at for base64 once more: `v0_request.rs`
FORM = "application/x-www-form-urlencoded"
# What is not a value of these is text to PostHog, and these are never text: `utils.rs`.
UNREADABLE = ("br", "deflate", "zstd")
_ENCODINGS = {
    "gzip": "gzip",
    "gzip-js": "gzip",
    "lz64": "lz64",
    "lz-string": "lz64",
    "base64": "base64",
    "b64": "base64",
}
_GZIP_MAGIC = b"\x1f\x8b\x08"

BASE64_SAMPLE = 128  # bytes looked at before anything is taken for base64 or a form: `utils.rs`
_BASE64 = re.compile(rb"[A-Za-z0-9+/=]+")
_LOOSE_BASE64 = re.compile(rb"[A-Za-z0-9+/= ]+")
_FORM_FIELD = re.compile(rb"(?:^|&)(?:data|_|ip|compression)=")
# lz64 is opened at 2 MB/s and only came from browsers, a few events at a time.
LZ64_BYTES = 1024 * 1024


class Unpacked(NamedTuple):
    """The JSON text of a request, and the fields of its query."""

    text: bytes
    query: Mapping[str, bytes]


def unpack(request: Request) -> Unpacked | Answer:
    """The text of a request of the v0 family."""
    query = fields_of(request.query.encode("latin-1", "replace"))  # as the bytes came
    if query is None:
        return _undecodable(b"invalid query string")
    found = _find(request, query)
    if isinstance(found, Answer):
        return found
    packed, encoding = found
    text = _open(packed, encoding, request.limit)
    if isinstance(text, Answer):
        return text
    if len(text) <= request.limit and request.path.removesuffix("/") in LEGACY:
        text = _unwrap(text)
    return too_big(request.limit) if len(text) > request.limit else Unpacked(text, query)


def too_big(limit: int) -> Answer:
    """A body that unpacks to more than `limit` bytes."""
    text = b"maximum event size exceeded: Decompressed payload would exceed %d bytes" % limit
    return Answer(413, text, reason="too_large", events=1)


def _undecodable(why: bytes) -> Answer:
    return Answer(400, b"failed to decode request: " + why, events=1)


def _find(request: Request, query: Mapping[str, bytes]) -> tuple[bytes, str] | Answer:
    """The bytes that hold the events, and how they are encoded: `payload/common.rs`."""
    hints = [_hint(query)]
    packed = request.body
    if data := query.get("data"):
        packed = _restored(data)
    if not packed:
        return Answer(400, b"request missing data payload")
    if _FORM_FIELD.search(packed[:BASE64_SAMPLE]) is None:
        packed = _unwrap(packed)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == FORM and not data:
        if _FORM_FIELD.search(packed[:BASE64_SAMPLE]) is None:
            return _undecodable(b"expected form data in POST request payload")
        form = fields_of(packed)
        if form is None:
            return _undecodable(b"invalid urlencoded form data")
        hints.append(_hint(form))
        if "data" in form:
            packed = _restored(form["data"])
    hints.append(request.headers.get("content-encoding", "").lower())
    return packed, next((hint for hint in hints if hint in _ENCODINGS or hint in UNREADABLE), "")


def _hint(fields: Mapping[str, bytes]) -> str:
    return fields.get("compression", b"").decode().lower()


def _restored(data: bytes) -> bytes:
    """The value of a field; in base64 a plus sign was taken for a space."""
    if b" " in data and len(data) % 4 == 0 and _LOOSE_BASE64.fullmatch(data[:BASE64_SAMPLE]):
        return data.replace(b" ", b"+")
    return data


def _open(packed: bytes, hint: str, limit: int) -> bytes | Answer:
    """Unpacked, to a little over `limit` at most: `payload/decompression.rs`."""
    encoding = _ENCODINGS.get(hint, hint)
    if encoding == "gzip" and not packed.startswith(_GZIP_MAGIC):
        packed = _unwrap(packed)  # as a form holds it
    if encoding == "gzip" or packed.startswith(_GZIP_MAGIC):
        opened = open_stream(packed, GZIP, limit)
        return opened if opened is not None else _undecodable(b"invalid GZIP data")
    if encoding == "lz64":
        if len(packed) > LZ64_BYTES:
            text = b"maximum event size exceeded: lz64 of more than %d bytes" % LZ64_BYTES
            return Answer(413, text, reason="too_large", events=1)
        opened = open_lz64(packed, limit)
        return opened if opened is not None else _undecodable(b"decompress_lz64: failed decompress to UTF16")
    if encoding in UNREADABLE:
        return _undecodable(b"invalid UTF8 in request payload")
    return _unwrap(packed) if encoding == "base64" else packed


def inflate_v1(packed: bytes, encoding: str, limit: int) -> bytes | None:
    """`gzip`, or `deflate` in either of its forms: `v1/util.rs`."""
    if encoding == "gzip":
        return open_stream(packed, GZIP, limit)
    return open_stream(packed, ZLIB if packed[:1] == b"\x78" else RAW, limit)


def _unwrap(data: bytes) -> bytes:
    """What is in base64, if it looks like that; else as it is."""
    if len(data) % 4 or _BASE64.fullmatch(data[:BASE64_SAMPLE]) is None:
        return data
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        return data
