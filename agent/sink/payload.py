"""The bytes of a request to the JSON text in them, as PostHog reads them.

As `rust/capture/src/payload/` and `utils.rs` do, with three differences, on purpose or for want of need: lz64
is answered 400; bytes after the first gzip member are a 400, where PostHog ignores them; and so is a request
with neither a body nor `data`.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Iterable, Mapping
from urllib.parse import parse_qsl

from msgspec import Struct

LEGACY = ("/e", "/track", "/capture", "/engage")  # unwrap base64 once more: `v0_request.rs`
WIRE_LIMIT = 20 * 1024 * 1024  # `setup.rs`; what exceeds twice that is not even read: the client sees a reset
PAYLOAD_LIMIT = 5 * WIRE_LIMIT  # after decompression: `setup.rs`
BASE64_SAMPLE = 128  # bytes looked at before a body is taken for base64: `utils.rs`
FORM = "application/x-www-form-urlencoded"
_BASE64 = re.compile(rb"[A-Za-z0-9+/=]+")
_LOOSE_BASE64 = re.compile(rb"[A-Za-z0-9+/= ]+")
_FORM_FIELD = re.compile(rb"(?:^|&)(?:data|_|ip|compression)=")
_ENCODINGS = {
    "gzip": "gzip",
    "gzip-js": "gzip",
    "lz64": "lz64",
    "lz-string": "lz64",
    "base64": "base64",
    "b64": "base64",
}


class Request(Struct, frozen=True, kw_only=True):
    """One request as it came; header names are in small letters."""

    number: int
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes


class Reply(Struct, frozen=True):
    """What is sent back."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


class Refusal(Exception):
    """A request is refused; the text is that of `api.rs`."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.reply = Reply(status, text.encode())


def at_path(path: str, paths: Iterable[str]) -> bool:
    """Whether it is one of these, with or without a slash at its end."""
    return path.removesuffix("/") in paths


def _pairs(text: str) -> dict[str, str]:
    """The fields of a query or form; a field given twice is refused, as serde does."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True)
    except ValueError:
        raise Refusal(400, "failed to decode request: invalid urlencoded form data") from None
    fields = dict(pairs)
    if any(sum(name == given for given, _ in pairs) > 1 for name in ("data", "compression", "_", "beacon")):
        raise Refusal(400, "failed to decode request: a field is given twice")
    return fields


def read_query(text: str) -> dict[str, str]:
    """The fields of the query; those that are numbers are numbers."""
    query = _pairs(text)
    for name in ("_", "sent_at", "beacon"):
        if name in query and re.fullmatch(r"[+-]?\d+", query[name], re.ASCII) is None:
            raise Refusal(400, f"Failed to deserialize query string: {name}: invalid digit found in string")
    return query


def _find_payload(request: Request, query: Mapping[str, str]) -> tuple[bytes, str]:
    """The bytes that hold the events and how they are encoded: `payload/common.rs`."""
    payload = query.get("data", "").encode(errors="surrogateescape") or request.body
    if not payload:
        raise Refusal(400, "request missing data payload")
    if _FORM_FIELD.search(payload[:BASE64_SAMPLE]) is None:
        payload = _unwrap(payload)
    form: dict[str, str] = {}
    if request.headers.get("content-type") == FORM:
        if _FORM_FIELD.search(payload[:BASE64_SAMPLE]) is None:
            raise Refusal(400, "failed to decode request: expected form data in POST request payload")
        form = _pairs(payload.decode(errors="surrogateescape"))
    if "data" in form:
        payload = form["data"].encode(errors="surrogateescape")
        if _LOOSE_BASE64.fullmatch(payload[:BASE64_SAMPLE]) and len(payload) % 4 == 0:
            payload = payload.replace(b" ", b"+")  # a plus sign in a form stands for a space
    hints = [query.get("compression", "").lower(), form.get("compression", "").lower()]
    hints.append(request.headers.get("content-encoding", ""))
    return payload, next((_ENCODINGS[hint] for hint in hints if hint in _ENCODINGS), "")


def _unwrap(payload: bytes) -> bytes:
    """The payload out of its base64, if it looks like that; else as it is."""
    if len(payload) % 4 or _BASE64.fullmatch(payload[:BASE64_SAMPLE]) is None:
        return payload
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error:
        return payload


def read_payload(request: Request, query: Mapping[str, str]) -> bytes:
    """The JSON text of a request: `payload/decompression.rs`."""
    payload, encoding = _find_payload(request, query)
    if encoding == "gzip" or payload.startswith(b"\x1f\x8b\x08"):
        payload = _gunzip(payload)
    elif encoding == "lz64":
        raise Refusal(400, "failed to decode request: lz64 is not read by this stand-in")
    if len(payload) > PAYLOAD_LIMIT:
        raise Refusal(413, f"maximum event size exceeded: payload would exceed {PAYLOAD_LIMIT} bytes")
    if at_path(request.path, LEGACY):
        payload = _unwrap(payload)
    return payload


def _gunzip(payload: bytes) -> bytes:
    """The first member of a gzip stream, to one byte over the limit; nothing may follow it."""
    opener = zlib.decompressobj(wbits=31)
    try:
        opened = opener.decompress(payload, PAYLOAD_LIMIT + 1)
    except zlib.error:
        raise Refusal(400, "failed to decode request: invalid GZIP data") from None
    if len(opened) <= PAYLOAD_LIMIT and not opener.eof:
        raise Refusal(400, "failed to decode request: invalid GZIP data")
    if opener.unused_data:
        raise Refusal(400, "failed to decode request: invalid GZIP data: bytes after the first member")
    return opened
