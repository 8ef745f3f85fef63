"""The Debian package: what is in it, and how it is installed, used, upgraded and purged on a real system."""

import email
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from roots import Entered, booted, debian, entered, needs, needs_root, run

from agent import __version__

ROOT = Path(__file__).parents[1]
DEB = ROOT / "config/packaging/deb"
PYTHON = "/usr/bin/python3"
NEXT = "9.0.0"

can_build = [
    needs("dpkg-deb"),
    pytest.mark.skipif(
        subprocess.run([PYTHON, "-c", "import ensurepip"], check=False, capture_output=True).returncode != 0,
        reason="needs Debian's package python3-venv",
    ),
]
pytestmark = can_build


def build(source: Path, folder: Path) -> Path:
    """The package of that tree, by the command of the README."""
    return Path(run(str(source / "config/packaging/deb/build"), str(folder)).strip())


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of this tree; it takes half a minute to build."""
    return build(ROOT, tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def unpacked(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files, and in DEBIAN what dpkg reads."""
    folder = tmp_path_factory.mktemp("unpacked") / "root"
    run("dpkg-deb", "--raw-extract", str(deb), str(folder))
    return folder


def site_packages(root: Path) -> Path:
    (found,) = (root / "usr/lib/capture-agent/lib").glob("python3.*/site-packages")
    return found


def test_everything_is_in_its_place(deb: Path, unpacked: Path) -> None:
    """Units, configuration, manual page and completion, and all of it root's, written by nobody else."""
    units = {path.name for path in (ROOT / "systemd").glob("*.*") if path.is_file()}
    assert {path.name for path in (unpacked / "usr/lib/systemd/system").iterdir()} == units
    for source, place in [
        ("systemd/sysusers.d/capture-agent.conf", "usr/lib/sysusers.d/capture-agent.conf"),
        ("systemd/tmpfiles.d/capture-agent.conf", "usr/lib/tmpfiles.d/capture-agent.conf"),
        ("config/systemd.toml", "etc/capture-agent/config.toml"),
    ]:
        assert (unpacked / place).read_bytes() == (ROOT / source).read_bytes()
    for place, said in [
        ("usr/share/bash-completion/completions/capture-agent", "_CAPTURE_AGENT_COMPLETE"),
        ("usr/share/zsh/vendor-completions/_capture-agent", "#compdef capture-agent"),
        ("usr/share/fish/vendor_completions.d/capture-agent.fish", "_CAPTURE_AGENT_COMPLETE"),
        ("usr/share/doc/capture-agent/copyright", "The capture-agent authors"),
    ]:
        assert said in (unpacked / place).read_text()
    assert __version__ in run("zcat", str(unpacked / "usr/share/man/man1/capture-agent.1.gz"))
    assert (unpacked / "usr/bin/capture-agent").readlink() == Path("../lib/capture-agent/bin/capture-agent")
    # What a person may call is the agent alone; libraries bring commands of their own.
    commands = {path.name for path in (unpacked / "usr/lib/capture-agent/bin").iterdir()}
    assert commands == {"capture-agent", "python3"}

    listing = deb.with_suffix(".tar")
    with listing.open("wb") as out:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], check=True, stdout=out)
    with tarfile.open(listing) as files:
        for file in files:
            assert (file.uname, file.gname) == ("root", "root"), file.name
            assert file.issym() or file.mode in (0o644, 0o755), file.name
            assert file.issym() or (file.mode == 0o755) == (file.isdir() or "/bin/" in file.name), file.name


def test_it_runs_with_the_release_that_it_depends_on(deb: Path, unpacked: Path) -> None:
    """Compiled modules are for one release of Python and one architecture; both are what dpkg is told."""
    control = email.message_from_string((unpacked / "DEBIAN/control").read_text())
    release = site_packages(unpacked).parent.name
    needed = re.split(r",\s*", control["Depends"])
    assert release in needed
    assert f"python3 (>= {release.removeprefix('python')})" in needed
    assert (unpacked / "usr/lib/capture-agent/bin/python3").readlink().name == release
    assert control["Version"] == f"{__version__}-1"
    assert control["Architecture"] == run("dpkg", "--print-architecture").strip()
    assert deb.name == f"capture-agent_{control['Version']}_{control['Architecture']}.deb"
    libraries = [path.name for path in site_packages(unpacked).rglob("*.so")]
    assert libraries
    assert all(f"cpython-{release.removeprefix('python').replace('.', '')}" in name for name in libraries)
    said = run(
        f"/usr/bin/{release}",
        *("-B", "-m", "agent", "--version"),
        cwd=site_packages(unpacked),
        env={"PATH": os.environ["PATH"]},
    )
    assert __version__ in said
    assert {"page.html", "page.css", "page.js"} <= {
        path.name for path in (site_packages(unpacked) / "agent/page").iterdir()
    }


def test_nothing_tells_where_it_was_built(unpacked: Path) -> None:
    """No path of the building host, and nothing that pip would take for its own."""
    shebang, *_ = (unpacked / "usr/lib/capture-agent/bin/capture-agent").read_text().splitlines()
    assert shebang == "#!/usr/lib/capture-agent/bin/python3"
    staged = re.compile(rb"/tmp/tmp\.\w+|" + re.escape(str(ROOT).encode()))
    for path in unpacked.rglob("*"):
        assert not path.is_file() or staged.search(path.read_bytes()) is None, path
    assert not (site_packages(unpacked) / "pip").exists()


def test_dpkg_knows_every_file(unpacked: Path) -> None:
    """Each file has its sum, and what an administrator edits is a conffile."""
    assert (unpacked / "DEBIAN/conffiles").read_text() == "/etc/capture-agent/config.toml\n"
    sums = dict(line.split("  ", 1)[::-1] for line in (unpacked / "DEBIAN/md5sums").read_text().splitlines())
    files = {
        str(path.relative_to(unpacked)): path
        for path in unpacked.rglob("*")
        if path.is_file() and not path.is_symlink() and "DEBIAN" not in path.relative_to(unpacked).parts
    }
    assert sums.keys() == files.keys()
    for name, path in files.items():
        assert hashlib.md5(path.read_bytes()).hexdigest() == sums[name], name  # what dpkg's format has


@pytest.mark.parametrize("script", ["build", "postinst", "prerm", "postrm"])
def test_scripts_are_sound(script: str) -> None:
    """They are POSIX shell, and shellcheck finds nothing."""
    run("sh", "-n", str(DEB / script))
    assert os.access(DEB / script, os.X_OK)
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck: see .ci/run")
    run("shellcheck", str(DEB / script))


@needs("lintian")
def test_lintian_finds_nothing(deb: Path) -> None:
    """What is as it is for a reason says so in lintian-overrides."""
    assert run("lintian", "--allow-root", "--fail-on", "error,warning", str(deb)) == ""


@pytest.mark.slow
def test_two_builds_are_the_same(deb: Path, tmp_path: Path) -> None:
    """To the byte."""
    assert build(ROOT, tmp_path).read_bytes() == deb.read_bytes()


# --- on a system ---------------------------------------------------------------------------------------

on_a_system = needs("debootstrap", "unshare", "nsenter", "systemd-nspawn", "ip")


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the next version, which also has another sample configuration."""
    tree = tmp_path_factory.mktemp("newer")
    skipped = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "dist", "tests"
    )
    shutil.copytree(ROOT, tree / "source", ignore=skipped)
    version = tree / "source/agent/__init__.py"
    version.write_text(version.read_text().replace(f'"{__version__}"', f'"{NEXT}"'))
    with (tree / "source/config/systemd.toml").open("a") as sample:
        sample.write("# The next version says more.\n")
    return build(tree / "source", tree)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system with what the package depends on, of the release that this host has."""
    suite = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line)
    root = tmp_path_factory.mktemp("debian") / "root"
    return debian(root, suite["VERSION_CODENAME"], "ca-certificates", "python3", "systemd")


@pytest.fixture
def root(bare: Path, deb: Path, newer: Path, tmp_path: Path) -> Iterator[Path]:
    """That system, to be spoilt, with both packages in /srv."""
    place = tmp_path / "root"
    run("cp", "--archive", str(bare), str(place))
    shutil.copy(deb, place / "srv/deb")
    shutil.copy(newer, place / "srv/newer")
    yield place
    shutil.rmtree(place)


def files_of(root: Path) -> set[str]:
    """Every path of a system, but for what its tools keep for themselves."""
    kept = {
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "var/log",
        "var/lib/dpkg",
        "var/cache",
        "var/tmp",
        "var/lib/systemd",
    }
    found = set()
    for folder, folders, files in os.walk(root):
        here = os.path.relpath(folder, root)
        folders[:] = [name for name in folders if os.path.normpath(f"{here}/{name}") not in kept]
        found |= {os.path.normpath(f"{here}/{name}") for name in [*folders, *files]}
    # The groups before the last change, and whoever may make one: passwd(5)'s tools leave them.
    return found - {"etc/group-", "etc/gshadow-", "etc/.pwd.lock"}


@contextmanager
def sink(system: Entered, log: Path) -> Iterator[None]:
    """PostHog's stand-in on that system, at http://127.0.0.1:8000, for a block."""
    with system.beside(log, "capture-agent", "sink", "--listen", "127.0.0.1:8000", PYTHONUNBUFFERED="1"):
        yield


def arrived(log: Path, *names: str) -> None:
    """Wait until the sink has printed events of these names."""
    run(
        "timeout",
        "30",
        "sh",
        "-c",
        "".join(f"until grep -q '  {name}  ' {log}; do sleep 0.1; done;" for name in names),
    )


def status(system: Entered) -> dict[str, object]:
    """What the agent says of itself."""
    document: dict[str, object] = json.loads(system.do("capture-agent", "status", "--json"))
    return document


def reloaded(system: Entered, before: object) -> dict[str, object]:
    """What the agent says of a reload, once it was refused or another agent answers."""
    for _ in range(300):
        asked = system.run("capture-agent", "status", "--json", "--config", "/srv/admin.toml")
        if asked.returncode == 0 and (told := json.loads(asked.stdout)["reload"]) != before:
            found: dict[str, object] = told
            return found
        time.sleep(0.1)
    raise AssertionError(asked.stderr)


@pytest.mark.slow
@needs_root
@on_a_system
def test_a_life_under_systemd(root: Path, tmp_path: Path) -> None:
    """Installed, given a key, used, upgraded with events waiting, removed and purged; by a real systemd."""
    log = tmp_path / "sink"
    with booted(root, tmp_path / "console") as system:
        before = files_of(root)
        groups = (root / "etc/group").read_text()
        said = system.do("dpkg", "--install", "/srv/deb")

        # Without a key nothing runs, nothing fails, and it says what to do.
        assert "/etc/capture-agent/key" in said
        assert "systemctl start capture-agent" in said
        assert system.do("systemctl", "list-units", "--failed", "--no-legend") == ""
        assert system.run("systemctl", "is-active", "capture-agent").stdout == "inactive\n"
        assert (
            "ConditionFileNotEmpty=/etc/capture-agent/key"
            in system.run("systemctl", "status", "capture-agent").stdout
        )
        assert system.run("capture-agent", "send", "early", "--distinct-id", "a").returncode == 3

        # The steps that it said.
        system.do("install", "-m", "600", "/dev/stdin", "/etc/capture-agent/key", text="phc_local\n")
        system.do(
            "sed", "-i", 's|^# host = .*|host = "http://127.0.0.1:8000"|', "/etc/capture-agent/config.toml"
        )
        edited = (root / "etc/capture-agent/config.toml").read_text()
        system.do("systemctl", "start", "capture-agent")
        with sink(system, log):
            system.do("capture-agent", "send", "first", "--distinct-id", "a")
            arrived(log, "first")

        # Members of the group may send, others not.
        group = system.do("getent", "group", "capture-agent").split(":")[2]
        other = ("setpriv", "--reuid", "1234", "--regid", "1234")
        sending = ("capture-agent", "send", "kept", "--distinct-id", "a")
        system.do(*other, "--groups", group, *sending)
        assert system.run(*other, "--clear-groups", *sending).returncode != 0
        # Nor do they see what others sent: that is another group's.
        asking = ("capture-agent", "status")
        assert system.run(*other, "--groups", group, *asking).returncode != 0
        admins = system.do("getent", "group", "capture-agent-admin").split(":")[2]
        system.do(*other, "--groups", admins, *asking)

        # An upgrade keeps the configuration, the buffer, and the sockets open.
        opened = system.do("stat", "--format", "%i", "/run/capture-agent/events.sock")
        system.do("dpkg", "--install", "--force-confold", "/srv/newer")
        assert status(system)["version"] == NEXT
        assert (root / "etc/capture-agent/config.toml").read_text() == edited
        assert "more" in (root / "etc/capture-agent/config.toml.dpkg-dist").read_text()
        assert system.do("stat", "--format", "%i", "/run/capture-agent/events.sock") == opened
        assert system.do("systemctl", "list-units", "--failed", "--no-legend") == ""
        with sink(system, log):
            arrived(log, "kept")

        # A reload in the sandbox is the same process; a bad configuration changes nothing and is told.
        process = system.do("systemctl", "show", "-P", "MainPID", "capture-agent")
        config = root / "etc/capture-agent/config.toml"
        (root / "srv/admin.toml").write_text('[admin]\nsocket = "/run/capture-agent/admin.sock"\n')
        for text, refused in ((edited, False), (edited + "\n[nonsense]\n", True)):
            before_it = status(system)["reload"]
            config.write_text(text)
            system.do("systemctl", "reload", "capture-agent")
            reload = reloaded(system, before_it)
            assert reload["refused"] is refused, reload
            assert system.do("systemctl", "show", "-P", "MainPID", "capture-agent") == process
        assert "nonsense" in system.do("systemctl", "show", "-P", "StatusText", "capture-agent")
        config.write_text(edited)
        (root / "srv/admin.toml").unlink()
        with sink(system, log):
            system.do("capture-agent", "send", "reloaded", "--distinct-id", "a")
            arrived(log, "reloaded")

        # Removed, the buffer and the configuration stay, and nothing listens; again installed, it goes on.
        system.do("dpkg", "--remove", "capture-agent")
        assert system.do("systemctl", "list-units", "--no-legend", "--state=active", "capture-agent*") == ""
        assert (root / "etc/capture-agent/key").exists()
        assert (root / "var/lib/private/capture-agent/buffer.db").exists()
        system.do("dpkg", "--install", "/srv/newer")
        with sink(system, log):
            system.do("capture-agent", "send", "again", "--distinct-id", "a")
            arrived(log, "again")

        system.do("dpkg", "--purge", "capture-agent")
        assert files_of(root) == before
        assert (root / "etc/group").read_text() == groups
        assert system.run("ls", "/run/capture-agent").returncode == 2
        assert system.run("systemctl", "list-unit-files", "--no-legend", "capture-agent*").stdout == ""
        assert system.do("systemctl", "list-units", "--failed", "--no-legend") == ""


@pytest.mark.slow
@needs_root
@on_a_system
def test_a_life_without_systemd(root: Path, tmp_path: Path) -> None:
    """Where systemd is a package that does not run, as in a chroot, nothing is started and nothing fails."""
    log = tmp_path / "sink"
    with entered(root) as system:
        before = files_of(root)
        said = system.do("dpkg", "--install", "/srv/deb")
        assert "capture-agent run --config /dev/null" in said
        environment = {
            "CAPTURE_AGENT_API_KEY": "phc_local",
            "CAPTURE_AGENT_HOST": "http://127.0.0.1:8000",
            "CAPTURE_AGENT_DELIVERY__BACKOFF_MAX": "1 s",
        }
        running = ("capture-agent", "run", "--config", "/dev/null")
        with system.beside(tmp_path / "agent", *running, **environment):
            system.until("the books balance", "capture-agent", "status", "--config", "/dev/null")
            system.do("capture-agent", "send", "--config", "/dev/null", "first", "--distinct-id", "a")
            with sink(system, log):
                arrived(log, "first")
            system.do("capture-agent", "send", "--config", "/dev/null", "kept", "--distinct-id", "a")
        system.do("dpkg", "--install", "--force-confold", "/srv/newer")
        with system.beside(tmp_path / "agent", *running, **environment), sink(system, log):
            arrived(log, "kept")
            assert NEXT in system.do("capture-agent", "--version")
        system.do("dpkg", "--purge", "capture-agent")
        assert files_of(root) == before
