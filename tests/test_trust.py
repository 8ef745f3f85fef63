"""`agent.trust`: what others may read or change is told, and what they may not is not."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from processes import configure, run

from agent.cli.options import read_config, read_text
from agent.config import Text
from agent.trust import UNKNOWN, exposed

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may enter, with a configuration that names a key's file, and a buffer.

    Not pytest's own, which is in one that only its user may enter.
    """
    with TemporaryDirectory(prefix="capture-agent-test-") as folder:
        place = Path(folder)
        place.chmod(0o755)
        config = configure(place, "http://127.0.0.1:9")
        key, buffer = place / "key", place / "buffer.db"
        key.write_text("phc_test")
        buffer.write_bytes(b"")
        config.write_text(config.read_text().replace('"phc_test"', f'{{ file = "{key}" }}'))
        for file, mode in ((config, 0o644), (key, 0o600), (buffer, 0o600)):
            file.chmod(mode)
        yield place


def told(place: Path, uid: int | None = None) -> list[tuple[str, str]]:
    """Which files, and the last word of what is to be done about them but the path."""
    file = str(place / "config.toml")
    found = exposed(read_config(file), read_text(file), os.geteuid() if uid is None else uid)
    return [(Path(path).name, hint.removesuffix(f" {path}")) for path, _, hint in found]


def test_what_is_closed_is_not_told(place: Path) -> None:
    """A configuration may be read by all where its secrets are elsewhere."""
    assert told(place) == []


@pytest.mark.parametrize("name", ["key", "buffer.db"])
def test_what_everybody_may_read(place: Path, name: str) -> None:
    """Keys and events are for the agent; a folder that is closed closes what is in it."""
    (place / name).chmod(0o644)
    assert told(place) == [(name, "chmod o-r")]
    place.chmod(0o700)
    assert told(place) == []


@pytest.mark.parametrize(
    "secret",
    [
        '[project]\napi_key = "phc_k"',
        '[delivery]\nheaders = { X-Token = "t" }',
        '[delivery]\nproxy = "http://user:secret@proxy:3128"',
        '[[source]]\nkind = "udp"\nhash = ["distinct_id"]\nhash_key = "0123456789abcdef"',
    ],
)
def test_a_configuration_with_secrets_is_one(place: Path, secret: str) -> None:
    """Wherever in it they stand."""
    file = place / "config.toml"
    key = "" if "api_key" in secret else f'[project]\napi_key = {{ file = "{place}/key" }}\n'
    rest = f'[buffer]\npath = "{place}/buffer.db"\n[admin]\nsocket = "{place}/admin.sock"\n'
    file.write_text(f"{key}{secret}\n{rest}")
    assert ("config.toml", "chmod o-r") in told(place)
    file.chmod(0o640)
    assert told(place) == []


@pytest.mark.parametrize("name", ["", "config.toml", "key", "buffer.db"])
def test_what_everybody_may_change(place: Path, name: str) -> None:
    """Files by which the agent goes, and folders in which its files and sockets lie; once each."""
    (place / name).chmod(0o722 if not name else 0o622)
    assert told(place) == [((place / name).name, "chmod o-w")]


def test_a_sticky_folder_lets_nobody_take_anothers_file(place: Path) -> None:
    """As /tmp is."""
    place.chmod(0o1777)
    assert told(place) == []


@ROOT_ONLY
def test_what_belongs_to_somebody_else(place: Path) -> None:
    """Who owns a folder may replace all in it: but for root, the agent's user, and nobody in particular."""
    os.chown(place, 4321, -1)
    hint = f"run the agent as that user, or chown {os.geteuid()}"
    assert told(place) == [(place.name, hint)]
    assert told(place, 4321) == []
    os.chown(place, UNKNOWN, -1)
    assert told(place) == []
    os.chown(place / "buffer.db", 4321, -1)  # somebody was first in a folder that is everybody's
    assert told(place) == [("buffer.db", hint)]


def test_links_are_followed(place: Path) -> None:
    """What a link leads to is what counts."""
    real = place / "real"
    (place / "key").rename(real)
    (place / "key").symlink_to(real)
    real.chmod(0o644)
    assert told(place) == [("key", "chmod o-r")]


def test_defaults_need_no_file() -> None:
    """Without a configuration there is none to look at, nor a folder in which it is."""
    found = exposed(read_config("/dev/null", keys=False), Text("defaults and environment", ""), os.geteuid())
    assert all("/" in path and path != os.getcwd() for path, _, _ in found)


def test_the_commands_tell(place: Path) -> None:
    """`check` beside its answer, `doctor` among its findings; neither is an error."""
    (place / "key").chmod(0o644)
    file = str(place / "config.toml")
    checked = run("check", "--config", file)
    assert checked.returncode == 0
    assert f"warning: {place}/key: everybody on this host may read it, and it holds a key" in checked.stderr
    assert (
        f"permissions: {place}/key: everybody on this host may read it"
        in run("doctor", "--config", file).stdout
    )
