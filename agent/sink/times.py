"""When an event happened, by the server's clock: `rust/common/types/src/timestamp.rs`.

Of the looser timestamps only ISO 8601, RFC 2822 and epoch numbers are read.
"""

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

FUTURE = timedelta(hours=23)  # `rust/common/types/src/timestamp.rs`
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SENT_AT_YEAR = 2020  # a `_` up to then was in seconds and is ignored: `payload/types.rs`
_EPOCH_UNITS = {10: 1, 13: 10**3, 16: 10**6, 19: 10**9}  # digits of an epoch number: its units in a second


def milliseconds(text: str | None) -> datetime | None:
    """A number of milliseconds as an instant; None for what PostHog would ignore."""
    try:
        found = EPOCH + timedelta(milliseconds=int(text)) if text is not None else None
    except (OverflowError, ValueError):
        return None
    return found if found is not None and found.year > SENT_AT_YEAR else None


def zoned(text: str | None) -> datetime | None:
    """An ISO 8601 instant; None for anything else, a time without zone too."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def final_timestamp(
    given: str | None,
    offset: int | None,
    sent_at: datetime | None,
    now: datetime,
    *,
    ignore_sent_at: bool = False,
) -> datetime:
    """When an event happened, by the server's clock: `rust/common/types/src/timestamp.rs`."""
    try:
        found = _instant(given) if given is not None else None
        if offset is not None:
            found = now - timedelta(milliseconds=offset)
        elif found is not None and sent_at is not None and not ignore_sent_at:
            found -= sent_at - now
        found = (found or now).astimezone(UTC)
    except OverflowError:
        return EPOCH
    return now if found - now > FUTURE else found


def _instant(text: str) -> datetime | None:
    """A time in one of the forms that are read; without a zone it is UTC."""
    try:
        if text.isdecimal():
            return EPOCH + timedelta(seconds=int(text) / _EPOCH_UNITS[len(text)])
        found = datetime.fromisoformat(text)
    except KeyError:
        return None
    except ValueError:
        try:
            found = parsedate_to_datetime(text)
        except (ValueError, TypeError, IndexError):  # the last two are bugs of the library
            return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
