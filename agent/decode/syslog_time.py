"""The times that syslog lines tell, as RFC 3339: which year is meant, which zone, and which of two hours."""

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta, tzinfo
from typing import NamedTuple

# Zone words that devices write behind a time, as offsets in minutes (tz database). Where several places use a
# word, the one with the most hosts: BST is Britain's, CST and PST are America's, IST is India's and neither
# Ireland's nor Israel's. AST, GST, NST and SST are not here: nobody can say whose they are.
ZONES = {
    "Z": 0, "UTC": 0, "GMT": 0, "BST": 60, "WET": 0, "WEST": 60, "CET": 60, "CEST": 120,
    "MET": 60, "MEST": 120, "EET": 120, "EEST": 180, "MSK": 180, "IDT": 180,
    "WAT": 60, "CAT": 120, "SAST": 120, "EAT": 180,
    "PKT": 300, "IST": 330, "WIB": 420, "WITA": 480, "WIT": 540, "HKT": 480,
    "SGT": 480, "JST": 540, "KST": 540,
    "AWST": 480, "ACST": 570, "ACDT": 630, "AEST": 600, "AEDT": 660, "NZST": 720, "NZDT": 780,
    "ART": -180, "BRT": -180, "EST": -300, "EDT": -240, "CST": -360, "CDT": -300, "MST": -420, "MDT": -360,
    "PST": -480, "PDT": -420, "AKST": -540, "AKDT": -480, "HST": -600, "HDT": -540,
}  # fmt: skip
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_MONTH = {name: number for number, name in enumerate(_MONTHS, 1)}
_CLOCK = r"([0-9]{2}):([0-9]{2}):([0-9]{2})"
_ISO = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]" + _CLOCK)
_BSD = re.compile(
    r"(?:([0-9]{4}) )?([A-Za-z]{3}) {1,2}([0-9]{1,2})(?: ([0-9]{4}))? " + _CLOCK + "(?: ([0-9]{4}))?"
)
_OFFSET = re.compile(r"([+-])([01][0-9]|2[0-3])(?::?([0-5][0-9]))?")

_MICROSECONDS_A_MINUTE = 60_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# From one leap day to the next can be eight years (1896 to 1904).
_LEAP_YEARS = 8
# How far a clock may be ahead of ours: what Kerberos allows by default (clockskew in krb5.conf).
_CLOCK_AHEAD = timedelta(minutes=5)
# The same for a day without a year, as the line's zone may be any: the farthest are UTC-12 and UTC+14.
_DAY_AHEAD = timedelta(hours=26) + _CLOCK_AHEAD
# Seconds that are remembered: more than a minute's lines of a host tell, in half a MiB.
_REMEMBERED = 1024


class Moment(NamedTuple):
    """One second: as the line tells it, its offset, both together, and in UTC ("" outside 1970 to 9999)."""

    local: str
    offset: str
    text: str
    utc: str


class Times:
    """Reads the times of lines that are received at a moment, in a zone where they name none.

    Lines come late, not early. Of the readings that a time has, of a year or of an hour that is there twice,
    it is the latest that is not later than the receipt.
    """

    def __init__(self, zone: tzinfo) -> None:
        self._zone = zone
        self._minute: int | None = None
        self._received = _EPOCH
        self._here = _EPOCH.replace(tzinfo=None)
        self._known: dict[tuple[str, str], Moment | None] = {}

    def receive(self, wall: int) -> None:
        """The lines that follow were received then (µs); what it decides is decided once a minute."""
        minute = wall // _MICROSECONDS_A_MINUTE
        if minute != self._minute:
            self._minute = minute
            self._received = _EPOCH + timedelta(minutes=minute)
            self._here = self._received.astimezone(self._zone).replace(tzinfo=None)
            self._known.clear()

    def told(self, second: str, fraction: str | None, zone: str) -> tuple[str, str | None] | None:
        """A line's time in its own zone, and in UTC if it is finer than a second; None where it is no time.

        `second` is a date and a time of day, `zone` an offset, one of `ZONES` in any case, or "".
        """
        key = (second, zone)
        try:
            moment = self._known[key]
        except KeyError:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            moment = self._known[key] = self._read(second, zone)
        if moment is None:
            return None
        if not fraction:
            return moment.text, None
        digits = fraction[:6]
        stamp = f"{moment.utc}.{digits}Z" if moment.utc else None
        return f"{moment.local}.{digits}{moment.offset}", stamp

    def _read(self, text: str, zone: str) -> Moment | None:
        try:
            if (found := _ISO.fullmatch(text)) is not None:
                year, month, day, *clock = map(int, found.groups())
                local = datetime(year, month, day)  # noqa: DTZ001  # a zone is given below
            elif (found := _BSD.fullmatch(text)) is not None:
                before, name, date, between, *digits, behind = found.groups()
                clock = [int(number) for number in digits]
                years = [year for year in (before, between, behind) if year]
                if len(years) > 1:
                    return None
                month, day = _MONTH.get(name.capitalize(), 0), int(date)
                local = datetime(int(years[0]), month, day) if years else self._dated(month, day)  # noqa: DTZ001
            else:
                return None
            hour, minute, second = clock
            # A leap second (RFC 5424 forbids it, devices write it) is told as the last that others know.
            local = local.replace(hour=hour, minute=minute, second=59 if second == 60 else second)
        except ValueError:
            return None
        return self._placed(local, zone)

    def _dated(self, month: int, day: int) -> datetime:
        """A date without a year: the latest that there is, but for clocks that are ahead."""
        latest = self._here + _DAY_AHEAD
        for year in range(latest.year, latest.year - _LEAP_YEARS - 1, -1):
            with suppress(ValueError):
                date = datetime(year, month, day)  # noqa: DTZ001
                if date <= latest:
                    return date
        raise ValueError(f"no year has the day {day} of the month {month}")

    def _placed(self, local: datetime, zone: str) -> Moment | None:
        """A local time with its offset and in UTC."""
        offset = self._offset(local, zone)
        if offset is None:
            return None
        told = local.isoformat(timespec="seconds")
        minutes = round(offset.total_seconds() / 60)
        sign = "-" if minutes < 0 else "+"
        suffix = f"{sign}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}" if minutes else "Z"
        try:
            utc = local.replace(tzinfo=UTC) - offset
        except OverflowError:
            utc = datetime.min.replace(tzinfo=UTC)
        known = utc >= _EPOCH
        return Moment(told, suffix, told + suffix, utc.isoformat(timespec="seconds")[:-6] if known else "")

    def _offset(self, local: datetime, zone: str) -> timedelta | None:
        """How far ahead of UTC a local time is; None where the zone's text is none."""
        if zone.upper() in ZONES:
            return timedelta(minutes=ZONES[zone.upper()])
        if zone:
            found = _OFFSET.fullmatch(zone)
            if found is None:
                return None
            offset = timedelta(hours=int(found[2]), minutes=int(found[3] or 0))
            return -offset if found[1] == "-" else offset
        first = self._zone.utcoffset(local) or timedelta()
        second = self._zone.utcoffset(local.replace(fold=1)) or timedelta()
        # An hour that is there twice: the second time, unless that is still to come.
        if first > second and local.replace(tzinfo=UTC) - second <= self._received + _CLOCK_AHEAD:
            return second
        return first
