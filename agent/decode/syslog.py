"""Decodes syslog, many lines at a time: each becomes an event, whatever it looks like."""

import re
from collections.abc import Iterable, Sequence
from datetime import tzinfo
from operator import attrgetter

import msgspec
from msgspec import Raw

from agent.decode.lines import Lines
from agent.decode.syslog_event import OPENERS, embedded
from agent.decode.syslog_line import parse
from agent.decode.syslog_time import Times
from agent.decode.syslog_words import Parsed, Properties
from agent.envelope import LONGEST, Envelope, Flaws
from agent.events import Read, Reject, sample

# The event of a line whose template comes to nothing.
EVENT = "syslog"

# What may stand behind a line: CRLF, or the NUL of a sender in C. Framing writes a newline within one as NUL.
_ENDS = b"\r\0"
_BLANK = b" \t\v\f" + _ENDS
_FIELD = re.compile(r"\{(app|severity|hostname)\}")

_encode_lines = msgspec.json.Encoder().encode_lines

# An event's name, its distinct id, and whether one of them was cut.
_Named = tuple[str, str, bool]


class Syslog:
    """One source's decoder: lines to envelopes, none of which has properties but the line's own.

    `event` and `distinct_id` are templates with `{app}`, `{severity}` and `{hostname}`. `hostname` is this
    host's name, `zone` the one in which lines tell their time if they name none.
    """

    def __init__(self, *, event: str, distinct_id: str, hostname: str, zone: tzinfo, max_event: int) -> None:
        self._event = event
        self._distinct_id = distinct_id
        self._hostname = hostname
        self._max_event = max_event
        self._times = Times(zone)
        # What decides a line's names; where the templates hold no field, any is as good.
        self._fields = attrgetter(*sorted(set(_FIELD.findall(event + distinct_id))) or ["hostname"])

    def decode(self, reads: Sequence[Read], flaws: Flaws) -> Lines:
        """An envelope for each line that is not empty, a reject for each that is too large."""
        counts: list[int] = []
        rejects: list[Reject] = []
        parsed: list[Parsed] = []
        for number, read in enumerate(reads):
            lines = [line for line in read.lines.split(b"\n") if line.strip(_BLANK)]
            counts.append(len(lines))
            if len(read.lines) > self._max_event:
                lines = self._fitting(number, lines, rejects)
            self._times.receive(read.at.wall)
            parsed += [parse(line, self._times) for line in _texts(lines)]
        envelopes, own = self._envelopes(parsed, flaws)
        return Lines(
            lines=counts,
            places=_places(counts, rejects) if rejects else None,
            envelopes=envelopes,
            rejects=rejects,
            own=own,
        )

    def _fitting(self, read: int, lines: Sequence[bytes], rejects: list[Reject]) -> list[bytes]:
        """The lines that are not too large; the others are added to the rejects."""
        fitting = []
        for number, line in enumerate(lines):
            if len(line) <= self._max_event or len(line.rstrip(_ENDS)) <= self._max_event:
                fitting.append(line)
            else:
                rejects.append(Reject(read, number, "too_large", sample(line)))
        return fitting

    def _envelopes(self, parsed: Sequence[Parsed], flaws: Flaws) -> tuple[list[Envelope], list[bool] | None]:
        """What the lines say as envelopes; a line whose message is a JSON event becomes that event.

        And which of them did, None where none.
        """
        sealed = _encode_lines([said for said, _ in parsed]).split(b"\n")
        named: dict[object, _Named] = {}
        envelopes: list[Envelope] = []
        own: list[int] = []
        for (said, stamp), raw in zip(parsed, sealed, strict=False):  # a newline ends the last
            fields = self._fields(said)
            if (known := named.get(fields)) is None:
                known = named[fields] = self._named(said)
            event, who, cut = known
            envelope = None
            if said.message[:1] in OPENERS:
                envelope = embedded(said.message, who, self._max_event, flaws)
            if envelope is None:
                envelope = Envelope(event, who, None, stamp, Raw(raw))
                if cut:
                    flaws.truncated += 1
            else:
                own.append(len(envelopes))
            envelopes.append(envelope)
        if not own:
            return envelopes, None
        known_own = set(own)
        return envelopes, [at in known_own for at in range(len(envelopes))]

    def _named(self, said: Properties) -> _Named:
        """The name and the distinct id of events from lines that say this."""
        values = {
            "app": said.app or "",
            "severity": said.severity or "",
            "hostname": said.hostname or self._hostname,
        }
        event, who = (
            _FIELD.sub(lambda field: values[field[1]], template)
            for template in (self._event, self._distinct_id)
        )
        event, who = event if event.strip() else EVENT, who if who.strip() else self._hostname
        return event[:LONGEST], who[:LONGEST], len(event) > LONGEST or len(who) > LONGEST


def _texts(lines: Sequence[bytes]) -> Iterable[str]:
    """Lines as text: UTF-8, and Latin-1 where one is not."""
    joined = b"\n".join(lines)
    try:
        texts = joined.decode().split("\n") if lines else []
    except UnicodeDecodeError:
        texts = [_text(line) for line in lines]
    if b"\r" in joined or b"\0" in joined:
        return [text.rstrip("\r\0").replace("\0", "\n") for text in texts]
    return texts


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _places(counts: Sequence[int], rejects: Sequence[Reject]) -> list[tuple[int, int]]:
    """Read and line of each line that is an event."""
    refused = {(reject.read, reject.line) for reject in rejects}
    places = [(read, line) for read, count in enumerate(counts) for line in range(count)]
    return [place for place in places if place not in refused]
