"""Whether PostHog can be reached and knows the key: DNS, the way out, TLS, one question, and its clock.

The question is `POST /flags`, which answers 401 for a key that belongs to no project, where `/batch` answers
200 and throws the events away. It promises an end within its deadlines, whatever the network does.
"""

import ipaddress
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import msgspec
import trio

from agent import AgentError
from agent.config import Project
from agent.deliver import wire
from agent.deliver.client import Client, Reply
from agent.deliver.reply import read_reply, server_clock
from agent.deliver.verdict import Refused
from agent.doctor.finding import Finding, error, ok
from agent.doctor.replies import clock, failure, reading
from agent.veil import sent_by

# PostHog answers in a tenth of a second; who waits at a terminal for longer thinks that it hangs.
NAME_SECONDS = 5.0
ASK_SECONDS = 8.0

# A person whom nobody has; asking makes none.
NOBODY = "capture-agent-doctor"


class Stop(NamedTuple):
    """The host that is connected to: PostHog's, or the proxy's before it."""

    host: str
    port: int
    proxy: str  # as people are told of it, empty where there is none


async def ask(project: Project, *, key: bool, delivers: bool) -> Sequence[Finding]:
    """All that is found on the way to PostHog. Without `key` the key is not to be had and nothing is asked.

    `delivers` where the running agent's events are taken there.
    """
    where = f"project {project.name}"
    try:
        stop = next_stop(project)
    except ValueError:
        hint = "set it to an address like http://proxy.example:3128"
        return [error("proxy", where, "the proxy's address is not one that can be used", hint)]
    found, reached = await _resolve(stop, where)
    if not reached:
        return found
    return [*found, *await _ask(project, stop, where, key=key, delivers=delivers)]


def next_stop(project: Project) -> Stop:
    """By the configuration, else by the environment, as events go. Raises ValueError for a wrong address."""
    target = urlsplit(project.host)
    host = target.hostname or ""
    told = project.delivery.proxy.reveal()
    said_by = "delivery.proxy"
    if not told and not proxy_bypass(host):
        proxies = getproxies()
        told, said_by = proxies.get(target.scheme) or proxies.get("all") or "", "the environment"
    if not told:
        return Stop(host, target.port or (443 if target.scheme == "https" else 80), "")
    proxy = urlsplit(told if "://" in told else f"http://{told}")
    if not proxy.hostname:
        raise ValueError("no host")
    port = proxy.port or (443 if proxy.scheme == "https" else 80)
    return Stop(proxy.hostname, port, f"by the proxy {proxy.hostname}:{port} (of {said_by})")


async def _resolve(stop: Stop, where: str) -> tuple[list[Finding], bool]:
    """What DNS says, and whether there is somebody to connect to."""
    whose = "the proxy's name" if stop.proxy else "the host's name"
    with trio.move_on_after(NAME_SECONDS) as patience:
        try:
            got = await trio.socket.getaddrinfo(stop.host, stop.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as failed:
            return [_unknown(whose, stop.host, where, failed)], False
    if patience.cancelled_caught:
        what = f"no answer on {whose} {stop.host} within {NAME_SECONDS:g} s"
        return [
            error("dns", where, what, "see that the DNS servers of /etc/resolv.conf can be reached")
        ], False
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in got))
    if all(ipaddress.ip_address(address.partition("%")[0]).is_unspecified for address in addresses):
        what = f"{stop.host} is {addresses[0]}, which is nowhere: a DNS filter blocks it"
        return [
            error("dns", where, what, "allow the name in the DNS filter (ad and tracker lists have it)")
        ], False
    return [ok("dns", where, f"{stop.host} is {', '.join(addresses)}")], True


def _unknown(whose: str, name: str, where: str, failed: Exception) -> Finding:
    if isinstance(failed, socket.gaierror) and failed.errno == socket.EAI_AGAIN:
        hint = "see that the DNS servers of /etc/resolv.conf can be reached"
        return error("dns", where, f"{whose} {name} cannot be resolved now: {failed.strerror}", hint)
    said = failed.strerror if isinstance(failed, OSError) else "it is no name"
    hint = f"mend the name, or this host's DNS: see what `getent hosts {name}` says"
    return error("dns", where, f"{whose} {name} does not resolve: {said}", hint)


async def _ask(project: Project, stop: Stop, where: str, *, key: bool, delivers: bool) -> list[Finding]:
    """What comes of one question, with what an event would go out with."""
    secret = project.api_key.reveal() if project.api_key is not None and key else ""
    question = {"token": secret, "distinct_id": NOBODY, "geoip_disable": True}
    configured = {name: value.reveal() for name, value in project.delivery.headers.items()}
    # One connection, and no more patience than a person has; all else as events go out.
    terms = msgspec.structs.replace(project.delivery, timeout=ASK_SECONDS, concurrency=1)
    try:
        client = Client(terms)
    except AgentError as failed:
        return [error("delivery", where, str(failed), failed.hint)]
    url = f"{project.host.rstrip('/')}/flags?v=2"
    async with client:
        headers = wire.headers(configured, "none")
        answer = await client.post(url, (msgspec.json.encode(question),), headers)
    asked = f"{project.host} {stop.proxy}".strip()
    if not isinstance(answer, Reply):
        return [failure(answer, where, asked)]
    wall = time.time_ns() // 1000
    secrets = (secret, *sent_by(project.delivery, getproxies().values()))
    verdict = read_reply(answer.status, answer.headers, answer.body_start, wall, secrets=secrets)
    found = clock(server_clock(answer.headers), wall, where) if not isinstance(verdict, Refused) else []
    if not secret and isinstance(verdict, Refused) and verdict.hold == "key":
        return [*found, ok("host", where, f"{asked} answers; the key was not to be had, so it was not tried")]
    return [*found, reading(verdict, answer.status, answer.body_start, where, asked, delivers=delivers)]
