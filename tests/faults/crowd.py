"""Clients in processes of their own, by another user where that may be: one that is good, or one that floods.

python crowd.py good PATH SECONDS           prints what its acknowledgements took, as JSON
python crowd.py flood KIND ADDRESS SECONDS UID    sends the texts of a JSON list, each again and again
"""

import json
import os
import select
import socket
import sys
import time
from collections import deque

ASK = b'{"ack":true}\n'
# 5,000 events a second, fifty at a time.
EVERY, AT_ONCE = 0.01, 50
# What a UDP datagram holds on loopback.
DATAGRAM_BYTES = 60_000
LINE = b'{"event":"good","distinct_id":"user-42","properties":{"plan":"pro","text":"%b"}}\n' % (b"x" * 250)


def good(path: str, seconds: float) -> None:
    """Send at a steady rate and measure how long each event waits until it is told that it is on disk."""
    waits: list[float] = []
    due: deque[tuple[int, float]] = deque()
    sent = accepted = 0
    text = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
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
            text += client.recv(65536)
            *whole, text = text.split(b"\n")
            accepted = max(accepted, *(json.loads(one).get("accepted", 0) for one in whole), 0)
            while due and due[0][0] <= accepted:
                waits += [time.monotonic() - due.popleft()[1]] * AT_ONCE
    waits.sort()
    told = {f"p{share}": round(1000 * waits[len(waits) * share // 100], 1) for share in (50, 99)}
    sys.stdout.write(json.dumps({"accepted": accepted, **told, "worst": round(1000 * waits[-1], 1)}))


def flood(kind: int, address: str, seconds: float, uid: int) -> None:
    """Send one text after the other, each as fast as it is taken for its share of the time."""
    texts = [text.encode("latin-1") for text in json.load(sys.stdin)]
    where = json.loads(address)
    if uid:
        os.setuid(uid)
    for text in texts:
        end = time.monotonic() + seconds / len(texts)
        while time.monotonic() < end:
            with socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET, kind) as client:
                client.settimeout(0.5)
                try:
                    client.connect(where if isinstance(where, str) else tuple(where))
                    while time.monotonic() < end:
                        client.send(text if kind == socket.SOCK_STREAM else text[:DATAGRAM_BYTES])
                except OSError:
                    continue


if __name__ == "__main__":
    if sys.argv[1] == "good":
        good(sys.argv[2], float(sys.argv[3]))
    else:
        flood(int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))
