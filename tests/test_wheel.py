"""The wheel and the source distribution: whole, and installed as people do."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from roots import run

from agent import __version__

ROOT = Path(__file__).parents[1]
COMMANDS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, the wheel built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--installer", "uv", "--outdir", str(folder), str(ROOT))
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def of_tree(*folders: str) -> set[str]:
    """The files of the tree in these folders."""
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "build"} & set(path.parts)
    }


def test_registries_take_them(dist: Path) -> None:
    """twine finds nothing wrong, nor anything to warn of."""
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir()))


def test_the_wheel_has_all_that_the_code_needs(wheel: Path) -> None:
    """Modules and the status page's files, and nothing beside the package."""
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == of_tree("agent")
    assert {"agent/page/page.html", "agent/page/page.css", "agent/page/page.js"} <= names


def test_the_sdist_has_all_that_a_packager_needs(dist: Path) -> None:
    """Units, configuration, packaging and tests too."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames()}
        build = file.getmember(f"capture_agent-{__version__}/config/packaging/deb/build")
    needed = of_tree("agent", "config", "systemd", "tests")
    assert needed <= names
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"} <= names
    assert build.mode & 0o111


@pytest.mark.parametrize("tool", ["uv", pytest.param("pipx", marks=pytest.mark.slow)])
def test_it_is_installed_by(tool: str, wheel: Path, tmp_path: Path) -> None:
    """The command works from anywhere: it shows its whole way at the first try."""
    folders = {
        "UV_TOOL_DIR": tmp_path / "tools",
        "UV_TOOL_BIN_DIR": tmp_path / "bin",
        "PIPX_HOME": tmp_path / "pipx",
        "PIPX_BIN_DIR": tmp_path / "bin",
        "PIPX_MAN_DIR": tmp_path / "man",
        "XDG_RUNTIME_DIR": tmp_path,
        "XDG_STATE_HOME": tmp_path,
    }
    env = {**os.environ, **{name: str(folder) for name, folder in folders.items()}}
    if tool == "uv":
        run(str(COMMANDS / "uv"), "tool", "install", "--python", sys.executable, str(wheel), env=env)
    else:
        run(str(COMMANDS / "pipx"), "install", "--python", sys.executable, str(wheel), env=env)
    command = tmp_path / "bin/capture-agent"
    assert {path.name for path in (tmp_path / "bin").iterdir()} == {"capture-agent"}
    assert __version__ in run(str(command), "--version", cwd=tmp_path, env=env)
    shown = subprocess.run(
        [command, "demo", "--once"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
