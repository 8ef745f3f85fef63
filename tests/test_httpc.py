"""`agent.httpc`: a way out that cannot work is told before anything is sent."""

from pathlib import Path
from typing import NamedTuple

import pytest
from certificates import make_papers

from agent.config import Secret
from agent.httpc import WayOutError, open_client


class Settings(NamedTuple):
    """The delivery settings that say how the host is left."""

    proxy: Secret = Secret("")
    ca_file: str = ""
    client_cert: str = ""
    client_key: str = ""


def set_up(settings: Settings) -> None:
    open_client(settings, connections=1, idle=1)


@pytest.mark.parametrize("proxy", ["ftp://127.0.0.1:1", "socks4://127.0.0.1", "http://[::1"])
def test_a_proxy_that_is_none_is_told_with_a_hint(proxy: str) -> None:
    """The mistake is found at the start, not at the first event."""
    with pytest.raises(WayOutError) as caught:
        set_up(Settings(proxy=Secret(proxy)))
    assert "proxy" in caught.value.hint


def test_files_that_cannot_be_used_are_told_with_a_hint(tmp_path: Path) -> None:
    """A missing authority, a file that is no certificate, an encrypted key: an error, never a question."""
    papers = make_papers(tmp_path)
    (tmp_path / "text.pem").write_text("hello")
    for settings in (
        Settings(ca_file=str(tmp_path / "missing.pem")),
        Settings(ca_file=str(tmp_path / "text.pem")),
        Settings(client_cert=papers.cert, client_key=papers.locked),
    ):
        with pytest.raises(WayOutError, match=r"\.pem: ."):
            set_up(settings)
