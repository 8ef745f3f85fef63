"""Whether the kernel keeps enough datagrams while the agent is busy: its limits against what comes in."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.config import Config, Udp, UnixDatagram
from agent.doctor.finding import Finding, amount, ok, warning

BUFFER, BUFFER_LIMIT = "rmem_max", "/proc/sys/net/core/rmem_max"
QUEUE, QUEUE_LIMIT = "max_dgram_qlen", "/proc/sys/net/unix/max_dgram_qlen"

# What a datagram of 343 bytes takes of a receive buffer, as measured: 32 MiB hold some 26,000.
DATAGRAM_BYTES = 1290
# What must fit: a commit on a slow disk, and then some.
PAUSE_SECONDS = 1.0
# A Unix datagram is read as soon as it is there, but the loop may be busy with others for so long.
BUSY_SECONDS = 0.02
# What systemd sets at boot (src/core/main.c); the kernel's own default is 10.
GOOD_QUEUE = 512


def limit(path: str) -> int | None:
    """A limit of the kernel's; None where it does not tell."""
    try:
        return int(Path(path).read_text("ascii"))
    except (OSError, ValueError):
        return None


def look(
    config: Config,
    rmem_max: int | None,
    queue: int | None,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
) -> Iterator[Finding]:
    """`before` and `after` are two looks at the running agent's status, where one runs."""
    seconds = after["uptime_seconds"] - before["uptime_seconds"] if before and after else 0.0
    earlier, later = _sources(before), _sources(after)
    for source in config.sources:
        then, now = earlier.get(source.name), later.get(source.name)
        rate = (now["received"] - then["received"]) / seconds if now and then and seconds > 0 else 0.0
        if isinstance(source, UnixDatagram):
            yield from _queue(source, queue, rate)
        elif isinstance(source, Udp):
            if now and then and now["receive_buffer"] is not None:
                yield _granted(source, now, _dropped(now) - _dropped(then), rate)
            else:
                yield _to_be_granted(source, rmem_max)


def _sources(status: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    return {source["name"]: source for source in status["sources"]} if status else {}


def _dropped(source: Mapping[str, Any]) -> int:
    return source["dropped"] or 0


def _enlarge(source: Udp) -> str:
    setting = f"net.core.rmem_max={source.receive_buffer}"
    return f"sysctl -w {setting}, keep it in /etc/sysctl.d, and reload the agent"


def _to_be_granted(source: Udp, rmem_max: int | None) -> Finding:
    """What an agent without privileges would get."""
    where, asked = f"source {source.name}", amount(source.receive_buffer)
    if rmem_max is None or rmem_max >= source.receive_buffer:
        return ok(BUFFER, where, f"{asked} will be granted")
    what = f"the kernel gives {amount(rmem_max)} of the {asked} asked for"
    return warning(BUFFER, where, f"{what}, unless the agent has CAP_NET_ADMIN", _enlarge(source))


def _granted(source: Udp, now: Mapping[str, Any], dropping: int, rate: float) -> Finding:
    """What a running agent got, against what comes in."""
    where, granted = f"source {source.name}", now["receive_buffer"]
    room = granted // DATAGRAM_BYTES
    what = f"the receive buffer of {amount(granted)} holds some {room:,} datagrams"
    if dropping > 0:
        what = f"{what}; the kernel dropped {dropping:,} while this looked, {_dropped(now):,} in all"
    elif rate * PAUSE_SECONDS > room:
        what = f"{what}, and {rate:,.0f} come in a second: a pause of one loses some"
    elif granted < source.receive_buffer:
        what = f"{what}; {amount(source.receive_buffer)} were asked for"
    else:
        past = f"; {_dropped(now):,} were dropped in the past" if _dropped(now) else ""
        return ok(BUFFER, where, what + past)
    return warning(BUFFER, where, what, _enlarge(source))


def _queue(source: UnixDatagram, queue: int | None, rate: float) -> Iterator[Finding]:
    where = f"source {source.name}"
    if queue is None:
        return
    what = f"{queue} datagrams wait in the kernel"
    hint = f"sysctl -w net.unix.max_dgram_qlen={GOOD_QUEUE}, keep it in /etc/sysctl.d, and restart the agent"
    wait = "a client beyond them waits, or loses its event if it will not wait"
    if rate * BUSY_SECONDS > queue:
        yield warning(QUEUE, where, f"{what}, and {rate:,.0f} come in a second; {wait}", hint)
    elif queue < GOOD_QUEUE:
        yield warning(QUEUE, where, f"only {what}; {wait}", hint)
    else:
        yield ok(QUEUE, where, what)
