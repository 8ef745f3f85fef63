"""The agent as a real process: from sockets to a sink, through kills, stops and full buffers."""

import json
import signal
import socket
import sqlite3
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
import trio
from processes import configure, run, running
from sources import line

from agent.sink import Fault, Reply, Sink, serving

ASK = b'{"ack":true}\n'


async def test_the_whole_way(tmp_path: Path) -> None:
    """Events of every source arrive once, the books balance, and a stop is quick and leaves nothing."""
    sink = Sink()
    async with serving(sink) as url, running(configure(tmp_path, url)) as agent:
        status = await agent.status()
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(agent.stream)
            stream.sendall(line(1) + b"nonsense\n" + line(2))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
            datagram.sendto(line(3), agent.datagram)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            host, port = status["sources"][2]["address"].split(":")
            udp.sendto(line(4), (host, int(port)))
        status = await agent.until(delivered=4)
        assert status["books"] == {
            "received": 5,
            "accepted": 4,
            "rejected": 1,
            "shed": {},
            "delivered": 4,
            "dead": 0,
            "replayed": 0,
            "buffered": 0,
            "balanced": True,
        }
        assert status["rejects"][0]["reason"] == "malformed_json"
        assert sorted(event.properties["n"] for event in sink.events) == [1, 2, 3, 4]
        assert {event.properties["$lib"] for event in sink.events} == {"capture-agent"}
        agent.send(signal.SIGTERM)
        with trio.fail_after(5):
            assert await agent.process.wait() == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "buffer.db",
            "buffer.db.lock",
            "buffer.db.reserve",
            "config.toml",
            "log",
        ]
        assert "phc_test" not in agent.log()


class Flood:
    """A client that sends events with uuids of its own as fast as it can, and hears what is acknowledged."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.accepted = 0

    async def run(self, path: str) -> None:
        """Until the connection breaks."""
        async with await trio.open_unix_socket(path) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(self._hear, stream)
            with suppress(trio.BrokenResourceError):
                await stream.send_all(ASK)
                while True:
                    some = [str(uuid4()) for _ in range(200)]
                    self.sent += some
                    await stream.send_all(b"".join(line(uuid=uuid) for uuid in some))

    async def _hear(self, stream: trio.SocketStream) -> None:
        text = b""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for some in stream:
                *lines, text = (text + some).split(b"\n")
                for one in lines:
                    self.accepted = json.loads(one).get("accepted", self.accepted)


@pytest.mark.parametrize("sink_is_there", [True, False])
async def test_a_kill_in_a_flood_loses_nothing_acknowledged(tmp_path: Path, sink_is_there: bool) -> None:
    """After kill -9 and a restart every acknowledged event arrives, with its uuid, and the books balance."""
    owed: set[str] = set()
    down = not sink_is_there
    sink = Sink(keep=10**6, script=lambda _request: Reply(503) if down else None)
    async with serving(sink) as url:
        config = configure(tmp_path, url)
        for _ in range(2):
            floods = [Flood() for _ in range(3)]
            async with running(config) as agent, trio.open_nursery() as nursery:
                for flood in floods:
                    nursery.start_soon(flood.run, agent.stream)
                with trio.fail_after(30):
                    while any(flood.accepted < 3000 for flood in floods):
                        await trio.sleep(0.01)
                agent.send(signal.SIGKILL)
            for flood in floods:  # only what was acknowledged is owed
                owed.update(flood.sent[: flood.accepted])
        down = False
        async with running(config) as agent:
            with trio.fail_after(60):
                while (status := await agent.status())["books"]["buffered"]:
                    await trio.sleep(0.05)
            assert status["books"]["balanced"]
            assert status["books"]["delivered"] == status["books"]["accepted"] >= len(owed) >= 18_000
        assert owed <= {event.uuid for event in sink.events}


async def test_a_stop_in_an_outage_is_quick_and_loses_nothing(tmp_path: Path) -> None:
    """A server that never answers does not hold a stop up, and a restart delivers what was left."""
    sink = Sink(script=lambda _request: Fault.STALL)
    async with serving(sink) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            assert run("send", "e", "--socket", agent.stream).returncode == 0
            await sink.wait_until(lambda: sink.requests > 0)
            began = time.monotonic()
            agent.send(signal.SIGINT)
            assert await agent.process.wait() == 0
            assert time.monotonic() - began < 5
        sink._script = None
        async with running(config) as agent:
            status = await agent.until(delivered=1)
            assert status["books"]["balanced"]
        assert sink.taken == 1


async def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    """Whoever insists is obeyed; what was acknowledged is on disk all the same."""
    sink = Sink(script=lambda _request: Fault.STALL)
    async with serving(sink) as url, running(configure(tmp_path, url)) as agent:
        assert run("send", "e", "--socket", agent.stream).returncode == 0
        await sink.wait_until(lambda: sink.requests > 0)
        agent.send(signal.SIGTERM)
        await trio.sleep(0.1)
        began = time.monotonic()
        agent.send(signal.SIGTERM)
        await agent.process.wait()
        assert time.monotonic() - began < 1
    with sqlite3.connect(tmp_path / "buffer.db") as database:
        assert database.execute("SELECT sum(events) FROM chunk").fetchone() == (1,)


async def test_a_full_buffer_and_a_stop(tmp_path: Path) -> None:
    """Senders wait, files keep their bound, and a stop counts what found no room, on a busy host too."""
    sink = Sink(script=lambda _request: Reply(503))
    more = f'[buffer]\npath = "{tmp_path}/buffer.db"\nmax_size = "16 MiB"'
    async with serving(sink) as url:
        config = configure(tmp_path, url, more)
        async with running(config) as agent, trio.open_nursery() as nursery:
            flood = Flood()
            nursery.start_soon(flood.run, agent.stream)
            with trio.fail_after(60):
                while (await agent.status())["buffer"]["waiting"] == 0:
                    await trio.sleep(0.05)
            files = sum(path.stat().st_size for path in tmp_path.glob("buffer.db*"))
            assert files <= 16 * 2**20
            began = time.monotonic()
            agent.send(signal.SIGTERM)
            await trio.sleep(1.2)  # within the grace, the host turns to something else
            agent.send(signal.SIGSTOP)
            await trio.sleep(1)
            agent.send(signal.SIGCONT)
            assert await agent.process.wait() == 0
            assert time.monotonic() - began < 5
        sink._script = None
        async with running(config) as agent:
            with trio.fail_after(60):
                while (status := await agent.status())["books"]["buffered"]:
                    await trio.sleep(0.05)
            assert status["books"]["balanced"]
            assert status["books"]["shed"]["shutdown"] > 0
            assert status["books"]["delivered"] >= flood.accepted


@pytest.mark.parametrize(
    ("when_full", "words"),
    [
        ("drop_oldest", "the oldest events are dropped for new ones"),
        ("drop_newest", "new events are dropped"),
    ],
)
async def test_a_full_buffer_that_drops_says_so(tmp_path: Path, when_full: str, words: str) -> None:
    """Once in the log, and as long as it does it in what the commands say; senders notice nothing of it."""
    sink = Sink(script=lambda _request: Reply(503))
    more = f'[buffer]\npath = "{tmp_path}/buffer.db"\nmax_size = "16 MiB"\nwhen_full = "{when_full}"'
    async with serving(sink) as url, trio.open_nursery() as nursery:
        config = configure(tmp_path, url, more)
        async with running(config) as agent:
            status = await agent.status()
            assert (status["buffer"]["dropping"], status["buffer"]["filled"]) == (0, 0)
            nursery.start_soon(Flood().run, agent.stream)
            with trio.fail_after(60):
                while not (status := await agent.status())["buffer"]["dropping"]:
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                assert status["buffer"]["filled"] > 0.9
                assert f"the buffer is full, and {words}" in run("status", "--config", str(config)).stdout
                assert f"it is full, and {words}" in run("doctor", "--config", str(config)).stdout
                assert agent.log().count(f"the buffer is full; {words}") == 1
                status = await agent.status()
                assert status["buffer"]["dropping"] == sum(status["books"]["shed"].values())
                assert status["books"]["balanced"]


async def test_events_grow_too_old_during_an_outage(tmp_path: Path) -> None:
    """`max_age` holds for those that a worker tries to deliver all the while."""
    sink = Sink(script=lambda _request: Reply(503))
    more = f'[buffer]\npath = "{tmp_path}/buffer.db"\nmax_age = "1 s"'
    async with serving(sink) as url, running(configure(tmp_path, url, more)) as agent:
        run("send", "--stdin", "--socket", agent.stream, text=line().decode() * 50)
        await sink.wait_until(lambda: sink.requests > 0)
        status = await agent.until(buffered=0)
        assert status["books"]["shed"] == {"expired": 50}
        assert status["books"]["balanced"]


async def test_clients_leave_descriptors_for_delivery(tmp_path: Path) -> None:
    """With few open files allowed, clients that stay wait their turn; delivery and the pages go on."""
    few = ("sh", "-c", 'ulimit -n 80; exec "$@"', "sh")
    async with serving(Sink()) as url, running(configure(tmp_path, url), before=few) as agent:
        clients = [socket.socket(socket.AF_UNIX) for _ in range(100)]
        for client in clients:
            client.connect(agent.stream)
            client.sendall(line())
        status = await agent.status()
        taken = status["sources"][0]["connections"]
        assert 0 < taken < 30
        status = await agent.until(delivered=taken)
        for client in clients:
            client.close()
        await agent.until(delivered=100)
        assert "raise it: LimitNOFILE=" in agent.log()


async def test_a_second_agent_is_told(tmp_path: Path) -> None:
    """The sockets and the buffer of a living agent are its own: a second one says so and exits."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            second = run("run", "--config", str(config))
            assert second.returncode == 1
            assert "another program listens here" in second.stderr
            other = tmp_path / "other"
            other.mkdir()
            file = configure(other, url, f'[buffer]\npath = "{tmp_path}/buffer.db"')
            second = run("run", "--config", str(file))
            assert second.returncode == 75
            assert f"another agent owns this buffer (process {agent.process.pid})" in second.stderr
            assert run("send", "e", "--socket", agent.stream).returncode == 0


async def test_a_dead_agents_socket_files_are_no_obstacle(tmp_path: Path) -> None:
    """After kill -9 the next start needs no human."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        for _ in range(2):
            async with running(config) as agent:
                assert run("send", "e", "--socket", agent.stream).returncode == 0
                agent.send(signal.SIGKILL)
                await agent.process.wait()


async def test_events_of_a_project_that_is_gone_wait_and_say_so(tmp_path: Path) -> None:
    """They are held as unconfigured, shown so, and delivered when the project is back."""
    down = True
    sink = Sink(script=lambda _request: Reply(503) if down else None)
    async with serving(sink) as url:
        config = configure(tmp_path, url)
        text = config.read_text()
        async with running(config) as agent:
            assert run("send", "e", "--socket", agent.stream).returncode == 0
            agent.send(signal.SIGTERM)
            await agent.process.wait()
        config.write_text(text.replace("[project]", '[project]\nname = "new"'))
        down = False
        async with running(config) as agent:
            assert run("send", "e", "--socket", agent.stream).returncode == 0
            status = await agent.until(delivered=1)
            assert status["books"]["balanced"]
            assert [(one["name"], one["held"] and one["held"]["reason"]) for one in status["projects"]] == [
                ("new", None),
                ("default", "unconfigured"),
            ]
            held = 'delivery_held{project="default",reason="unconfigured"} 1.0'
            assert held in await _scrape(agent.folder / "admin.sock")
            assert "unconfigured" in run("status", "--config", str(config)).stdout
            agent.send(signal.SIGTERM)
            await agent.process.wait()
        config.write_text(text)
        async with running(config) as agent:
            await agent.until(delivered=2)


async def test_metrics_say_what_the_books_say(tmp_path: Path) -> None:
    """Every series exists from the first scrape, and the identities hold in them."""
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        text = config.read_text().replace('listen = ""', 'listen = "127.0.0.1:0"')
        config.write_text(text)
        async with running(config) as agent:
            run("send", "--stdin", "--socket", agent.stream, text=line().decode() * 50 + "[]\n")
            await agent.until(delivered=50)
            metrics = await _scrape(agent.folder / "admin.sock")
            for odd in ("application/openmetrics-text; version=x.y.z", "a/b;q=z", ","):
                assert "events_received" in await _scrape(agent.folder / "admin.sock", odd)
    samples = defaultdict[str, float](float)
    for sample in metrics.splitlines():
        if not sample.startswith("#"):
            name, _, value = sample.rpartition(" ")
            samples[name] += float(value)
    prefix = "capture_agent_"
    assert samples[prefix + 'events_received_total{source="unix_stream"}'] == 51
    assert samples[prefix + 'events_rejected_total{reason="not_an_object",source="unix_stream"}'] == 1
    assert samples[prefix + 'events_delivered_total{project="default"}'] == 50
    assert samples[prefix + "buffer_events"] == 0
    assert samples[prefix + 'requests_total{project="default",status="200"}'] >= 1
    assert prefix + 'delivery_held{project="default",reason="key"} 0.0' in metrics
    assert prefix + 'events_dead_total{project="default",reason="rejected"} 0.0' in metrics


async def _scrape(path: Path, accept: str = "*/*") -> str:
    import httpx

    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport) as client:
        answer = await client.get("http://agent/metrics", headers={"Accept": accept})
    assert answer.status_code == 200
    return answer.text
