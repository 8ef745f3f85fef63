"""Stands in for PostHog at little cost, notes which numbers came, and is told on stdin how to be.

    python taking.py PORT

Every event of `giving.py` holds `no-CLIENT-NUMBER-` somewhere. A line of stdin is a mood, or `tell` and, as
JSON, how many of each client's numbers must have come: it says what is missing, how much came, and what
came twice. Moods: `well`; `503`; `429`; `slow`, a second for each answer; `reset`, in the middle of a
request; `lie`, which takes the events and then resets; `away`, where nobody listens. Whatever the mood, a
batch with a poisoned event is a 400.
"""

import contextlib
import io
import json
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from typing import Any

NUMBER = re.compile(rb"no-([a-z]+)-(\d+)-")
POISON = b'"event":"poison"'
REPLIES = {"503": b"503 Service Unavailable", "429": b"429 Too Many Requests\r\nRetry-After: 1"}
SLOW_SECONDS = 1.0


class Taking:
    """What came so far, and how to be."""

    def __init__(self, port: int) -> None:
        self.mood = "well"
        self.came: dict[bytes, bytearray] = {}  # by client, how often each number came
        self.moods: Counter[str] = Counter()  # requests met in each
        self._port = port
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._door: socket.socket | None = None

    def be(self, mood: str) -> None:
        """From now on be so; requests under way may still be answered as before."""
        self.mood = mood
        if mood == "away":
            if self._door is not None:
                self._door.shutdown(socket.SHUT_RDWR)
                self._door.close()
            self._door = None
            for client in list(self._clients):
                with contextlib.suppress(OSError):  # it may have gone just now
                    _resets(client)
                    client.shutdown(socket.SHUT_RDWR)
        elif self._door is None:
            self._door = socket.create_server(("127.0.0.1", self._port), backlog=128)
            threading.Thread(target=self._serve, args=(self._door,), daemon=True).start()

    def tell(self, owed: dict[str, int]) -> dict[str, object]:
        """What is missing of what must have come, and the rest."""
        missing = {}
        with self._lock:
            for client, count in owed.items():
                came = self.came.get(client.encode(), bytearray())
                missing[client] = [n for n in range(count) if n >= len(came) or not came[n]]
            total = sum(sum(came) for came in self.came.values())
            different = sum(len(came) - came.count(0) for came in self.came.values())
        return {"missing": missing, "events": different, "twice": total - different, "requests": self.moods}

    def _serve(self, door: socket.socket) -> None:
        while True:
            try:
                client, _ = door.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._clients.add(client)
            threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            with client, io.BufferedReader(client.makefile("rb", buffering=0), 262144) as said:
                while self._answer(client, said):
                    pass
        self._clients.discard(client)

    def _answer(self, client: socket.socket, said: "io.BufferedReader[Any]") -> bool:
        """One request; False where there is no further one."""
        if not said.readline():
            return False
        length, gzip = 0, False
        while line := said.readline().lower().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name == b"content-length" else length
            gzip = gzip or (name == b"content-encoding" and b"gzip" in value)
        mood = self.mood
        self.moods[mood] += 1
        if mood == "reset":
            said.read(length // 2)
            return _resets(client)
        body = said.read(length)
        if len(body) < length:  # the agent was killed
            return False
        if mood == "slow":
            time.sleep(SLOW_SECONDS)
        status = REPLIES.get(mood) or self._take(zlib.decompress(body, 31) if gzip else body)
        if mood == "lie":
            return _resets(client)
        client.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nOk")
        return True

    def _take(self, text: bytes) -> bytes:
        if POISON in text:
            return b"400 Bad Request"
        with self._lock:
            for name, digits in NUMBER.findall(text):
                number, came = int(digits), self.came.setdefault(name, bytearray())
                if number >= len(came):
                    came.extend(bytes(max(number + 1 - len(came), 65536)))
                came[number] = min(255, came[number] + 1)
        return b"200 OK"


def _resets(client: socket.socket) -> bool:
    """Have it end with a reset when it is closed; there is no further request."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def main() -> None:
    taking = Taking(int(sys.argv[1]))
    taking.be("well")
    for line in sys.stdin:
        order, _, rest = line.strip().partition(" ")
        if order == "tell":
            sys.stdout.write(json.dumps(taking.tell(json.loads(rest))) + "\n")
            sys.stdout.flush()
        else:
            taking.be(order)


if __name__ == "__main__":
    main()
