"""Clients in processes of their own, by another user where that may be: one that is good, or many that flood.

python crowd.py good WAY ADDRESS CA SECONDS           prints what its acknowledgements took, as JSON
python crowd.py flood WAY ADDRESS CA SECONDS UID CONNECTIONS
                                  sends the texts of a JSON list, each again and again, by each connection

A way is `stream`, `datagram`, `tls`, or `http`, where a text is the body of a request. In a flood it can be
`calls` too, which agree on TLS and go, and `wrong calls`, which send a text instead.
"""

import encodings.idna  # noqa: F401  # which TLS asks for when the user cannot read it any more
import http.client
import json
import os
import select
import socket
import ssl
import sys
import threading
import time
from collections import deque

ASK = b'{"ack":true}\n'
# 5,000 events a second, fifty at a time.
EVERY, AT_ONCE = 0.01, 50
# What a UDP datagram holds on loopback.
DATAGRAM_BYTES = 60_000
LINE = b'{"event":"good","distinct_id":"user-42","properties":{"plan":"pro","text":"%b"}}\n' % (b"x" * 250)
# By HTTP a hundred at a time, as SDKs do.
POSTED = 100
BODY = b'{"api_key":"phc_test","batch":[%b]}' % b",".join([LINE.strip()] * POSTED)
# Of a text, in a call that is none: more is not read.
CALL_BYTES = 1000
# Who is not served for so long begins anew.
PATIENCE_SECONDS = 2.0


def connected(way: str, address: str, tls: ssl.SSLContext) -> socket.socket:
    """A socket that has come to the agent's door."""
    where = json.loads(address)
    kind = socket.SOCK_DGRAM if way == "datagram" else socket.SOCK_STREAM
    client = socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET, kind)
    client.settimeout(PATIENCE_SECONDS)
    client.connect(where if isinstance(where, str) else tuple(where))
    if way in ("tls", "calls"):
        client = tls.wrap_socket(client, server_hostname=where[0])
    return client


def streamed(client: socket.socket, seconds: float) -> tuple[int, list[float]]:
    """How many events were acknowledged on a stream, and how long each had waited for it."""
    waits: list[float] = []
    due: deque[tuple[int, float]] = deque()
    sent = accepted = 0
    text = b""
    client.settimeout(None)
    client.sendall(ASK)
    begin = following = time.monotonic()
    while sent > accepted or following < begin + seconds:
        now = time.monotonic()
        if now >= following and following < begin + seconds:
            sent += AT_ONCE
            due.append((sent, now))
            client.sendall(LINE * AT_ONCE)
            following += EVERY
        left = following - time.monotonic() if following < begin + seconds else 60
        if not select.select([client], [], [], max(0, left))[0]:
            continue
        text += client.recv(65536)  # all that one TLS record holds
        *whole, text = text.split(b"\n")
        accepted = max(accepted, *(json.loads(one).get("accepted", 0) for one in whole), 0)
        while due and due[0][0] <= accepted:
            waits += [time.monotonic() - due.popleft()[1]] * AT_ONCE
    return accepted, waits


def posted(address: str, seconds: float) -> tuple[int, list[float]]:
    """The same by requests; what is late counts from when it was to be sent."""
    host, port = json.loads(address)
    client = http.client.HTTPConnection(host, port, timeout=60)
    waits: list[float] = []
    begin = following = time.monotonic()
    while following < begin + seconds:
        time.sleep(max(0, following - time.monotonic()))
        client.request("POST", "/batch/", BODY)
        answer = client.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"Ok"}')
        waits += [time.monotonic() - following] * POSTED
        following += EVERY * POSTED / AT_ONCE
    return len(waits), waits


def good(way: str, address: str, tls: ssl.SSLContext, seconds: float) -> None:
    """Send at a steady rate and measure how long each event waits until it is told that it is on disk."""
    came = 0.0
    if way == "http":
        accepted, waits = posted(address, seconds)
    else:
        begin = time.monotonic()
        with connected(way, address, tls) as client:
            came = time.monotonic() - begin
            accepted, waits = streamed(client, seconds)
    waits.sort()
    told = {
        "p50": waits[len(waits) // 2],
        "p99": waits[len(waits) * 99 // 100],
        "worst": waits[-1],
        "came": came,
    }
    said = {name: round(1000 * seconds, 1) for name, seconds in told.items()}
    sys.stdout.write(json.dumps({"accepted": accepted, **said}))


def pour(way: str, address: str, tls: ssl.SSLContext, text: bytes, end: float) -> None:
    """Send one text again and again as fast as it is taken; who is shown out comes again."""
    if way == "datagram":
        text = text[:DATAGRAM_BYTES]
    elif way == "http":
        text = b"POST /batch/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)
    while time.monotonic() < end:
        try:
            with connected(way, address, tls) as client:
                if way == "wrong calls":
                    client.sendall(text[:CALL_BYTES])
                    client.recv(1)
                while "calls" not in way and time.monotonic() < end:
                    client.send(text) if way == "datagram" else client.sendall(text)
                    if way == "http":
                        client.recv(65536)
        except OSError:
            continue


def flood(way: str, address: str, tls: ssl.SSLContext, seconds: float, uid: int, connections: int) -> None:
    """Send one text after the other, each for its share of the time, by all connections at once."""
    texts = [text.encode("latin-1") for text in json.load(sys.stdin)]
    if uid:
        os.setuid(uid)
    for text in texts:
        end = time.monotonic() + seconds / len(texts)
        arguments = way, address, tls, text, end
        pouring = [threading.Thread(target=pour, args=arguments) for _ in range(connections)]
        for one in pouring:
            one.start()
        for one in pouring:
            one.join()


if __name__ == "__main__":
    what, way, address, ca, seconds, *rest = sys.argv[1:]
    trusting = ssl.create_default_context(cafile=ca)  # read before the user is another one
    if what == "good":
        good(way, address, trusting, float(seconds))
    else:
        flood(way, address, trusting, float(seconds), *map(int, rest))
