"""Sends numbered events at a rate over every kind of socket, and says which were acknowledged.

    python giving.py '{"rate": 20000, "stream": PATH, "syslog": PATH, "dgram": PATH, "tcp": PORT, ...}'

The clients share the rate. Those that are acknowledged connect anew all the time, and send again what was
not when they lose a connection; nobody stops for long whatever the agent does. A line of stdin is `tell` or
`stop`, answered as JSON: for each client how many it sent, how many of them are owed (the first so many),
how often it connected, and what it was told that must not be. After `stop` all that was sent is owed.
"""

import json
import socket
import sys
import time
import zlib
from collections.abc import Callable
from select import select
from threading import Event, Thread

# Of so many events one is such that the sink refuses its batch.
POISON_EVERY = 5_000
# A client that is acknowledged connects anew after so many events, and has no more than these under way.
AT_A_CONNECTION = 5_000
UNDER_WAY = 20_000
BATCH = 250
PATIENCE = 60.0

HEAD = (
    b"POST /batch/ HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
)


def event(client: bytes, number: int) -> bytes:
    """About 340 bytes."""
    name = b"poison" if is_poison(number) else b"signup"
    return (
        b'{"event":"%b","distinct_id":"user-%d","properties":{"no":"no-%b-%d-","plan":"enterprise","amount":%d.25,'
        b'"$current_url":"https://shop.example.com/products/%d?ref=%x","$session_id":"%032x","country":"DE",'
        b'"user_agent":"Mozilla/5.0 (X11; Linux x86_64)","screen_width":1920,"logged_in":true}}\n'
        % (name, number % 9973, client, number, number % 97, number % 4999, number, number * 2654435761)
    )


def line(client: bytes, number: int) -> bytes:
    """The same in syslog, which has no poison."""
    return (
        b"<14>1 2026-11-24T13:00:00.%06dZ web-%d nginx %d - - no-%b-%d- accepted publickey for deploy"
        b" from 192.0.2.%d\n"
        % (number % 1_000_000, number % 20, number % 30_000, client, number, number % 256)
    )


def is_poison(number: int) -> bool:
    return number % POISON_EVERY == POISON_EVERY - 1


class Client(Thread):
    """One that sends its share of the rate until told to end."""

    def __init__(self, name: str, work: Callable[["Client"], None], rate: float) -> None:
        super().__init__(daemon=True)
        self.client = name.encode()
        self.sent = self.owed = self.connected = 0
        self.over = Event()
        self.wrong: list[str] = []
        self._work = work
        self._rate = rate
        self._begun = time.monotonic()
        self._due = 0.0

    def run(self) -> None:
        while not self.over.is_set() or self.owed < self.sent:
            try:
                self._work(self)
            except OSError:
                time.sleep(0.02)

    def some(self, most: int = 1000) -> int:
        """How many to send next, once it is time; of a time without the agent a second is made up for."""
        if self.over.is_set():
            return 0
        time.sleep(0.01)
        now = time.monotonic()
        self._due = min(self._due + (now - self._begun) * self._rate, self._rate)
        self._begun = now
        count = min(int(self._due), most)
        self._due -= count
        return count

    def told(self) -> dict[str, object]:
        return {"sent": self.sent, "owed": self.owed, "connected": self.connected, "wrong": self.wrong}


def opened(client: Client, family: int, address: object, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(family, kind)
    sock.settimeout(PATIENCE)
    sock.connect(address)  # type: ignore[arg-type]  # of any family
    client.connected += 1
    return sock


def acknowledged(
    client: Client, family: int, address: object, make: Callable[[bytes, int], bytes] = event
) -> None:
    """One connection with acknowledgements: from the first event on that is not yet owed."""
    with opened(client, family, address) as sock:
        sock.sendall(b'{"ack":true}\n')
        first, rest = client.owed, b""
        last = max(client.sent, first + AT_A_CONNECTION)
        upto = first
        while client.owed < last:
            count = min(client.sent, upto + 1000) - upto or min(client.some(), last - upto)
            sock.sendall(b"".join(make(client.client, number) for number in range(upto, upto + count)))
            upto += count
            client.sent = max(client.sent, upto)
            last = upto if client.over.is_set() else last
            waits = client.owed < upto and (upto == last or upto - client.owed > UNDER_WAY)
            while client.owed < upto and (waits or select([sock], [], [], 0)[0]):
                if not (data := sock.recv(65536)):
                    raise ConnectionResetError
                *lines, rest = (rest + data).split(b"\n")
                for totals in map(json.loads, lines):
                    if totals.get("rejected", totals.get("error")):
                        client.wrong.append(str(totals))
                    client.owed = first + totals.get("accepted", client.owed - first)
                waits = waits and client.owed < upto and upto == last


def batches(client: Client, address: tuple[str, int]) -> None:
    """One connection of an SDK: a batch is sent until it is answered with 200."""
    with opened(client, socket.AF_INET, address) as sock, sock.makefile("rb") as answers:
        first = client.owed
        while client.owed < first + AT_A_CONNECTION:
            count = client.sent - client.owed or client.some(BATCH)
            if not count and client.over.is_set():
                return
            if not count:
                continue
            client.sent = max(client.sent, client.owed + count)
            events = b",".join(event(client.client, client.owed + number)[:-1] for number in range(count))
            packer = zlib.compressobj(1, zlib.DEFLATED, 31)
            body = packer.compress(b'{"api_key":"phc_test","batch":[' + events + b"]}") + packer.flush()
            sock.sendall(HEAD % len(body) + body)
            status = answers.readline()
            length = 0
            while said := answers.readline().strip().lower():
                name, _, value = said.partition(b":")
                length = int(value) if name == b"content-length" else length
            answers.read(length)
            if status.startswith(b"HTTP/1.1 200"):
                client.owed += count
            elif status.startswith(b"HTTP/1.1 503"):
                time.sleep(0.1)
            elif not status:
                raise ConnectionResetError
            else:
                client.wrong.append(repr(status))


def datagrams(client: Client, family: int, address: object) -> None:
    """Datagrams, of which nobody tells what became."""
    with opened(client, family, address, socket.SOCK_DGRAM) as sock:
        while not client.over.is_set():
            for _ in range(client.some()):
                sock.send(event(client.client, client.sent))
                client.sent += 1
    client.owed = client.sent


def main() -> None:
    where = json.loads(sys.argv[1])
    each = where["rate"] / 6
    local = {kind: ("127.0.0.1", where[kind]) for kind in ("tcp", "http", "udp")}
    inet, unix = socket.AF_INET, socket.AF_UNIX
    clients = [
        Client("stream", lambda client: acknowledged(client, unix, where["stream"]), each),
        Client("syslog", lambda client: acknowledged(client, unix, where["syslog"], line), each),
        Client("tcp", lambda client: acknowledged(client, inet, local["tcp"]), each),
        Client("http", lambda client: batches(client, local["http"]), each),
        Client("dgram", lambda client: datagrams(client, unix, where["dgram"]), each),
        Client("udp", lambda client: datagrams(client, inet, local["udp"]), each),
    ]
    for client in clients:
        client.start()
    for order in sys.stdin:
        if order.strip() == "stop":
            for client in clients:
                client.over.set()
            for client in clients:
                client.join()
        sys.stdout.write(json.dumps({client.client.decode(): client.told() for client in clients}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
