"""Certificates for tests, made anew by openssl."""

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Papers(NamedTuple):
    """An authority, the server's and the client's certificate, and an encrypted key."""

    ca: str
    cert: str
    key: str
    locked: str


def make_papers(folder: Path) -> Papers:
    """A self-signed certificate for 127.0.0.1 that is its own authority."""
    cert, key, locked = (str(folder / name) for name in ("cert.pem", "key.pem", "locked.pem"))
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    new += ["-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    lock = ["openssl", "ec", "-aes256", "-passout", "pass:x"]
    try:
        subprocess.run([*new, "-keyout", key, "-out", cert], check=True, capture_output=True)
        subprocess.run([*lock, "-in", key, "-out", locked], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return Papers(cert, cert, key, locked)


def server_tls(papers: Papers, *, demanding: bool = False) -> ssl.SSLContext:
    """What a server shows; `demanding` where clients must show theirs."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(papers.cert, papers.key)
    if demanding:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(papers.ca)
    return context
