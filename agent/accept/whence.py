"""Where an HTTP request comes from: its client's own address, as far as proxies that are trusted tell it."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

Address = IPv4Address | IPv6Address

# Proxies in a row that are believed: a header may name thousands.
MOST_HOPS = 16


class Whence:
    """Finds clients behind the trusted proxies."""

    def __init__(self, trusted_proxies: Sequence[str]) -> None:
        self._trusted = [ip_network(network) for network in trusted_proxies]

    def address(self, peer: str, forwarded: str) -> Address | None:
        """The client's address: the last in `X-Forwarded-For` that no trusted proxy is known by.

        None where the connection has none.
        """
        found = _read(peer)
        for told in reversed(forwarded.rsplit(",", MOST_HOPS)[-MOST_HOPS:]):
            if found is None or not any(found in network for network in self._trusted):
                break
            if (before := _read(told.strip())) is None:
                break
            found = before
        return found


def is_near(address: Address | None) -> bool:
    """Whether it tells nothing of a place: this host's, or one of a private network."""
    return address is None or not address.is_global


def plain(text: str) -> Address:
    """An address; one of IPv4 that a socket for both kinds tells as one of IPv6 is one of IPv4.

    Raises ValueError where it is none.
    """
    address = ip_address(text)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _read(text: str) -> Address | None:
    """An address, as proxies write it: perhaps with a port, or in brackets."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return plain(text.partition("%")[0])
    except ValueError:
        return None
