"""What hostile clients do, as data."""

import gzip
import json
import random
import zlib
from typing import NamedTuple

MIB = 2**20
POST = b"POST /batch/ HTTP/1.1\r\nHost: x\r\n"


class Slow(NamedTuple):
    """Says `begins`, and then `drips` again and again, never to an end; it reads nothing."""

    door: str
    begins: bytes
    drips: bytes = b""


SLOW = (
    # A byte a second in a line, in a count, in a frame; and nothing at all.
    Slow("unix_stream", b'{"event":"', b"x"),
    Slow("unix_stream", b"", b""),
    Slow("unix_stream", b'{"ack":true', b" "),
    Slow("json", b'{"event":"', b"x"),
    Slow("json", b"\r\n", b"\0"),
    Slow("syslog", b"<13>1 - host app ", b"x"),
    Slow("syslog", b"1", b""),
    Slow("syslog", b"900000 <13>1 - host app ", b"x"),
    Slow("syslog", b"", b"\n"),
    Slow("logfmt", b'event="', b"x"),
    # A handshake that never ends: nothing, half a ClientHello, one byte of it after the other, no TLS.
    Slow("tls", b"", b""),
    Slow("tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b""),
    Slow("tls", b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03", b"\0"),
    Slow("tls", b"\x16", b""),
    # A request line, a header, a body, a chunk, a trailer, that never end.
    *(
        Slow(door, begins, drips)
        for door in ("http", "admin", "pages")
        for begins, drips in (
            (b"", b""),
            (b"", b"\r\n"),
            (b"GET /", b"x"),
            (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n"),
            (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ", b"x"),
            (POST + b"Content-Length: 100000\r\n\r\n{", b" "),
            (POST + b"Expect: 100-continue\r\nContent-Length: 100000\r\n\r\n", b""),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n"),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n", b""),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x"),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: b\r\n"),
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n", b"x"),
        )
    ),
)


# What is answered again and again to clients that never read: lines, and requests one behind the other.
_ASKS = b" HTTP/1.1\r\nHost: x\r\n\r\n"
UNREAD = (
    ("unix_stream", b"x\n"),
    ("json", b"x\n"),
    ("syslog", b'{"event":1}\n'),
    ("logfmt", b"event=\n"),
    ("http", b"GET /" + _ASKS),
    ("http", b"GET /nowhere" + _ASKS),
    *(
        (door, b"GET " + path + _ASKS)
        for door in ("admin", "pages")
        for path in (b"/metrics", b"/status", b"/")
    ),
    ("admin", b"GET /tail" + _ASKS),
    ("admin", b"GET /export" + _ASKS),
)


class Raw(NamedTuple):
    """A text that two servers may read in two ways.

    `answers` is how many may come at most; `closes` where nothing that follows may be trusted, so that the
    agent ends the connection; else the client ends its side.
    """

    name: str
    text: bytes
    answers: int = 1
    closes: bool = True


# An event that is in no request, unless somebody lets himself be deceived.
SMUGGLED = b'{"api_key":"phc_test","event":"smuggled","distinct_id":"d"}'
_HIDDEN = POST + b"Content-Length: %d\r\n\r\n%b" % (len(SMUGGLED), SMUGGLED)
_CHUNKED = b"0\r\n\r\n" + _HIDDEN


def _body(*fields: bytes, body: bytes = _CHUNKED) -> bytes:
    return POST + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


RAW = (
    # Two lengths.
    Raw("CL+TE", _body(b"Content-Length: %d" % len(_CHUNKED), b"Transfer-Encoding: chunked")),
    Raw("TE+CL", _body(b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(_CHUNKED))),
    Raw("two CLs", _body(b"Content-Length: 0", b"Content-Length: %d" % len(_HIDDEN), body=_HIDDEN)),
    Raw("two CLs in one", _body(b"Content-Length: 0, %d" % len(_HIDDEN), body=_HIDDEN)),
    Raw("CL with a sign", _body(b"Content-Length: +0", body=_HIDDEN)),
    Raw("CL below 0", _body(b"Content-Length: -1", body=_HIDDEN)),
    Raw("CL in hex", _body(b"Content-Length: 0x0", body=_HIDDEN)),
    Raw("CL with an underscore", _body(b"Content-Length: 0_0", body=_HIDDEN)),
    Raw("CL of 5,000 digits", _body(b"Content-Length: " + b"9" * 5000, body=_HIDDEN)),
    Raw("CL with a space before the colon", _body(b"Content-Length : 0", body=_HIDDEN)),
    Raw("CL of nothing", _body(b"Content-Length:", body=_HIDDEN)),
    Raw("TE of HTTP/1.0", _body(b"Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0", 1)),
    # Odd spellings of chunked.
    *(
        Raw(f"TE: {spelled!r}", _body(b"Transfer-Encoding" + spelled))
        for spelled in (
            b" : chunked",
            b": xchunked",
            b": chunked, identity",
            b": identity, chunked",
            b": chunked, chunked",
            b": gzip, chunked",
            b": \x0bchunked",
            b": 'chunked'",
            b":\tchunked;q=1",
            b": chunked\r\nTransfer-Encoding: chunked",
            b": chunked\r\nTransfer-Encoding: identity",
            b":",
        )
    ),
    Raw("TE behind a bare CR", _body(b"X: y\rTransfer-Encoding: chunked")),
    Raw("TE behind a NUL", _body(b"X: y\0Transfer-Encoding: chunked")),
    # Chunks.
    *(
        Raw(
            f"a chunk of {size!r}", _body(b"Transfer-Encoding: chunked", body=size + b"\r\n{}\r\n" + _CHUNKED)
        )
        for size in (b"", b"-1", b"+2", b"0x2", b" 2", b"2 2", b"zz", b"2\0", b"f" * 21, b"2\r", b"2_0")
    ),
    Raw("a chunk longer than it says", _body(b"Transfer-Encoding: chunked", body=b"2\r\n{} \r\n" + _CHUNKED)),
    Raw("a chunk shorter than it says", _body(b"Transfer-Encoding: chunked", body=b"9\r\n{}\r\n" + _CHUNKED)),
    # What is no HTTP/1.1 request.
    Raw("HTTP/0.9", b"GET /\r\n\r\n"),
    Raw("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 2),
    Raw("TLS", b"\x16\x03\x01\x00\xa5\x01" + bytes(300)),
    Raw("an event", b'{"event":"e","distinct_id":"d"}\n\n'),
    Raw("a space before the method", b" GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    Raw("a space before a header", b"GET / HTTP/1.1\r\n Host: x\r\n\r\n"),
    Raw("no host", b"GET / HTTP/1.1\r\n\r\n"),
    Raw("two hosts", b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"),
    Raw("no colon", b"GET / HTTP/1.1\r\nHost: x\r\nX\r\n\r\n"),
    Raw("no name", b"GET / HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n"),
    Raw("a NUL in a name", b"GET / HTTP/1.1\r\nHost: x\r\nX\0: y\r\n\r\n"),
    Raw("a NUL in the target", b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n"),
    Raw("two targets", b"GET / / HTTP/1.1\r\nHost: x\r\n\r\n"),
    Raw("a large header", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * MIB + b"\r\n\r\n"),
    Raw("100,000 headers", b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 100_000 + b"\r\n"),
    Raw("a large target", b"GET /" + b"x" * MIB + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    Raw("a header without end", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * MIB),
    Raw("a trailer without end", _body(b"Transfer-Encoding: chunked", body=b"0\r\nX: " + b"x" * MIB)),
    Raw("a chunk's line without end", _body(b"Transfer-Encoding: chunked", body=b"1;" + b"x" * MIB)),
    # What is one, in its way: it is answered as such, and no more than once.
    Raw("9,000 headers", b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 9_000 + b"\r\n", closes=False),
    Raw("a folded header", b"GET / HTTP/1.1\r\nHost: x\r\nX: y\r\n z\r\n\r\n", closes=False),
    Raw("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", closes=False),
    Raw("HTTP/0.9 in one line", b"GET /status\n", closes=False),
    Raw("a folded TE", _body(b"Transfer-Encoding:", b" chunked", body=b"0\r\n\r\n"), closes=False),
    Raw(
        "a chunk of 2^80",
        _body(b"Transfer-Encoding: chunked", body=b"f" * 20 + b"\r\n" + _CHUNKED),
        closes=False,
    ),
    Raw("lines of LF", b"GET / HTTP/1.1\nHost: x\n\n", closes=False),
    Raw("a whole address", b"GET http://y/status HTTP/1.1\r\nHost: x\r\n\r\n", closes=False),
    Raw("a path that climbs", b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", closes=False),
    Raw("a path of %00", b"GET /%00%ff%2e%2e/ HTTP/1.1\r\nHost: x\r\n\r\n", closes=False),
    Raw("a tunnel", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", closes=False),
    Raw("an asterisk", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", closes=False),
    Raw("an unknown method", b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", closes=False),
    Raw(
        "an upgrade",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c, websocket\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        closes=False,
    ),
    Raw("a hundred at once", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100, 100, closes=False),
)


class Body(NamedTuple):
    """A body for an HTTP source, how it is sent, and the statuses that are right."""

    name: str
    body: bytes
    statuses: tuple[int, ...]
    encoding: str = ""
    path: str = "/batch/"


def _event(
    inner: bytes = b"1", *, name: bytes = b'"odd"', user: bytes = b'"d"', key: bytes = b"phc_test"
) -> bytes:
    """A lone event with something odd in one of its places."""
    head = b'{"api_key":"%b","event":%b,"distinct_id":%b,' % (key, name, user)
    return head + b'"properties":{"p":%b}}' % inner


def _batch(inner: bytes) -> bytes:
    return b'{"api_key":"phc_test","batch":[%b]}' % inner


def _gzip(size: int, of: bytes = b" ") -> bytes:
    """A bomb of a thousand times its own size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece = of * MIB
    return b"".join([packer.compress(piece) for _ in range(size // MIB)]) + packer.flush()


GOOD = b'{"event":"odd","distinct_id":"d"}'
DEEP = 100_000
_NESTED = b"[" * DEEP + b"]" * DEEP
_LARGE = _gzip(100 * MIB)
_GOOD = gzip.compress(_batch(GOOD))
BODIES = (
    # Bombs.
    Body("gzip, 1,000 times", _LARGE, (413,), "gzip"),
    Body("gzip that no header tells", _LARGE, (413,)),
    Body("gzip within gzip", gzip.compress(_gzip(100 * MIB)), (400, 413), "gzip"),
    Body("gzip of many members", _GOOD + _LARGE, (200, 400), "gzip"),
    Body("gzip cut off", _GOOD[:-9], (400,), "gzip"),
    Body("gzip of rubbish", _GOOD[:10] + random.Random(1).randbytes(5000), (400,), "gzip"),
    Body("gzip with a name of 1 MiB", b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * MIB, (400,), "gzip"),
    Body("gzip in base64", b"H4sI" * 1000, (400,), "base64"),
    Body("lz64", b"N4Ig" + b"A" * 1_000_000, (400, 413), "lz64"),
    Body("lz64, too long", b"A" * (2 * MIB), (400, 413), "lz64"),
    Body(
        "deflate by v1",
        zlib.compress(b" " * 50 * MIB, 9),
        (400, 401, 413),
        "deflate",
        "/i/v1/analytics/events",
    ),
    # Brackets and braces.
    Body("deep", b"[" * DEEP, (400,)),
    Body("deep and whole", _NESTED, (400, 401)),
    Body("deep properties", _event(_NESTED), (400,), path="/e/"),
    Body("deep objects", _event(b'{"a":' * DEEP + b"1" + b"}" * DEEP), (400,), path="/e/"),
    Body("deep in a batch", _batch(_NESTED), (400,)),
    Body("deep beside a good one", _batch(GOOD + b"," + _event(_NESTED)), (200, 400)),
    Body("deep where nobody looks", _batch(b'],"x":[' + _NESTED), (400,)),
    Body("wide", _batch(b"," * MIB), (400,)),
    Body("a million empty objects", _batch(b",".join([b"{}"] * 1_000_000)), (400, 413)),
    Body("a million brackets", _batch(b"[]," * 999_999 + b"[]"), (400, 413)),
    # Odd JSON.
    Body("keys twice", _event(name=b'"a","event":"odd"', user=b'"d","distinct_id":"e"'), (200,), path="/e/"),
    Body(
        "100,000 keys", _event(json.dumps({str(n): n for n in range(100_000)}).encode()), (413,), path="/e/"
    ),
    Body("a number beyond a double", _event(b"1e999"), (200, 400), path="/e/"),
    Body("a number of 5,000 digits", _event(b"9" * 5000), (200, 400), path="/e/"),
    Body("a distinct_id of 5,000 digits", _event(user=b"9" * 5000), (200, 400), path="/e/"),
    Body("half a surrogate", _event(rb'"\ud800"'), (200, 400), path="/e/"),
    Body("half a surrogate in a name", _event(name=rb'"\ud800"'), (200, 400), path="/e/"),
    Body("half a surrogate in a key", _event(key=rb"\ud800"), (400, 401), path="/e/"),
    Body("no UTF-8", _event(b'"\xff\xfe"'), (400,), path="/e/"),
    Body("NULs", bytes(100_000), (400,)),
    Body("an event of 2 MiB", _event(b'"%b"' % (b"x" * 2 * MIB)), (400, 413), path="/e/"),
    Body("a name of 1 MiB", _event(name=b'"%b"' % (b"x" * MIB)), (413,), path="/e/"),
    Body("a key of 1 MiB", _event(key=b"x" * MIB), (401,), path="/e/"),
    Body("over the bound", b" " * 21 * MIB, (413,)),
)

_RANDOM = random.Random(1)
# What floods a stream, and a datagram socket: pieces that are sent again and again.
FLOODS = {
    "garbage": b"\n".join(_RANDOM.randbytes(200).replace(b"\n", b"") for _ in range(300)) + b"\n",
    "empty lines": b"\n" * 65536,
    "lines of a byte": b"x\n" * 32768,
    "lines of 64 KiB": b"x" * 65535 + b"\n",
    "a line without end": b"x" * 65536,
    "no UTF-8": b'{"event":"e","distinct_id":"\xff\xfe","properties":{}}\n' * 1000,
    "half objects": b'{"event":"e","distinct_id":"d","properties":{\n' * 1000,
    "brackets": b"[" * 65535 + b"\n",
    "syslog": b"<999>\0\n" * 5000 + b"9999999999 x\n",
    "NULs": bytes(65536),
    "gzip": gzip.compress(_RANDOM.randbytes(60_000)),
}
