"""Reads the fields of a form or query, in time and memory that depend on its length alone.

The fields are those of `urllib.parse.parse_qsl`, whose answer to a percent sign at every third byte takes
seconds and 80 times the body. What is no UTF-8 becomes U+FFFD, as PostHog has it.
"""

import binascii
import codecs
from io import BytesIO

# Fields of a form or query that are looked at: SDKs send five.
MOST_FIELDS = 100
# What is unescaped at a time: it takes some eight times as much for a moment.
SLICE_BYTES = 64 * 1024

_HEX = b"0123456789ABCDEFabcdef"
# A digit of an escape as `h`, all else but the percent sign as `.`; and an escape's sign `E` as that which
# makes it an equals sign, all else as nothing.
_KINDS = bytes(ord("h") if byte in _HEX else byte if byte == ord("%") else ord(".") for byte in range(256))
_SIGNS = bytes(ord("%") ^ ord("=") if byte == ord("E") else 0 for byte in range(256))


def fields_of(form: bytes) -> dict[str, bytes] | None:
    """Each field's value, the last one of a name that is there twice; None where there are too many."""
    if form.count(b"&") >= MOST_FIELDS:
        return None
    found: dict[str, bytes] = {}
    for field in form.split(b"&"):
        if field:
            name, _, value = field.partition(b"=")
            found[_restored(name).decode()] = _restored(value)
    return found


def _restored(escaped: bytes) -> bytes:
    """A name or value as it was before it was escaped, in UTF-8."""
    whole = BytesIO()
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    start = 0
    while start < len(escaped):
        end = min(start + SLICE_BYTES, len(escaped))
        if end < len(escaped) and (cut := escaped.rfind(b"%", end - 2, end)) >= 0:
            end = cut  # no escape in halves
        whole.write(decode(_unescaped(escaped[start:end])).encode())
        start = end
    whole.write(decode(b"", final=True).encode())
    return whole.getvalue()


def _unescaped(part: bytes) -> bytes:
    """Each percent sign before two hexadecimal digits becomes the byte that they are, other signs stay.

    Quoted-printable is the same with another sign and is read in C, as long as nothing but escapes has that.
    """
    part = part.replace(b"+", b" ")
    if b"%" not in part:
        return part
    part = part.replace(b"=", b"%3D")
    signs = part.translate(_KINDS).replace(b"%hh", b"Ehh").translate(_SIGNS)
    quoted = int.from_bytes(part, "little") ^ int.from_bytes(signs, "little")
    return binascii.a2b_qp(quoted.to_bytes(len(part), "little"))
