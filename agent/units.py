"""Sizes, durations, ages and times as people write them: `5 MiB`, `250 ms`, `2026-11-24T10:00:00.000Z`."""

import re
from datetime import UTC, datetime

_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_SIZES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_DURATIONS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes; ValueError says what is wrong."""
    number, unit = _parts(text, _SIZES, "900 KiB", "B")
    return round(number * _SIZES[unit])


def parse_duration(text: str) -> float:
    """Seconds; ValueError says what is wrong."""
    number, unit = _parts(text, _DURATIONS, "250 ms", "s")
    # Milliseconds are divided: 0.1 s is 100 ms / 1000 exactly as it is written, not 100 * 0.001.
    return number / 1000 if unit == "ms" else number * _DURATIONS[unit]


def _parts(text: str, units: dict[str, float] | dict[str, int], example: str, base: str) -> tuple[float, str]:
    written = _WRITTEN.fullmatch(text)
    known = {unit.lower(): unit for unit in units}
    if written is None:
        raise ValueError(f'{text!r} is not a number with a unit, such as "{example}"')
    number, unit = float(written[1]), written[2]
    if not unit and number == 0:
        return number, base
    if unit.lower() not in known:
        raise ValueError(f'{text!r} needs a unit ({", ".join(units)}), such as "{example}"')
    return number, known[unit.lower()]


def format_size(size: int) -> str:
    """A size as `parse_size` reads it, exactly."""
    for unit, factor in reversed(_SIZES.items()):
        if size and size % factor == 0:
            return f"{size // factor} {unit}"
    return "0 B"


def format_duration(seconds: float) -> str:
    """A duration as `parse_duration` reads it, to the millisecond."""
    milliseconds = round(seconds * 1000)
    if milliseconds % 1000:
        return f"{milliseconds} ms"
    whole = milliseconds // 1000
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole and whole % factor == 0:
            return f"{whole // factor} {unit}"
    return f"{whole} s"


def format_time(wall: int) -> str:
    """A time in microseconds as people and scripts read it: RFC 3339, UTC, to the millisecond."""
    return datetime.fromtimestamp(wall / 1_000_000, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def format_age(seconds: float) -> str:
    """A length of time for people: its one or two largest units."""
    whole = int(seconds)
    for unit, factor, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= factor:
            return f"{whole // factor} {unit} {whole % factor // part} {smaller}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
