"""UDP and Unix datagrams: one event each, or several, and what the kernel does to them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from sources import PROJECT, datagram, line, taking, udp

from agent import config
from agent.accept.drain import UNIX_BYTES
from agent.accept.source import Source, bound
from agent.buffer import BufferBroken, Entry
from agent.buffer.memory import MemoryBuffer
from agent.clock import Clock

SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python has no name for it


@contextmanager
def sending(source: Source) -> Iterator[socket.socket]:
    """A socket that is connected to the source."""
    unix = isinstance(source.settings, config.UnixDatagram)
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        host, _, port = source.address.rpartition(":")
        sock.connect(source.address if unix else (host, int(port)))
        yield sock


@pytest.fixture(params=["udp", "unix_datagram"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> config.Source:
    """Each kind of datagram source."""
    return udp() if request.param == "udp" else datagram(tmp_path)


async def send(sock: socket.socket, data: bytes) -> None:
    await trio.to_thread.run_sync(sock.send, data)


async def test_datagrams_become_events(settings: config.Source) -> None:
    """One event a datagram or several, one a line; the last newline may be missing."""
    async with taking(settings) as taken:
        with sending(taken.source) as sender:
            for data in (line(1), line(2).rstrip(), line(3) + line(4), b"", b"\n\n", line(5) + b"\r\n"):
                await send(sender, data)
        events = await taken.events(5)
        assert sorted(event["properties"]["n"] for event in events) == [1, 2, 3, 4, 5]
        assert (taken.total("received"), taken.total("accepted")) == (5, 5)


async def test_an_object_cut_by_a_datagrams_end_is_refused_alone(settings: config.Source) -> None:
    """The half of one sender's object never joins what another sends next."""
    whole = b'{"event":"e","distinct_id":"d"}'
    async with taking(settings) as taken:
        with sending(taken.source) as sender:
            for data in (whole[:20], whole[20:], b'{"event":"a"', b',"distinct_id":"d"}', line(1)):
                await send(sender, data)
        await taken.settled(5)
        assert (taken.total("accepted"), taken.total("rejected", "malformed_json")) == (1, 4)


async def test_a_datagram_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    """One longer than max_event is counted as too large, whatever the kernel left of it."""
    async with taking(datagram(tmp_path, max_event=2000)) as taken:
        with sending(taken.source) as sender:
            await send(sender, b"x" * 5000)
            await send(sender, line(1))
        await taken.settled(2)
        assert (taken.total("accepted"), taken.total("rejected", "too_large")) == (1, 1)


async def test_a_datagram_of_many_events_may_be_larger_than_one(settings: config.Source) -> None:
    """`max_event` bounds an event, not the datagram in which it comes with others."""
    small = msgspec.structs.replace(settings, max_event=1000)
    async with taking(small) as taken:
        with sending(taken.source) as sender:
            await send(sender, b"".join(line(number) for number in range(100)))
        await taken.settled(100)
        assert taken.total("accepted") == 100


async def test_what_a_huge_datagram_lost_is_counted(tmp_path: Path) -> None:
    """Of one larger than can be read the whole lines are taken, and its end is one rejection."""
    async with taking(datagram(tmp_path)) as taken:
        with sending(taken.source) as sender:
            try:
                sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 * 2**20)
            except PermissionError:
                pytest.skip("only root may send datagrams so large")
            whole = line(1)
            await send(sender, whole * (UNIX_BYTES // len(whole) + 100))
            await send(sender, b"x" * (UNIX_BYTES + 100))
            await send(sender, line(2))
        while not taken.total("rejected", "too_large") or taken.buffer.stats().events < 2:
            await trio.sleep(0.01)
        expected = UNIX_BYTES // len(whole) + 1
        await taken.settled(expected + 2)
        assert taken.total("accepted") == expected
        assert (taken.total("rejected", "truncated"), taken.total("rejected", "too_large")) == (1, 1)


async def test_the_largest_udp_datagram_is_an_event() -> None:
    """65,507 bytes of payload arrive whole."""
    async with taking(udp()) as taken:
        with sending(taken.source) as sender:
            await send(sender, line(1, properties={"long": "x" * 65_400}))
        [event] = await taken.events(1)
        assert len(event["properties"]["long"]) == 65_400


async def test_what_is_in_the_kernels_queue_at_a_stop_is_taken(settings: config.Source) -> None:
    """Datagrams that were sent before the stop are put."""
    async with taking(settings) as taken:
        with sending(taken.source) as sender:
            for number in range(8):
                sender.send(line(number))
        taken.stop.set()
        await taken.settled(8)
        assert taken.total("accepted") == 8


async def test_what_the_kernel_drops_is_counted() -> None:
    """Also when no datagram follows; sent = received + dropped."""
    count = 500
    async with taking(udp(receive_buffer=4096)) as taken:
        assert taken.source.granted == 4096
        with sending(taken.source) as sender:
            for number in range(count):  # no checkpoint between: nobody reads meanwhile
                sender.send(line(number))
        while taken.total("received") + taken.total("dropped") < count:
            await trio.sleep(0.01)
        assert taken.total("dropped") > 0
        assert taken.total("received") == taken.total("accepted") == count - taken.total("dropped")


class FailingOnce(MemoryBuffer):
    """A buffer whose first write of the kernel's count fails."""

    failed = False

    async def note_drops(self, source: str, socket: str, total: int) -> None:
        """See `Buffer.note_drops`."""
        if not self.failed:
            self.failed = True
            raise BufferBroken("database or disk is full")
        await super().note_drops(source, socket, total)


async def test_drops_that_cannot_be_booked_are_booked_later() -> None:
    """A disk that is full for a while hides none, and ends no source."""
    settings = udp(receive_buffer=4096)
    buffer = FailingOnce(config.Buffer(path="/memory", kind="memory"))
    with bound(settings) as own, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(100):
            sender.sendto(line(number), own.sock.getsockname())
        source = Source(settings, PROJECT, [own], buffer, Clock())
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            nursery.start_soon(source.run, stop)
            with trio.fail_after(20):
                while not (dropped := buffer.books()[Entry("dropped", "app", "")]):
                    await trio.sleep(0.01)
            stop.set()
    assert buffer.failed
    assert dropped == 100 - buffer.books()[Entry("received", "app", "")]


async def test_a_full_buffer_stops_the_reading(tmp_path: Path) -> None:
    """Nothing is dropped by us: the sender of a Unix datagram waits."""
    async with taking(datagram(tmp_path), max_size=1) as taken:
        with sending(taken.source) as sender:
            sender.setblocking(False)
            sent = 0
            with trio.move_on_after(3) as patience:
                while True:
                    try:
                        sender.send(line(sent, properties={"long": "x" * 100_000}))
                        sent += 1
                    except BlockingIOError:
                        with trio.move_on_after(0.2) as stuck:
                            await trio.lowlevel.wait_writable(sender)
                        if stuck.cancelled_caught:
                            break
            assert not patience.cancelled_caught
        taken.buffer.close_door()
        await taken.settled(sent)
        assert taken.total("shed", "shutdown") == sent
