"""Measures the agent as a whole, from a client's `send` to the sink's 200, against what it promises.

    python bench/pipeline.py [--runs 3] [--only NAME]... [--json]

Everything is measured from outside: CPU and memory of the agent from /proc, events and bytes by a sink
in C that opens every body. Durable (`durability = "full"`), validated, gzip. See bench/README.md.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
BUILD = HERE / "build"
TICKS = os.sysconf("SC_CLK_TCK")
MIB = 1024 * 1024
# Patience for anything to happen; a machine too slow for it is too slow to measure on.
PATIENCE = 300.0

Figures = dict[str, float]
# What a source calls the forms of the loader's lines.
FORMATS = {"rfc5424": "syslog", "rfc3164": "syslog"}


class Goal(NamedTuple):
    """What a figure must be at least (`>=`) or at most (`<=`)."""

    figure: str
    sign: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether it is."""
        return value >= self.bound if self.sign == ">=" else value <= self.bound


def build() -> None:
    """Compile the loader and the sink."""
    BUILD.mkdir(exist_ok=True)
    for name in ("loader", "sink"):
        source, program = HERE / f"{name}.c", BUILD / name
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            command = ["cc", "-O2", "-o", str(program), str(source), "-lz"]
            if subprocess.run(command, check=False).returncode:
                sys.exit("bench: a C compiler and zlib's header are needed: apt-get install gcc zlib1g-dev")


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that nobody has at this moment."""
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Sink:
    """The sink's process."""

    def __init__(self, port: int, folder: Path | None = None, *, strict: bool = False) -> None:
        self.port = port
        command = [str(BUILD / "sink"), str(port), str(folder or "-"), *(["strict"] if strict else [])]
        self._process = subprocess.Popen(command)
        wait_until(lambda: self.totals() is not None)

    def totals(self, path: str = "") -> Figures | None:
        """What it has taken; None where it does not answer yet."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=60) as answer:
                found: Figures = json.load(answer)
        except OSError:
            return None
        return found

    def events(self) -> int:
        """How many events it has taken."""
        totals = self.totals()
        return int(totals["events"]) if totals else 0

    def settle(self) -> Figures:
        """What it has taken once nothing more has come for half a second."""
        before = None
        while True:
            seen = self.totals("seen")
            if seen is not None and seen == before:
                break
            before = seen
            time.sleep(0.5)
        totals = self.totals()
        assert totals is not None
        return totals

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Agent:
    """The agent's process on a temporary buffer; `ready` is the seconds until its stream took a client."""

    def __init__(self, folder: Path, host: str, protocol: str = "batch", form: str = "json") -> None:
        self.folder = folder
        self.udp, self.tcp, self.http = free_port(socket.SOCK_DGRAM), free_port(), free_port()
        config = folder / "config.toml"
        config.write_text(
            f"""
            [project]
            host = "{host}"
            api_key = "phc_bench"
            [[source]]
            kind = "unix_stream"
            path = "{folder}/s"
            format = "{form}"
            [[source]]
            kind = "unix_datagram"
            path = "{folder}/d"
            [[source]]
            kind = "udp"
            listen = "127.0.0.1:{self.udp}"
            format = "{form}"
            [[source]]
            kind = "tcp"
            listen = "127.0.0.1:{self.tcp}"
            [[source]]
            kind = "http"
            listen = "127.0.0.1:{self.http}"
            [buffer]
            path = "{folder}/buffer.db"
            max_size = "8 GiB"
            [delivery]
            protocol = "{protocol}"
            backoff_base = "200 ms"
            [admin]
            socket = "{folder}/admin"
            listen = ""
            """
        )
        began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agent", "run", "--config", str(config)], stderr=subprocess.DEVNULL
        )
        wait_until(self._takes_clients, pause=0.002)
        self.ready = time.monotonic() - began
        wait_until(lambda: (folder / "admin").exists() and self.status() is not None)

    def _takes_clients(self) -> bool:
        if self._process.poll() is not None:
            sys.exit("bench: the agent did not start: run it by hand with the same configuration")
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.folder / "s")) == 0

    def cpu(self) -> float:
        """Seconds of CPU, user and system, of the whole process so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self, which: str) -> float:
        """VmRSS or VmHWM in MiB."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(which + ":"):
                return int(line.split()[1]) / 1024
        raise LookupError(which)

    def status(self) -> dict[str, Any] | None:
        """The status document, over the admin socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self.folder / "admin"))
                sock.sendall(b"GET /status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
            except OSError:
                return None
        found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
        return found

    def total(self, name: str) -> int:
        """One total of its books."""
        status = self.status()
        return int(status["books"][name]) if status else 0

    def dropped(self) -> int:
        """What the kernel dropped."""
        status = self.status()
        return sum(source["dropped"] or 0 for source in status["sources"]) if status else 0

    def disk(self) -> int:
        """Bytes of the buffer's files."""
        return sum(path.stat().st_size for path in self.folder.glob("buffer.db*"))

    def close(self) -> None:
        """Stop it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def wait_until(condition: Callable[[], bool], pause: float = 0.02) -> None:
    """Return when it holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("bench: waited in vain")
        time.sleep(pause)


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder on this disk for a block."""
    found = Path(tempfile.mkdtemp(prefix="run-", dir=BUILD))
    try:
        yield found
    finally:
        shutil.rmtree(found)


@contextmanager
def pipeline(
    *, dump: bool = False, strict: bool = False, protocol: str = "batch", form: str = "json"
) -> Iterator[tuple[Agent, Sink]]:
    """An agent before a sink for a block."""
    with folder() as place:
        (place / "bodies").mkdir()
        sink = Sink(free_port(), place / "bodies" if dump else None, strict=strict)
        agent = Agent(place, f"http://127.0.0.1:{sink.port}", protocol, FORMATS.get(form, form))
        try:
            yield agent, sink
        finally:
            agent.close()
            sink.close()


def load(agent: Agent, kind: str, count: int, rate: int = 0, poison: int = 0, form: str = "json") -> float:
    """Send events into one of the agent's sources; when the first one left.

    Of every `poison` events PostHog refuses one.
    """
    ports = {"udp": agent.udp, "tcp": agent.tcp, "tcp_ack": agent.tcp, "http": agent.http}
    path = f"{agent.folder}/{'d' if kind == 'unix_datagram' else 's'}"
    address = str(ports.get(kind, path))
    command = [str(BUILD / "loader"), kind, address, str(count), str(rate), str(poison), form]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(done.stdout.split()[0])


def flood(kind: str, count: int, rate: int = 0, protocol: str = "batch", form: str = "json") -> Figures:
    """Events through one source, until the sink has them all."""
    with pipeline(protocol=protocol, form=form) as (agent, sink):
        load(agent, kind, 2000, form=form)
        wait_until(lambda: sink.events() == 2000)
        cpu = agent.cpu()
        began = load(agent, kind, count, rate, form=form)
        wait_until(lambda: sink.settle()["events"] + agent.dropped() >= 2000 + count)
        totals = sink.settle()
        return {
            "events/s": count / (totals["last"] - began),
            "CPU s/M": (agent.cpu() - cpu) / count * 1e6,
            "lost": 2000 + count - totals["events"],
            "RSS MiB": agent.memory("VmHWM"),
        }


def poisoned() -> Figures:
    """A flood in which one event in 10,000 is poison, beside the same without: the share of throughput left.

    The sink opens each body before it answers, so both are slower than `stream`.
    """
    rates = []
    for poison in (0, 10_000):
        with pipeline(strict=True) as (agent, sink):
            load(agent, "unix_stream", 2000)
            wait_until(lambda sink=sink: sink.events() == 2000)  # type: ignore[misc]  # this round's
            count, dead = 1_000_000, 1_000_000 // poison if poison else 0
            began = load(agent, "unix_stream", count, 0, poison)
            wait_until(lambda sink=sink, dead=dead: sink.settle()["events"] >= 1_002_000 - dead)  # type: ignore[misc]
            wait_until(lambda agent=agent, dead=dead: agent.total("dead") == dead)  # type: ignore[misc]
            rates.append(count / (sink.settle()["last"] - began))
    return {"throughput left": rates[1] / rates[0], "events/s": rates[1]}


def newer() -> Figures:
    """The CPU of a flood by the v1 protocol, by that of one by `/batch`."""
    by = {protocol: flood("unix_stream", 1_000_000, protocol=protocol)[CPU] for protocol in ("batch", "v1")}
    return {"CPU ratio": by["v1"] / by["batch"], CPU: by["v1"]}


def steady(kind: str) -> Figures:
    """1,000 events a second for ten seconds: the share of one core."""
    with pipeline() as (agent, sink):
        load(agent, kind, 2000, 1000)
        wait_until(lambda: sink.events() == 2000)
        cpu, began = agent.cpu(), time.monotonic()
        load(agent, kind, 10_000, 1000)
        wait_until(lambda: sink.events() == 12_000)
        return {"core %": (agent.cpu() - cpu) / (time.monotonic() - began) * 100}


def drain(backlog: int) -> Figures:
    """A backlog that was taken while PostHog was away, delivered when it is back."""
    with folder() as place:
        port = free_port()
        agent = Agent(place, f"http://127.0.0.1:{port}")
        load(agent, "unix_stream_ack", backlog)
        figures = {"bytes/event": agent.disk() / backlog, "RSS MiB": agent.memory("VmHWM")}
        cpu = agent.cpu()
        sink = Sink(port)
        wait_until(lambda: sink.settle()["events"] >= backlog)
        totals = sink.settle()
        figures["events/s"] = totals["events"] / (totals["last"] - totals["first"])
        figures["CPU s/M"] = (agent.cpu() - cpu) / backlog * 1e6
        figures["lost"] = backlog - totals["events"]
        agent.close()
        sink.close()
        return figures


def quiet() -> Figures:
    """100 events a second: the bytes on the wire beside those of the same batches gzipped whole."""
    with pipeline(dump=True) as (agent, sink):
        load(agent, "udp", 2000, 100)
        wait_until(lambda: sink.events() == 2000)
        ours = whole = 0
        for body in (agent.folder / "bodies").iterdir():
            packed = body.read_bytes()
            ours += len(packed)
            whole += len(zlib.compress(zlib.decompress(packed, 31), 6, 31))
        return {"wire ratio": ours / whole}


def idle() -> Figures:
    """A start on an empty buffer, and what it takes when nothing happens."""
    with pipeline() as (agent, _):
        time.sleep(2)
        return {"ready s": agent.ready, "RSS MiB": agent.memory("VmRSS")}


CPU, RATE, RSS = "CPU s/M", "events/s", "RSS MiB"


def rows(backlog: int) -> dict[str, tuple[Callable[[], Figures], list[Goal]]]:
    """Each row: how it is measured, and what it should be."""
    return {
        "stream": (
            lambda: flood("unix_stream", 1_000_000),
            [Goal(RATE, ">=", 200_000), Goal(CPU, "<=", 4.5), Goal("lost", "<=", 0), Goal(RSS, "<=", 100)],
        ),
        "stream_ack": (
            lambda: flood("unix_stream_ack", 1_000_000),
            [Goal(RATE, ">=", 200_000), Goal(CPU, "<=", 4.5), Goal("lost", "<=", 0), Goal(RSS, "<=", 100)],
        ),
        "datagram": (
            lambda: flood("unix_datagram", 500_000),
            [Goal(RATE, ">=", 100_000), Goal(CPU, "<=", 7), Goal("lost", "<=", 0), Goal(RSS, "<=", 100)],
        ),
        "udp": (
            lambda: flood("udp", 500_000, 100_000),
            [Goal(CPU, "<=", 7), Goal("lost", "<=", 0), Goal(RSS, "<=", 100)],
        ),
        "tcp": (
            lambda: flood("tcp", 1_000_000),
            [Goal(RATE, ">=", 200_000), Goal(CPU, "<=", 4.5), Goal("lost", "<=", 0), Goal(RSS, "<=", 100)],
        ),
        "logfmt": (
            lambda: flood("unix_stream", 500_000, form="logfmt"),
            [Goal(CPU, "<=", 12), Goal("lost", "<=", 0), Goal(RSS, "<=", 100)],
        ),
        "rfc5424": (
            lambda: flood("unix_stream", 500_000, form="rfc5424"),
            [Goal(CPU, "<=", 12), Goal("lost", "<=", 0), Goal(RSS, "<=", 100)],
        ),
        "rfc3164": (
            lambda: flood("unix_stream", 500_000, form="rfc3164"),
            [Goal(CPU, "<=", 12), Goal("lost", "<=", 0), Goal(RSS, "<=", 100)],
        ),
        "http": (
            lambda: flood("http", 500_000),
            [Goal(RATE, ">=", 60_000), Goal("lost", "<=", 0), Goal(RSS, "<=", 110)],
        ),
        "steady_stream": (lambda: steady("unix_stream"), [Goal("core %", "<=", 8)]),
        "steady_datagram": (lambda: steady("unix_datagram"), [Goal("core %", "<=", 8)]),
        "steady_udp": (lambda: steady("udp"), [Goal("core %", "<=", 8)]),
        "drain": (
            lambda: drain(backlog),
            [
                Goal(RATE, ">=", 300_000),
                Goal(CPU, "<=", 2),
                Goal("lost", "<=", 0),
                Goal(RSS, "<=", 100),
                Goal("bytes/event", "<=", 100),
            ],
        ),
        "poison": (poisoned, [Goal("throughput left", ">=", 0.8)]),
        "v1": (newer, [Goal("CPU ratio", "<=", 1.3)]),
        "quiet": (quiet, [Goal("wire ratio", "<=", 1.2)]),
        "idle": (idle, [Goal("ready s", "<=", 0.5), Goal(RSS, "<=", 56)]),
    }


def main() -> None:
    """Measure, and print a table or a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=3, help="of each row; the medians are told")
    parser.add_argument("--only", action="append", help="one row, by its name; may be given again")
    parser.add_argument("--backlog", type=int, default=1_000_000, help="events of the row `drain`")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    build()
    found: dict[str, Figures] = {}
    if not arguments.json:
        print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
        print("| row | figure | median | goal | |")
        print("|---|---|---|---|---|")
    for name, (measure, goals) in rows(arguments.backlog).items():
        if arguments.only and name not in arguments.only:
            continue
        runs = [measure() for _ in range(arguments.runs)]
        found[name] = {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
        if arguments.json:
            continue
        for figure, sign, bound in goals:
            value = found[name][figure]
            verdict = "ok" if Goal(figure, sign, bound).met(value) else "MISSED"
            shown = f"{value:,.0f}" if value >= 1000 or figure == "lost" else f"{value:.2f}"
            print(f"| {name} | {figure} | {shown} | {sign} {bound:,} | {verdict} |", flush=True)
    if arguments.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
