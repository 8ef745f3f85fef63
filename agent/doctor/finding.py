"""What an examination finds: how grave it is, where, what is wrong and what to do next."""

from collections.abc import Iterable
from typing import Literal

import msgspec

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One finding; `hint` says what to do next, and is empty where nothing is to be done."""

    level: Level
    check: str
    where: str
    what: str
    hint: str = ""


def ok(check: str, where: str, what: str) -> Finding:
    """It is as it should be."""
    return Finding(level="ok", check=check, where=where, what=what)


def warning(check: str, where: str, what: str, hint: str) -> Finding:
    """It works, but a person should know."""
    return Finding(level="warning", check=check, where=where, what=what, hint=hint)


def error(check: str, where: str, what: str, hint: str) -> Finding:
    """It does not work, or events are lost or stuck."""
    return Finding(level="error", check=check, where=where, what=what, hint=hint)


def amount(size: int) -> str:
    """A size for people, in MiB."""
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:,.1f} MiB"


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing is an error."""
    return all(finding.level != "error" for finding in findings)
