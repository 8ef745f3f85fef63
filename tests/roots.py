"""A Debian system in a folder, for tests of packages: only entered, or booted with a systemd of its own."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

# systemd is up within two seconds; the machine may be busy.
BOOT_SECONDS = 60
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may enter another system")


def needs(*commands: str) -> pytest.MarkDecorator:
    """Skip where one of them is missing."""
    missing = [command for command in commands if shutil.which(command) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: see .ci/run")


def run(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """What a command printed that had to succeed."""
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=900,
        cwd=cwd,
        env=env,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def debian(root: Path, suite: str, *packages: str) -> Path:
    """A small system of that suite, from the mirror that this host uses, trusting whom this host trusts."""
    listed = run("apt-get", "indextargets", "--format", "$(SITE) $(ORIGIN)", "Created-By: Packages")
    site = next(line.split()[0] for line in listed.splitlines() if line.split()[1:] == ["Debian"])
    run("debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, str(root), site)
    own = Path("/usr/local/share/ca-certificates")
    shutil.copytree(own, root / "usr/local/share/ca-certificates", dirs_exist_ok=True)
    if Path("/etc/pip.conf").exists():
        shutil.copy("/etc/pip.conf", root / "etc/pip.conf")
    return root


class Entered:
    """A system with a process that holds its namespaces; commands are run beside it."""

    def __init__(self, root: Path, leader: int) -> None:
        self.root = root
        # By its path: what stands after it is looked for in the system, by the system's PATH.
        self._prefix = [str(shutil.which("nsenter")), "--target", str(leader)]
        self._prefix += ["--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd"]

    def _command(self, command: Sequence[str], user: str) -> list[str]:
        numbers = ["--setuid", user, "--setgid", user] if user else []
        return [*self._prefix, *numbers, *command]

    @staticmethod
    def _environment(told: Mapping[str, str]) -> Mapping[str, str]:
        return {"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive", **told}

    def run(
        self, *command: str, text: str = "", user: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself; `user`, a number, runs it where nobody of that name need be."""
        return subprocess.run(
            self._command(command, user),
            env=self._environment(env),
            check=False,
            capture_output=True,
            text=True,
            input=text,
            timeout=120,
        )

    def do(self, *command: str, text: str = "", **env: str) -> str:
        """What a command said that had to succeed."""
        done = self.run(*command, text=text, **env)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    @contextmanager
    def beside(self, log: Path, *command: str, user: str = "", **env: str) -> Iterator[None]:
        """A command that runs for a block; what it says goes to `log`."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                self._command(command, user), env=self._environment(env), stdout=out, stderr=out
            )
        with ended(process):
            yield

    def until(self, said: str, *command: str, **env: str) -> str:
        """What a command says once that is in it."""
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            done = self.run(*command, **env)
            if said in (told := done.stdout + done.stderr):
                return told
            assert time.monotonic() < deadline, f"{command}: no {said!r} in: {told}"
            time.sleep(0.1)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A process for a block; it is asked to end, and killed where it does not."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def entered(root: Path, *before: str) -> Iterator[Entered]:
    """The system with a network of its own, in which nothing runs; `before`: what the shell does first."""
    lines = [
        "ip link set lo up",
        f"mount --bind {root} {root}",
        *before,
        f"mount -t proc proc {root}/proc",
        f"exec chroot {root} {sleeping(root)}",
    ]
    process = subprocess.Popen(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-ec", "\n".join(lines)]
    )
    with ended(process):
        yield Entered(root, _leader(process, root))


def sleeping(root: Path) -> str:
    """What holds the namespaces: a system without a shell has Python."""
    return (
        "sleep infinity"
        if (root / "usr/bin/sleep").exists()
        else "python3 -c 'import signal; signal.pause()'"
    )


@contextmanager
def booted(root: Path, log: Path) -> Iterator[Entered]:
    """The system with its own systemd, and a network of its own."""
    own = ("--private-network", "--register=no", "--keep-unit")
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["systemd-nspawn", "--quiet", f"--directory={root}", "--boot", *own],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    with ExitStack() as stack:
        stack.enter_context(ended(process))
        system = Entered(root, _leader(process, root))
        system.until("running", "systemctl", "is-system-running", "--wait")
        yield system


def _leader(process: subprocess.Popen[bytes], root: Path) -> int:
    """The system's first process, once it is in its root."""
    deadline = time.monotonic() + BOOT_SECONDS
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while True:
        assert process.poll() is None, "the system did not start"
        assert time.monotonic() < deadline
        for child in children.read_text().split():
            try:
                inside = os.stat(f"/proc/{child}/root/usr").st_ino == (root / "usr").stat().st_ino
            except OSError:  # it is on its way
                continue
            if inside:
                return int(child)
        time.sleep(0.05)
