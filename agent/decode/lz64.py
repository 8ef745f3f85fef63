"""Opens lz-string's base64 form, which older releases of PostHog's JS SDK send.

lz-string is LZ78 on UTF-16 units: each code names a piece of text met before, or says that a new unit of 8
or 16 bits follows. Codes grow by a bit whenever the pieces outgrow them; their bits come lowest first, six to
a character, the highest of a character first.
"""

import re

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_TEXT = re.compile(rb"[A-Za-z0-9+/]*={0,3}")
_BITS = {value: format(place, "06b") for place, value in enumerate(_ALPHABET)}

_UNIT_8, _UNIT_16, _END = 0, 1, 2  # the codes that name no piece
_FIRST_PIECE = 3


def open_lz64(text: bytes, most: int) -> bytes | None:
    """The UTF-8 text in it, or not much more than `most` bytes of a longer one; None where it is no such."""
    text = text.replace(b" ", b"+")  # a form's or a query's reader has made spaces of them
    if not text or _TEXT.fullmatch(text) is None:
        return None
    # All bits in one string, the last first: a code is then one slice that `int` reads.
    bits = "".join(map(_BITS.__getitem__, text.rstrip(b"=")))[::-1]
    units = _pieces(bits, most)
    if units is None:
        return None
    try:
        # Two units may be one character.
        return units.encode("utf-16-le", "surrogatepass").decode("utf-16-le").encode()
    except UnicodeError:
        return None


def _pieces(bits: str, most: int) -> str | None:
    """The text, one character for each UTF-16 unit; cut soon after `most`."""
    pieces = [""] * _FIRST_PIECE
    end, last, size = len(bits), "", 0
    found: list[str] = []
    while end >= (width := len(pieces).bit_length()):
        code = int(bits[end - width : end], 2)
        end -= width
        if code == _END:
            break
        if code <= _UNIT_16:
            wide = 16 if code else 8
            if end < wide:
                return None
            piece = chr(int(bits[end - wide : end], 2))
            end -= wide
            pieces.append(piece)
        elif code < len(pieces):
            piece = pieces[code]
        elif code == len(pieces) and last:
            piece = last + last[0]
        else:
            return None
        found.append(piece)
        size += len(piece)
        if size > most:
            break
        if last:
            pieces.append(last + piece[0])
        last = piece
    else:
        return None
    return "".join(found)
