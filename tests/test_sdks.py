"""PostHog's own SDKs, unmodified from their registries, send to the agent as they would to PostHog."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import ENVIRONMENT
from sources import Taken, http, origins, taking

# What each program sends, and tells of it on its last line: the uuid and time of each event, by its name.
PYTHON = """
import json, sys
from datetime import datetime, timedelta, timezone
from posthog import Posthog

url, packed = sys.argv[1], sys.argv[2] == "gzip"
client = Posthog("phc_test", host=url, gzip=packed, flush_interval=0.05)
told = {}
for number in range(250):
    when = datetime.now(timezone.utc) - timedelta(days=number)
    name = f"event {number}"
    properties = {"n": number, "t": "ü€"}
    uuid = client.capture(name, distinct_id=f"user-{number}", properties=properties, timestamp=when)
    told[name] = [str(uuid), when.isoformat()]
client.set(distinct_id="user-1", properties={"plan": "pro"})
client.shutdown()
print(json.dumps(told))
"""
NODE = """
const { PostHog } = require('posthog-node')
const { randomUUID } = require('node:crypto')

async function main() {
  const [, , host, packing] = process.argv
  const client = new PostHog('phc_test', { host, disableCompression: packing !== 'gzip' })
  const told = {}
  for (let number = 0; number < 250; number++) {
    const timestamp = new Date(Date.now() - number * 86400000)
    const uuid = randomUUID(), event = `event ${number}`, properties = { n: number, t: 'ü€' }
    client.capture({ distinctId: `user-${number}`, event, properties, timestamp, uuid })
    told[event] = [uuid, timestamp.toISOString()]
  }
  client.identify({ distinctId: 'user-1', properties: { plan: 'pro' } })
  await client.shutdown()
  console.log(JSON.stringify(told))
}
main()
"""


async def sent(taken: Taken, command: list[str], cwd: Path, **environment: str) -> dict[str, list[str]]:
    """What a program told that it sent."""
    done = await trio.run_process(
        command,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
    )
    assert done.returncode == 0, done.stderr.decode()
    told: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return told


def compare(
    told: dict[str, list[str]], events: list[dict[str, Any]], library: str, beside: Mapping[str, object]
) -> None:
    """Each event arrived once, as it was sent; `beside` are properties for those that lack them."""
    found = {event["event"]: event for event in events}
    assert len(found) == len(events)
    assert len(told) == 250
    for name, (uuid, when) in told.items():
        event = found.pop(name)
        number = int(name.split()[1])
        assert (event["uuid"], event["distinct_id"]) == (uuid, f"user-{number}")
        difference = datetime.fromisoformat(event["timestamp"]) - datetime.fromisoformat(when)
        assert abs(difference.total_seconds()) < 0.001
        properties = {**beside, **event["properties"]}
        assert (properties["n"], properties["t"], properties["$lib"]) == (number, "ü€", library)
        assert properties["$lib_version"]
    [person] = found.values()
    assert person["properties"]["$set"] == {"plan": "pro"}


@pytest.mark.parametrize("packing", ["gzip", "plain"])
@pytest.mark.parametrize("mode", ["v0", "v1"])
async def test_python(tmp_path: Path, packing: str, mode: str) -> None:
    """Every event arrives with its own library, uuid and time."""
    (tmp_path / "sdk.py").write_text(PYTHON)
    async with taking(http()) as taken:
        senders = origins(taken)
        command = [sys.executable, "sdk.py", f"http://{taken.source.address}", packing]
        told = await sent(taken, command, tmp_path, POSTHOG_CAPTURE_MODE=mode)
        # By v1 the SDK names itself beside its events, and the door is told.
        given = senders[0].defaults if senders[0] else {}
        beside = {name: json.loads(bytes(raw)) for name, raw in given.items()}
        compare(told, await taken.events(251), "posthog-python", beside)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with posthog-node in it."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed here, and posthog-node comes by it")
    folder = tmp_path_factory.mktemp("node")
    (folder / "sdk.js").write_text(NODE)
    command = [
        npm,
        "install",
        "--no-audit",
        "--no-fund",
        "--no-save",
        "--prefix",
        str(folder),
        "posthog-node@5",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("packing", ["gzip", "plain"])
async def test_node(node: Path, packing: str) -> None:
    """Every event arrives with its own library, uuid and time."""
    async with taking(http()) as taken:
        told = await sent(taken, ["node", "sdk.js", f"http://{taken.source.address}", packing], node)
        compare(told, await taken.events(251), "posthog-node", {})
