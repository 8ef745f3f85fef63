"""The metrics in the formats that Prometheus reads, and what config/monitoring makes of them.

Rules are checked by promtool, and every query of the dashboard is asked of a Prometheus that scrapes an
agent; both are in Debian's package prometheus.
"""

import json
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import trio
from processes import Running, configure, running
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families as text_parser
from prometheus_client.registry import Collector
from sources import line

from agent.buffer import Books, Stats
from agent.metrics import Metrics, Pulled
from agent.sink import Sink, serving

Parser = Callable[[str], Iterable[Metric]]
read_text: Parser = text_parser
read_openmetrics: Parser = openmetrics_parser

FOLDER = Path(__file__).parents[1] / "config" / "monitoring"
RULES = (FOLDER / "alerts.yml").read_text()
RULE_TESTS = (FOLDER / "alerts_test.yml").read_text()
ALERTS = re.findall(r"- alert: (\w+)\n((?: {8}.*\n|\n)+)", RULES)
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    (panel["title"], query["expr"], query["legendFormat"]) for panel in PANELS for query in panel["targets"]
]
# Empty where all is well.
EMPTY = {"Time until full", "Holds, by project and reason"}
# Grafana's ids of what the panels show: events and requests a second, bytes and bytes a second (IEC), counts.
UNITS = {"eps", "reqps", "bytes", "binBps", "s", "short", "none", "percentunit"}

with_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing (Debian's package prometheus)"
)
with_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is missing (Debian's package prometheus)"
)


def promtool(*arguments: str, text: str = "") -> str:
    """Its complaints; empty when it has none."""
    done = subprocess.run(
        ["promtool", *arguments], check=False, capture_output=True, text=True, input=text, timeout=60
    )
    return "" if done.returncode == 0 and not done.stderr else done.stdout + done.stderr


class Shown(NamedTuple):
    """What a busy agent shows at /metrics, as text and as OpenMetrics."""

    text: str
    openmetrics: str

    @property
    def names(self) -> set[str]:
        """Every series and family."""
        families = list(read_text(self.text))
        return {sample.name for family in families for sample in family.samples} | set(
            re.findall(r"^# TYPE (\w+)", self.text, re.MULTILINE)
        )


def free_port() -> int:
    """One that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


@asynccontextmanager
async def observed(folder: Path) -> AsyncIterator[tuple[Running, str]]:
    """An agent with every kind of source, and the address of its pages; an event with n = 13 is refused."""
    async with serving(Sink(reject_if=("n", "13"))) as url:
        file = configure(folder, url)
        port = free_port()
        kinds = "".join(f'[[source]]\nkind = "{kind}"\nlisten = "127.0.0.1:0"\n' for kind in ("tcp", "http"))
        settings = file.read_text().replace('listen = ""', f'listen = "127.0.0.1:{port}"')
        file.write_text(settings.replace("[admin]", f"{kinds}[admin]"))
        async with running(file) as agent:
            yield agent, f"127.0.0.1:{port}"


async def keep_busy(agent: Running) -> None:
    """Events that are delivered, one that is refused at the door, one that PostHog refuses."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(agent.stream)
        client.sendall(b"".join(map(line, range(10, 20))) + b"{}\n")
    await agent.until(received=11, delivered=9, dead=1)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    return trio.run(look_at_metrics, tmp_path_factory.mktemp("shown"))


async def look_at_metrics(folder: Path) -> Shown:
    """Both formats, of an agent that had something to do."""
    async with observed(folder) as (agent, address), httpx.AsyncClient() as client:
        await keep_busy(agent)
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        text = await client.get(f"http://{address}/metrics")
        openmetrics = await client.get(f"http://{address}/metrics", headers=accept)
    assert text.headers["Content-Type"].startswith("text/plain; version=")
    assert openmetrics.headers["Content-Type"].startswith("application/openmetrics-text; version=")
    return Shown(text.text, openmetrics.text)


class Again(Collector):
    """Shows families that were read."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


@with_promtool
def test_promtool_finds_no_fault_with_the_metrics(shown: Shown) -> None:
    """Names, units and help texts are as they should be, by both formats.

    `promtool check metrics` reads the text format only; so what OpenMetrics says is told it in that.
    """
    assert promtool("check", "metrics", text=shown.text) == ""
    registry = CollectorRegistry()
    registry.register(Again(list(read_openmetrics(shown.openmetrics))))
    assert promtool("check", "metrics", text=exposition.generate_latest(registry).decode()) == ""


def test_both_formats_tell_the_same(shown: Shown) -> None:
    """OpenMetrics is valid by a strict reader, and has every family of the text with its type and help."""

    def told(families: list[Metric]) -> dict[str, tuple[str, str, set[str]]]:
        return {
            family.name: (family.type, family.documentation, {sample.name for sample in family.samples})
            for family in families
        }

    openmetrics = told(list(read_openmetrics(shown.openmetrics)))
    assert all(name.startswith("capture_agent_") and text for name, (_, text, _) in openmetrics.items())
    for name, (kind, documentation, series) in told(list(read_text(shown.text))).items():
        if not name.endswith("_created"):  # in the text format these are families of their own
            assert openmetrics[name][:2] == (kind, documentation)
            assert series <= openmetrics[name][2]


def test_only_metrics_that_exist_are_used(shown: Shown) -> None:
    """Every name in the rules, in their tests and in the dashboard is one that an agent shows."""
    for file in sorted(FOLDER.iterdir()):
        used = set(re.findall(r"capture_agent_\w+", file.read_text()))
        assert used <= shown.names, file.name


def test_an_agent_that_works_says_so(shown: Shown) -> None:
    """Its buffer has room and can be written, nobody waits, the books balance."""
    values = {sample.name: sample.value for family in read_text(shown.text) for sample in family.samples}
    assert values["capture_agent_books_balanced"] == 1
    assert values["capture_agent_buffer_writable"] == 1
    assert values["capture_agent_buffer_waiting"] == 0
    assert 0 < values["capture_agent_buffer_free_bytes"] < values["capture_agent_buffer_limit_bytes"]


def test_trouble_is_shown() -> None:
    """A buffer that cannot be written, writes that wait, and books that do not balance are told as such."""
    metrics = Metrics()
    stats = Stats(
        events=1,
        bytes=1,
        disk_bytes=1,
        limit_bytes=1,
        oldest=0,
        dead_letters=0,
        free_bytes=0,
        waiting=3,
        unleased={},
    )
    none: Mapping[str, Any] = {}
    metrics.pull(
        Pulled(
            sources=(),
            projects=(),
            drops_known=lambda: (),
            turned_away=lambda: none,
            flag_calls=lambda: none,
            books=Books,
            stats=lambda: stats,
            balanced=lambda: False,
            writable=lambda: False,
            http_answers=dict,
            deliveries=lambda: (),
            clock_steps=lambda: 0,
            now=lambda: 5_000_000,
            build={},
        )
    )
    for name, value in (
        ("books_balanced", 0),
        ("buffer_writable", 0),
        ("buffer_waiting", 3),
        ("buffer_free_bytes", 0),
        ("buffer_oldest_seconds", 5),
    ):
        assert metrics.registry.get_sample_value(f"capture_agent_{name}") == value


@with_promtool
def test_the_rules_fire_when_they_should() -> None:
    """promtool accepts the configuration and the rules, and each of their cases ends as it says."""
    assert promtool("check", "config", str(FOLDER / "prometheus.yml")) == ""
    assert promtool("check", "rules", "--lint-fatal", str(FOLDER / "alerts.yml")) == ""
    assert promtool("test", "rules", str(FOLDER / "alerts_test.yml")) == ""


def test_each_alert_says_what_to_do() -> None:
    """It has a severity, a summary with its place, a description to act on, and a case in which it fires."""
    assert len(ALERTS) == RULES.count("- alert:") >= 12
    for name, body in ALERTS:
        assert re.search(r"labels: {severity: (warning|critical)}", body), name
        summary = re.search(r"summary: (.+)\n", body)
        assert summary is not None, name
        assert "$labels.instance" in summary[1] or "absent(" in body, name
        description = body.partition("description: >-\n")[2]
        assert "`" in description, f"{name} names no command, setting or file"
        assert name in RULE_TESTS, f"{name} has no case"


def test_the_dashboard_is_one_of_grafana_10() -> None:
    """It asks the Prometheus that a person chose; its panels lie side by side, each told apart."""
    assert DASHBOARD["schemaVersion"] >= 37  # Grafana 10.0 writes 38, and reads 37 as it is
    assert DASHBOARD["id"] is None
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "project"]
    assert variables["datasource"]["type"] == "datasource"
    sources = re.findall(r'"uid": "([^"]*)"', json.dumps(DASHBOARD))
    assert set(sources) == {
        "capture-agent",
        "-- Grafana --",
        "${datasource}",
    }  # its own, Grafana's, the chosen
    panels = DASHBOARD["panels"]
    assert max(Counter(panel["id"] for panel in panels).values()) == 1
    assert max(Counter(panel["title"] for panel in panels).values()) == 1
    cells = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_can_be_read(panel: dict[str, Any]) -> None:
    """It says what it shows, in a unit, of the chosen agents, with a legend where there are several lines."""
    assert panel["description"]
    assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert len({query["refId"] for query in panel["targets"]}) == len(panel["targets"])
    assert panel["datasource"]["uid"] == "${datasource}"
    for query in panel["targets"]:
        assert query["datasource"] == panel["datasource"]
        selectors = re.findall(r"{([^{}]*)}", query["expr"])
        assert selectors
        for selector in selectors:
            assert selector.startswith('job=~"$job", instance=~"$instance"')
        if panel["type"] in {"timeseries", "state-timeline"}:
            assert query["legendFormat"]
            kept = re.search(r"sum by \(([^)]*)\)", query["expr"])
            told = set(re.findall(r"{{(\w+)}}", query["legendFormat"]))
            if kept is not None:
                assert set(kept[1].split(", ")) - {"le"} == told


class Prometheus:
    """A running one; what its API answers."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer."""
        answer = await self._client.get(f"/api/v1/{path}", params=parameters)
        document = answer.json()
        assert document["status"] == "success", document
        return document["data"]

    async def result(self, query: str) -> list[dict[str, Any]]:
        """What a query finds now."""
        found: list[dict[str, Any]] = (await self.ask("query", query=query))["result"]
        return found

    async def until(self, query: str) -> list[dict[str, Any]]:
        """What it finds, once it finds something."""
        with trio.fail_after(30):
            while not (found := await self.result(query)):
                await trio.sleep(0.1)
        return found


@asynccontextmanager
async def prometheus(folder: Path, agent: str) -> AsyncIterator[Prometheus]:
    """It runs on the configuration of config/monitoring but for the agent's address and a short interval."""
    folder.mkdir()
    file = folder / "prometheus.yml"
    settings = (FOLDER / "prometheus.yml").read_text()
    file.write_text(settings.replace("127.0.0.1:9469\n\n", f"{agent}\n\n").replace(" 15s", " 500ms"))
    shutil.copy(FOLDER / "alerts.yml", folder)
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = await trio.lowlevel.open_process(command, stdout=log, stderr=log)
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            with trio.fail_after(30):
                while True:
                    try:
                        if (await client.get("/-/ready")).status_code == 200:
                            break
                    except httpx.TransportError:
                        assert process.poll() is None, (folder / "log").read_text()
                    await trio.sleep(0.05)
            yield Prometheus(client)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@with_prometheus
async def test_prometheus_scrapes_an_agent_and_answers_the_dashboard(tmp_path: Path) -> None:
    """Each query finds series with the labels of its legend; a dead letter becomes an alert, others sleep."""
    async with observed(tmp_path) as (agent, address), prometheus(tmp_path / "p", address) as server:
        await server.until('up{job="capture-agent"} == 1')
        await keep_busy(agent)
        alert = (await server.until('ALERTS{alertstate="firing"}'))[0]["metric"]
        assert (alert["alertname"], alert["reason"]) == ("CaptureAgentDeadLetters", "rejected")
        groups = (await server.ask("rules"))["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
        firing = await server.result('ALERTS{alertstate="firing"}')
        assert len(firing) == 1
        for title, query, legend in QUERIES:
            chosen = re.sub(r"\$(job|instance|project)", ".+", query).replace("$__rate_interval", "5m")
            for series in await (server.result if title in EMPTY else server.until)(chosen):
                assert set(re.findall(r"{{(\w+)}}", legend)) <= series["metric"].keys(), title
        for variable in DASHBOARD["templating"]["list"][1:]:
            metric, label = re.findall(r"(\w+)(?:{.*})?, (\w+)\)", variable["query"]["query"])[0]
            assert (await server.until(metric))[0]["metric"][label]
