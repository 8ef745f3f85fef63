"""What is wrong with a value of a kind that many settings have: a name, a path, an address, a number."""

import re
from collections.abc import Iterator

from agent.units import format_duration, format_size

# What is wrong, and of which setting.
Wrong = tuple[str, str]

# unix(7): 108 bytes with the NUL at the end.
PATH_BYTES = 107
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def wrong_address(listen: str) -> str:
    """Why this is no `HOST:PORT`; empty where it is."""
    host, _, port = listen.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()):
        return f'{listen!r} is not HOST:PORT, such as "127.0.0.1:8125" or "[::1]:8125"'
    if int(port) > 65535:
        return f"there is no port {port}: the last one is 65535"
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        return f"an IPv6 address stands in brackets: [{host}]:{port}"
    return ""


def named(name: str) -> Iterator[Wrong]:
    """Whether it can be the name of a project or source."""
    if _NAME.fullmatch(name) is None:
        yield "name", "1 to 64 letters, digits, dots, dashes and underscores: it is a label of the metrics"


def path(text: str, name: str, most: float) -> Iterator[Wrong]:
    """Whether it is an absolute path of at most so many bytes."""
    if not text.startswith("/"):
        yield name, f"{text!r} must be an absolute path"
    elif "\0" in text:
        yield name, "must not hold a NUL"
    elif (size := len(text.encode("utf-8", "surrogateescape"))) > most:
        yield name, f"is {size} bytes long, and a Unix socket's path has at most {most:.0f}: {text}"


def between(
    name: str, value: float, least: float, most: float, *, size: bool = False, seconds: bool = False
) -> Iterator[Wrong]:
    """Whether a value is within its bounds, told as a size or as a duration."""
    if least <= value <= most:
        return
    bound, word = (least, "least") if value < least else (most, "most")
    text = format_size(int(bound)) if size else format_duration(bound) if seconds else str(bound)
    yield name, f"must be at {word} {text}"
