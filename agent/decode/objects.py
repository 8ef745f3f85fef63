"""Decodes JSON lines, one object an event: all of them at once where all are well, else one by one."""

import secrets
from collections.abc import Sequence
from typing import Annotated

import msgspec

from agent.decode.lines import Lines
from agent.decode.ndjson import count_byte
from agent.envelope import DECODE_ERRORS, Envelope, Flaws, examine, too_deep
from agent.events import Read, Reject, sample

# Brackets that a chunk may have beside two an event before its lines are looked at for nesting one by one.
SPARE_BRACKETS = 120

# A number of 19 digits that no client knows, told to nobody: what stands between two lines, see `_open`.
_NONCE = 2**62 + secrets.randbits(62)
_SEAL = b",%d],\n[" % _NONCE
_Sealed = tuple[Envelope, Annotated[int, msgspec.Meta(ge=_NONCE, le=_NONCE)]]

_rows = msgspec.json.Decoder(list[_Sealed]).decode


class Json:
    """The format `json`. No line is larger than `max_event` bytes."""

    def __init__(self, max_event: int) -> None:
        self._max_event = max_event

    def decode(self, reads: Sequence[Read], flaws: Flaws) -> Lines:
        """See `Format.decode`."""
        opened, lines = _open(reads)
        envelopes = decode_rows(opened, sum(lines)) if self._fit(reads) else None
        if envelopes is not None:
            return Lines(lines, None, envelopes, [], opened)
        return self._decode_singly(reads, flaws)._replace(text=opened)

    def _fit(self, reads: Sequence[Read]) -> bool:
        """Whether no line is too long; most reads are shorter than one line may be."""
        longest = self._max_event
        return all(
            len(read.lines) <= longest or max(map(len, read.lines.split(b"\n"))) <= longest for read in reads
        )

    def _decode_singly(self, reads: Sequence[Read], flaws: Flaws) -> Lines:
        """Line by line, so that only the culprits are refused."""
        lines: list[int] = []
        places: list[tuple[int, int]] = []
        envelopes: list[Envelope] = []
        rejects: list[Reject] = []
        for number, read in enumerate(reads):
            count = 0
            for line in read.lines.split(b"\n"):
                if not (line := line.strip()):
                    continue
                examined = examine(line, self._max_event, flaws)
                if isinstance(examined, str):
                    rejects.append(Reject(number, count, examined, sample(line)))
                else:
                    places.append((number, count))
                    envelopes.append(examined)
                count += 1
            lines.append(count)
        return Lines(lines, places, envelopes, rejects)


def sealed(lines: Sequence[bytes]) -> bytes:
    """Lines as `decode_rows` takes them."""
    return b"".join((b"[[", (_SEAL.join(lines) + _SEAL)[:-3], b"]")) if lines else b"[]"


def _open(reads: Sequence[Read]) -> tuple[bytes, list[int]]:
    """All lines as one JSON array of rows, a line and the nonce each, and how many lines each read has.

    A row's end can be swallowed by a line that opens an array, and forged by one that closes the row's own
    bracket; but a line that does not know the nonce cannot do both, so the count of rows tells.
    """
    parts = [read.lines.replace(b"\n", _SEAL) for read in reads]
    lines = [
        (len(part) - len(read.lines)) // (len(_SEAL) - 1) for part, read in zip(parts, reads, strict=True)
    ]
    blob = b"".join(parts)
    return (b"".join((b"[[", blob[:-3], b"]")) if blob else b"[]"), lines


def decode_rows(opened: bytes, count: int) -> list[Envelope] | None:
    """All events of `count` opened lines at once; None where one of them needs a closer look."""
    if not _is_utf8(opened):
        return None
    # Of every line's brackets, `_open` wrote one, and an event with its properties has two.
    spare = count_byte(opened, b"{") + count_byte(opened, b"[") - 3 * count
    if spare > SPARE_BRACKETS and any(map(too_deep, opened.split(b"\n"))):
        return None
    try:
        rows = _rows(opened)
    except DECODE_ERRORS:
        return None
    # Every row ends with a seal, so where there are as many, no line shares one with its neighbour.
    return [envelope for envelope, _ in rows] if len(rows) == count else None


def _is_utf8(blob: bytes) -> bool:
    """Whether all of it is UTF-8, also where the decoder does not look."""
    if blob.isascii():
        return True
    try:
        blob.decode()
    except UnicodeDecodeError:
        return False
    return True
