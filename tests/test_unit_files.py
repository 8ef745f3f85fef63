"""The unit files: systemd finds nothing wrong with them, they are tight, and the sample fits them."""

import os
import re
import shutil
import socket
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from sources import line
from supervisor import Supervisor

from agent.sink import Sink, serving

ROOT = Path(__file__).parents[1]
UNITS = ROOT / "systemd"
HOSTS = Path("/usr/lib/systemd/system")
SERVICES = ("capture-agent.service", "capture-agent@.service")
# `systemd-analyze security` rates from 0 (nothing may be reached) to 10. The network alone is 0.8.
MOST_EXPOSED = 1.2

analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian package systemd)"
)


def settings(name: str) -> dict[str, list[str]]:
    """What a unit file sets, each as often as it does."""
    found = defaultdict(list)
    for text in (UNITS / name).read_text().splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", text):
            found[match[1]].append(match[2])
    return found


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host's root with systemd's own units, and ours installed."""
    folder = tmp_path / "usr/lib/systemd/system"
    shutil.copytree(HOSTS, folder, symlinks=True)
    shutil.copytree(UNITS, folder, dirs_exist_ok=True)
    for command in ("usr/bin/capture-agent", "bin/sh"):
        place = tmp_path / command
        place.parent.mkdir(exist_ok=True)
        place.touch(0o755)
    return tmp_path


def run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@analyze
@pytest.mark.parametrize("instance", ["", "@eu"])
def test_systemd_finds_nothing_wrong(host: Path, instance: str) -> None:
    """Neither in what is written, nor an ordering in a circle with the units of the host."""
    kinds = [unit.name for unit in UNITS.glob("*.socket") if ("@" in unit.name) == bool(instance)]
    names = [f"capture-agent{instance}.service"] + [name.replace("@", instance or "@") for name in kinds]
    assert len(names) == (4 if instance else 5)
    assert run("systemd-analyze", "verify", "--man=no", f"--root={host}", *names) == ""


@analyze
@pytest.mark.parametrize("service", SERVICES)
def test_it_is_tight(tmp_path: Path, service: str) -> None:
    """The sandbox leaves the network, the own folder, and what senders are told by."""
    shutil.copy(UNITS / service, tmp_path)  # away from the drop-in, which opens it
    told = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(tmp_path / service))
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert found is not None, told
    assert float(found[1]) <= MOST_EXPOSED, told


def test_an_instance_is_as_the_only_agent_is() -> None:
    """The template says the same but for its files."""
    one, many = map(settings, SERVICES)
    told = {name: (one[name], many[name]) for name in one | many if one[name] != many[name]}
    assert told.keys() == {
        "Description",
        "ConditionFileNotEmpty",
        "ExecStart",
        "StateDirectory",
        "LoadCredential",
        "Also",
    }
    assert all("%i" in value for _, values in told.values() for value in values)


def test_every_agent_has_its_sockets() -> None:
    """They are for their group's members, outlive the service, and come and go with it in the right order."""
    for name in sorted(unit.name for unit in UNITS.glob("*.socket")):
        unit = settings(name)
        service = "capture-agent@%i.service" if "@" in name else "capture-agent.service"
        assert unit["Service"] == ([] if name == "capture-agent@.socket" else [service])
        assert unit["WantedBy"] == [f"sockets.target {service}"]
        # One whose service may not start fails when it was tried twenty times (TriggerLimitBurst=).
        assert unit["ConditionFileNotEmpty"] == settings(service.replace("%i", ""))["ConditionFileNotEmpty"]
        if "udp" not in name:
            assert unit["SocketMode"] == ["0660"]
            # Who may send may not therefore read what others have sent.
            assert unit["SocketGroup"] == ["capture-agent-admin" if "admin" in name else "capture-agent"]
            assert unit["RemoveOnStop"] == ["no"]
        if "ListenDatagram" in unit:
            assert unit["ReceiveBuffer"] == ["32M"]
        also = settings("capture-agent@.service" if "@" in name else "capture-agent.service")["Also"]
        assert name.replace("@", "@%i") in also[0].split()


def test_no_dynamic_user_has_the_name_of_a_group() -> None:
    """systemd refuses to make a user whose name a group has already."""
    groups = re.findall(r"^g (\S+)", (UNITS / "sysusers.d/capture-agent.conf").read_text(), re.MULTILINE)
    assert groups == ["capture-agent", "capture-agent-admin"]
    for service in SERVICES:
        unit = settings(service)
        assert unit["DynamicUser"] == ["yes"]
        assert unit["User"] not in ([], *([group] for group in groups))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make groups and folders of root's")
@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="needs Debian's package systemd")
def test_groups_and_folder_are_made(tmp_path: Path) -> None:
    """systemd-sysusers makes the groups, systemd-tmpfiles the folder that clients can enter."""
    (tmp_path / "etc").mkdir()
    run("systemd-sysusers", f"--root={tmp_path}", str(UNITS / "sysusers.d/capture-agent.conf"))
    made = (tmp_path / "etc/group").read_text()
    assert {"capture-agent", "capture-agent-admin"} <= {line.split(":")[0] for line in made.splitlines()}
    run("systemd-tmpfiles", "--create", f"--root={tmp_path}", str(UNITS / "tmpfiles.d/capture-agent.conf"))
    assert (tmp_path / "run/capture-agent").stat().st_mode & 0o7777 == 0o755


async def test_the_sample_configuration_fits_the_units(tmp_path: Path) -> None:
    """With the units' sockets and the credential it takes events by each, and delivers them with that key."""
    sample = tmp_path / "config.toml"
    shutil.copy(ROOT / "config/systemd.toml", sample)
    sink = Sink()
    async with serving(sink) as url:
        with Supervisor() as unit:
            for name in settings("capture-agent.service")["Also"][0].split():
                (called,) = settings(name)["FileDescriptorName"]
                if name == "capture-agent-udp.socket":
                    address = unit.datagram(called, ("127.0.0.1", 0)).getsockname()
                elif datagram := settings(name)["ListenDatagram"]:
                    unit.datagram(called, tmp_path / Path(datagram[0]).name)
                else:
                    unit.stream(called, tmp_path / Path(settings(name)["ListenStream"][0]).name)
            credential, _ = settings("capture-agent.service")["LoadCredential"][0].split(":")
            unit.credentials(tmp_path / "credentials", {credential: "phc_credential\n"})
            places = {
                "CAPTURE_AGENT_PROJECT__HOST": url,
                "CAPTURE_AGENT_BUFFER__PATH": str(tmp_path / "buffer.db"),
                "CAPTURE_AGENT_ADMIN__SOCKET": str(tmp_path / "admin.sock"),
                "CAPTURE_AGENT_ADMIN__LISTEN": "",
            }
            async with unit.running(sample, **places) as agent:
                for kind, family, place in (
                    (socket.SOCK_STREAM, socket.AF_UNIX, agent.stream),
                    (socket.SOCK_DGRAM, socket.AF_UNIX, agent.datagram),
                    (socket.SOCK_DGRAM, socket.AF_INET, address),
                ):
                    with socket.socket(family, kind) as sock:
                        sock.connect(place)
                        sock.send(line())
                await agent.until(delivered=3)
                assert "level=warning" not in agent.log()
                assert "phc_credential" not in agent.log()
    assert [event.api_key for event in sink.events] == ["phc_credential"] * 3
    for file in tmp_path.glob("buffer.db*"):
        assert file.stat().st_mode & 0o777 == 0o600
