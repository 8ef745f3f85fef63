"""Unix streams: lines, acknowledgements, and clients of every temper."""

import os
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.lowlevel
from sources import line, stream, taking

from agent.accept.handed import HandedClient, HandedSource, Totals, place_of
from agent.accept.offered import Offered
from agent.accept.shortage import BUSY_SECONDS
from agent.buffer import Limits
from agent.decode.ndjson import Unfinished
from agent.events import Cut, Instant, Read

ASK = b'{"ack":true}\n'


@asynccontextmanager
async def client(path: str) -> AsyncIterator[trio.SocketStream]:
    async with await trio.open_unix_socket(path) as connected:
        yield connected


async def read_lines(connected: trio.SocketStream) -> list[dict[str, Any]]:
    """Everything that the agent says until it ends the connection."""
    text = b""
    async for some in connected:
        text += some
    return [msgspec.json.decode(one) for one in text.splitlines()]


async def test_a_flood_becomes_full_chunks_and_nobody_notices(tmp_path: Path) -> None:
    """Reads are split where a chunk is full; line numbers and totals stay those of the client."""
    count, every = 10_000, 701
    lines = [line(number) if number % every else b"nonsense\n" for number in range(1, count + 1)]
    async with taking(stream(tmp_path, ack=True)) as taken, client(taken.source.address) as sender:
        await sender.send_all(b"".join(lines))
        await sender.send_eof()
        told = await read_lines(sender)
        assert [one["line"] for one in told if "error" in one] == list(range(every, count + 1, every))
        assert told[-1] == {"accepted": count - count // every, "rejected": count // every}
        sizes = []
        while (lease := await taken.buffer.take(Limits(1, 1), "default")) is not None:
            sizes += [chunk.events for chunk in lease.chunks]
        assert sum(sizes) == count - count // every
        assert max(sizes) <= 1000
        assert len(sizes) <= 15


async def test_idle_clients_keep_nothing(tmp_path: Path) -> None:
    """What an idle client has sent is in the buffer, and nowhere else."""
    async with taking(stream(tmp_path)) as taken, AsyncExitStack() as clients:
        tracemalloc.start()
        try:
            for _ in range(30):
                sender = await clients.enter_async_context(client(taken.source.address))
                await sender.send_all(line(properties={"long": "x" * 1000}) * 150)
            await taken.settled(30 * 150)
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert held < 1.5 * 2**20


@pytest.mark.parametrize(
    ("clients", "flood", "limit"),
    [(20, b"x\n" * 60_000, 100), (1, b"x\n[]\n" * 40_000, 0)],
    ids=["over the rate", "refused"],
)
async def test_refused_lines_take_no_more_than_they_are(
    tmp_path: Path, clients: int, flood: bytes, limit: int
) -> None:
    """Whoever sends lines of a byte and never reads what became of them takes the memory of a few reads."""
    settings = stream(tmp_path, uid_events_per_second=limit)
    lines = clients * flood.count(b"\n")
    async with taking(settings) as taken, AsyncExitStack() as stack, trio.open_nursery() as nursery:
        tracemalloc.start()
        try:
            for _ in range(clients):
                sender = await stack.enter_async_context(client(taken.source.address))
                await sender.send_all(ASK)
                nursery.start_soon(sender.send_all, flood)
            await taken.settled(lines)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert taken.total("rejected", "rate_limited" if limit else "not_an_object") > 0
        assert peak < 7 * 2**20


def test_a_part_of_a_read_comes_later_than_the_lines_before_it() -> None:
    """Its events are stamped from then on, a microsecond a line, as if it had not been split."""
    cut = Cut("truncated", "d")
    offered = Offered(Read(b"a\n\nb\nc\n", Instant(10, 20, "boot"), cut))
    assert offered.split(3) == Read(b"a\n\nb\n", Instant(10, 20, "boot"))
    assert (offered.read, offered.lines) == (Read(b"c\n", Instant(13, 23, "boot"), cut), 1)


async def test_lines_become_events(tmp_path: Path) -> None:
    """Each line is an event; CRLF, empty lines and a last line without an end are taken as they should be."""
    async with taking(stream(tmp_path)) as taken:
        async with client(taken.source.address) as sender:
            await sender.send_all(line(1) + b"\n  \r\n" + line(2).replace(b"\n", b"\r\n") + line(3).rstrip())
        events = await taken.events(3)
        assert [event["properties"]["n"] for event in events] == [1, 2, 3]
        assert (taken.total("received"), taken.total("accepted")) == (3, 3)


async def test_bytes_cut_anywhere_are_the_same_lines(tmp_path: Path) -> None:
    """A client that sends one byte at a time is understood."""
    async with taking(stream(tmp_path)) as taken:
        async with client(taken.source.address) as sender:
            for byte in line(1) + line(2):
                await sender.send_all(bytes([byte]))
        events = await taken.events(2)
        assert [event["properties"]["n"] for event in events] == [1, 2]


async def test_a_client_may_ask_for_acknowledgements(tmp_path: Path) -> None:
    """Its first line is not counted; refusals come before the total that counts them."""
    async with taking(stream(tmp_path)) as taken, client(taken.source.address) as sender:
        await sender.send_all(ASK + line(1) + b"\n" + b'{"distinct_id":"d"}\n' + b"nonsense\n" + line(2))
        await sender.send_eof()
        said = await read_lines(sender)
        assert said[-1] == {"accepted": 2, "rejected": 2}
        assert [one for one in said if "error" in one] == [
            {"line": 2, "error": "missing_event"},
            {"line": 3, "error": "malformed_json"},
        ]
        assert taken.total("received") == 4


@pytest.mark.parametrize("asking", [b"", ASK])
async def test_a_source_may_acknowledge_everybody(tmp_path: Path, asking: bytes) -> None:
    """With `ack = true` nobody needs to ask, and who does is not counted for it."""
    async with taking(stream(tmp_path, ack=True)) as taken, client(taken.source.address) as sender:
        await sender.send_all(asking + line(1))
        await sender.send_eof()
        assert await read_lines(sender) == [{"accepted": 1, "rejected": 0}]


async def test_without_asking_nothing_is_said(tmp_path: Path) -> None:
    """A client that did not ask is not written to, and the agent closes after its last line."""
    async with taking(stream(tmp_path)) as taken, client(taken.source.address) as sender:
        await sender.send_all(line(1) + b'{"ack":true}\n')
        await sender.send_eof()
        assert await read_lines(sender) == []
        await taken.settled(2)
        assert taken.total("rejected", "missing_event") == 1


@pytest.mark.parametrize(("ack", "said"), [(False, ASK), (False, ASK.strip()), (True, b""), (True, b"\n")])
async def test_a_client_without_a_line_is_told_that_there_was_none(
    ack: bool, said: bytes, tmp_path: Path
) -> None:
    """Who waits for a total gets one at the end, also of nothing."""
    async with taking(stream(tmp_path, ack=ack)) as taken, client(taken.source.address) as sender:
        await sender.send_all(said)
        await sender.send_eof()
        assert await read_lines(sender) == [{"accepted": 0, "rejected": 0}]


async def test_totals_come_while_the_connection_stays(tmp_path: Path) -> None:
    """Each line can be waited for, one at a time."""
    async with taking(stream(tmp_path)) as taken, client(taken.source.address) as sender:
        await sender.send_all(ASK)
        for number in range(1, 6):
            await sender.send_all(line(number))
            said = await sender.receive_some()
            assert msgspec.json.decode(said) == {"accepted": number, "rejected": 0}


async def test_a_client_that_writes_all_and_reads_afterwards(tmp_path: Path) -> None:
    """A million bytes of refusals cannot block it: totals are replaced, refusals are bounded."""
    count = 50_000
    async with taking(stream(tmp_path)) as taken, client(taken.source.address) as sender:
        await sender.send_all(ASK + b"x\n" * count)
        await sender.send_eof()
        said = await read_lines(sender)
        assert said[-1] == {"accepted": 0, "rejected": count}
        refusals = [one["line"] for one in said if "error" in one]
        assert refusals == sorted(set(refusals))
        assert 0 < len(refusals) <= count


async def test_a_client_that_never_reads_holds_nobody_up(tmp_path: Path) -> None:
    """It is read to its end all the same, and a neighbour is acknowledged at once."""
    async with taking(stream(tmp_path)) as taken, client(taken.source.address) as deaf:
        await deaf.send_all(ASK + b"x\n" * 100_000)
        async with client(taken.source.address) as neighbour:
            await neighbour.send_all(ASK + line(1))
            assert msgspec.json.decode(await neighbour.receive_some()) == {"accepted": 1, "rejected": 0}
        await taken.settled(100_001)


async def test_a_connection_reset_in_the_middle_of_a_line(tmp_path: Path) -> None:
    """The whole lines before it count; the line that was cut is rejected as truncated."""
    async with taking(stream(tmp_path)) as taken:
        with socket.socket(socket.AF_UNIX) as sender:
            sender.connect(taken.source.address)
            sender.sendall(ASK + line(1) + line(2) + line(3)[:-10])
            await taken.settled(2)
            await trio.to_thread.run_sync(partial(sender.recv, 1, socket.MSG_PEEK))
            # Closed with an acknowledgement unread: a reset, as far as Unix sockets know one.
        await taken.settled(3)
        assert (taken.total("accepted"), taken.total("rejected", "truncated")) == (2, 1)


async def test_a_last_line_ended_by_a_clean_close(tmp_path: Path) -> None:
    """It is a line, and what is wrong with it is told as of any other."""
    async with taking(stream(tmp_path)) as taken:
        async with client(taken.source.address) as sender:
            await sender.send_all(line(1) + line(2)[:-10])
        await taken.settled(2)
        assert (taken.total("accepted"), taken.total("rejected", "malformed_json")) == (1, 1)


async def test_lines_beyond_the_bound_are_refused_alone(tmp_path: Path) -> None:
    """A line of 10 MiB is one rejection, in bounded memory; its neighbours are events."""
    async with taking(stream(tmp_path, max_event=10_000)) as taken:
        async with client(taken.source.address) as sender:
            await sender.send_all(ASK + line(1) + b"x" * 10 * 2**20 + b"\n" + line(2))
            await sender.send_eof()
            said = await read_lines(sender)
        assert said[-1] == {"accepted": 2, "rejected": 1}
        assert {"line": 2, "error": "too_large"} in said
        assert taken.source.putter.recent[-1].reason == "too_large"


async def test_unfinished_lines_share_their_memory(tmp_path: Path) -> None:
    """Where many clients hold long lines open, the longest is refused and the others go on."""
    mebibyte = 2**20
    async with taking(stream(tmp_path, max_event=2 * mebibyte)) as taken, trio.open_nursery() as nursery:
        senders = [await trio.open_unix_socket(taken.source.address) for _ in range(20)]
        for sender in senders:
            nursery.start_soon(sender.send_all, b"x" * mebibyte)
        await taken.settled(3)
        assert taken.total("rejected", "too_large") >= 3
        async with client(taken.source.address) as neighbour:
            await neighbour.send_all(ASK + line(1))
            assert msgspec.json.decode(await neighbour.receive_some()) == {"accepted": 1, "rejected": 0}
        for sender in senders:
            await sender.aclose()


async def test_five_hundred_connections_at_once(tmp_path: Path) -> None:
    """Everybody is served, and the books say so."""
    async with taking(stream(tmp_path)) as taken:

        async def one() -> None:
            async with client(taken.source.address) as sender:
                await sender.send_all(ASK + line(1))
                assert msgspec.json.decode(await sender.receive_some()) == {"accepted": 1, "rejected": 0}
                await all_are_in.wait()

        all_are_in = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(one)
            await taken.settled(500)
            assert taken.source.connections == 500
            all_are_in.set()
        assert taken.total("accepted") == 500


async def test_beyond_max_connections_clients_wait(tmp_path: Path) -> None:
    """The next client is served when one has left; none is turned away."""
    async with taking(stream(tmp_path, max_connections=1)) as taken:
        async with client(taken.source.address) as first, client(taken.source.address) as second:
            await first.send_all(ASK + line(1))
            await first.receive_some()
            await second.send_all(ASK + line(2))
            with trio.move_on_after(0.05) as waited:
                await second.receive_some()
            assert waited.cancelled_caught
            await first.aclose()
            assert msgspec.json.decode(await second.receive_some()) == {"accepted": 1, "rejected": 0}


async def test_who_was_silent_longest_leaves_for_who_comes(tmp_path: Path) -> None:
    """After a second; no line that it has sent is lost, half a line is not refused, and its rest fails."""
    async with taking(stream(tmp_path, max_connections=2)) as taken:
        address = taken.source.address
        async with client(address) as silent, client(address) as busy, client(address) as new:
            await silent.send_all(ASK + line(1) + b'{"event":"ha')
            assert msgspec.json.decode(await silent.receive_some()) == {"accepted": 1, "rejected": 0}
            await busy.send_all(ASK + line(2))
            await busy.receive_some()
            await new.send_all(ASK + line(3))
            began = trio.current_time()
            while taken.total("accepted") < 3:
                await busy.send_all(line(4))
                await busy.receive_some()
                if trio.current_time() < began + 0.9:
                    assert taken.source.connections == 2
                    assert not taken.total("rejected")
                await trio.sleep(0.1)
            assert await read_lines(silent) == []  # more than it knows
            with pytest.raises(trio.BrokenResourceError):
                await silent.send_all(line(5))
            assert msgspec.json.decode(await new.receive_some()) == {"accepted": 1, "rejected": 0}


@pytest.mark.parametrize("asked", [ASK, b""], ids=["acknowledged", "not"])
async def test_who_talks_all_the_time_takes_turns(tmp_path: Path, asked: bytes) -> None:
    """All places are one program's, which writes by each: who comes waits some time, no line is lost."""
    written = 0
    async with taking(stream(tmp_path, max_connections=3)) as taken, trio.open_nursery() as nursery:

        async def talk() -> None:
            nonlocal written
            async with client(taken.source.address) as talking:
                await talking.send_all(asked)
                with suppress(trio.BrokenResourceError):
                    while True:
                        await talking.send_all(line(1))
                        written += 1
                        await trio.sleep(0.001)

        for _ in range(3):
            nursery.start_soon(talk)
        await trio.sleep(0.2)
        async with client(taken.source.address) as new:
            with trio.fail_after(BUSY_SECONDS + 5):
                await new.send_all(ASK + line(2))
                assert msgspec.json.decode(await new.receive_some()) == {"accepted": 1, "rejected": 0}
        nursery.cancel_scope.cancel()
    assert taken.total("received") == taken.total("accepted") >= written + 1


async def test_who_is_owed_an_acknowledgement_keeps_his_place(tmp_path: Path) -> None:
    """While the buffer is full nobody is silent by his own will."""
    async with taking(stream(tmp_path, max_connections=1), max_size=1) as taken:
        async with client(taken.source.address) as waiting, client(taken.source.address) as other:
            await waiting.send_all(ASK + line(1))
            await other.send_all(ASK + line(2))
            with trio.move_on_after(3) as waited:
                await waiting.receive_some()
            assert waited.cancelled_caught
            await waiting.send_all(line(3))
            taken.stop.set()
            taken.buffer.close_door()


async def test_a_full_buffer_holds_senders_up_and_acknowledges_nothing(tmp_path: Path) -> None:
    """What is not in the buffer is not acknowledged; at the end it is counted as shed by the shutdown."""
    async with taking(stream(tmp_path), max_size=1) as taken, client(taken.source.address) as sender:
        await sender.send_all(ASK + line(1))
        with trio.move_on_after(0.1) as waited:
            await sender.receive_some()
        assert waited.cancelled_caught
        taken.stop.set()
        taken.buffer.close_door()
        assert (await read_lines(sender))[-1] == {"accepted": 0, "rejected": 1}
    assert taken.total("shed", "shutdown") == taken.total("received") == 1


async def test_drop_newest_refuses_by_line(tmp_path: Path) -> None:
    """A line for which there is no room is refused as buffer_full, and booked as shed."""
    async with taking(stream(tmp_path), max_size=1, when_full="drop_newest") as taken:
        async with client(taken.source.address) as sender:
            await sender.send_all(ASK + line(1))
            await sender.send_eof()
            assert await read_lines(sender) == [
                {"line": 1, "error": "buffer_full"},
                {"accepted": 0, "rejected": 1},
            ]
        assert taken.total("shed", "full_newest") == taken.total("received") == 1


async def test_a_stop_reads_what_was_sent(tmp_path: Path) -> None:
    """Lines that are in the kernel's queue when the agent stops are put and acknowledged."""
    async with taking(stream(tmp_path)) as taken:
        with socket.socket(socket.AF_UNIX) as sender:
            sender.connect(taken.source.address)
            sender.sendall(ASK + b"".join(line(number) for number in range(500)))
            while not taken.source.connections:
                await trio.lowlevel.checkpoint()
            taken.stop.set()
            said = b""
            while some := await trio.to_thread.run_sync(sender.recv, 65536):
                said += some
            assert msgspec.json.decode(said.splitlines()[-1]) == {"accepted": 500, "rejected": 0}
            with pytest.raises(BrokenPipeError):
                sender.sendall(line(1))


async def test_a_hostile_client_ends_only_itself(tmp_path: Path) -> None:
    """Resets, half closes and rubbish of every kind leave the next client served."""
    rubbish = [b"\xff\xfe\n", b"{" * 100_000 + b"\n", b'"\n"\n', b"\x00" * 5000, b"null\n[]\n1e999\n"]
    async with taking(stream(tmp_path)) as taken:
        for some in rubbish:
            with socket.socket(socket.AF_UNIX) as sender:
                sender.connect(taken.source.address)
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sender.sendall(ASK + some)
        async with client(taken.source.address) as neighbour:
            await neighbour.send_all(ASK + line(1))
            assert msgspec.json.decode(await neighbour.receive_some()) == {"accepted": 1, "rejected": 0}


async def test_a_source_that_shapes_says_so_and_its_books_balance(tmp_path: Path) -> None:
    """What is left out is told to the client and counted, and is no error among the last refusals."""
    settings = stream(tmp_path, ack=True, drop=("debug",), sample=0.1, redact=("email",))
    lines = [
        line(1, event="debug", distinct_id="user-2"),
        line(2, distinct_id="user-1"),
        line(3, distinct_id="user-14", properties={"email": "bob@example.com"}),
        b"bob@example.com\n",
    ]
    async with taking(settings) as taken, client(taken.source.address) as sender:
        await sender.send_all(b"".join(lines))
        await sender.send_eof()
        told = await read_lines(sender)
        assert [(one["line"], one["error"]) for one in told if "error" in one] == [
            (1, "filtered"),
            (2, "sampled"),
            (4, "malformed_json"),
        ]
        assert told[-1] == {"accepted": 1, "rejected": 3}
        assert (taken.total("received"), taken.total("accepted")) == (4, 1)
        assert [taken.total("rejected", why) for why in ("filtered", "sampled", "malformed_json")] == [
            1,
            1,
            1,
        ]
        refusals = taken.source.putter.recent
        assert [(refusal.reason, refusal.sample) for refusal in refusals] == [
            ("malformed_json", "[redacted]")
        ]
        [event] = await taken.events(1)
        assert event["properties"]["email"] == "[redacted]"


@pytest.mark.parametrize(
    "settings", [{"max_events_per_second": 1, "burst": 1}, {"allow_uids": (os.getuid() + 1,)}]
)
async def test_what_was_let_in_before_a_reload_is_not_refused_after_it(settings: Any, tmp_path: Path) -> None:
    """Rates and users were asked when it was read; what another agent read and could not put is taken."""
    app, now = stream(tmp_path, **settings), Instant(10, 20, "boot")
    ours, theirs = socket.socketpair()
    left = HandedClient(
        descriptor=theirs.detach(),
        first=False,
        unfinished=Unfinished(b""),
        totals=Totals(),
        unsent=b"",
        reads=[Read(line() * 5, now)],
    )
    handed = HandedSource(place=place_of(app), clients=[left], reads=[Read(line() * 7, now)])
    with ours:
        async with taking(app, handed=handed) as taken:
            await taken.settled(12)
            assert taken.total("accepted") == 12
