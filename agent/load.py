"""Reads a configuration: a TOML text and the environment in, a complete and valid `Config` out.

All mistakes are told at once, a line for each: `FILE: key.path: what is wrong (did you mean ...?)`. No
mistake's line ever holds a secret.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import msgspec

from agent import checks, config
from agent.config import (
    Admin,
    Buffer,
    Config,
    ConfigError,
    Delivery,
    Log,
    Paths,
    Project,
    Secret,
    Settings,
    Source,
)
from agent.references import look_up
from agent.source_checks import of_passed
from agent.values import converted, suggestion, written_as_text
from agent.veil import without_keys

PREFIX = "CAPTURE_AGENT_"
KINDS: Mapping[str, type[Source]] = {str(kind.__struct_config__.tag): kind for kind in get_args(Source)}
# What there is where the file names no source.
DEFAULT_KINDS = ("unix_stream", "unix_datagram", "udp")
SECTIONS = ("project", "source", "buffer", "delivery", "admin", "log")
# What has a source's name in the environment stands as `CAPTURE_AGENT_SOURCE__APP__PATH`.
NAMED = ("project", "source")

# TOML's values are what they are: any.
Table = Mapping[str, Any]
S = TypeVar("S", bound=Settings)

HINT = "every setting is explained in config/capture-agent.toml; `capture-agent check` reads it all again"

# Stands for a source's key that was not looked up, or not found, which is told by itself; nothing is hashed.
UNREAD = "-" * 16


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What a configuration may refer to beside its own text."""

    env: Mapping[str, str]
    paths: Paths
    hostname: str
    read_text: Callable[[str], str]  # raises OSError


def load(text: str, around: Surroundings, *, file: str, keys: bool = True) -> Config:
    """The configuration that `text` says. Raises `ConfigError`.

    Without `keys` no project's key is looked up: for commands that only ask where the agent is.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{file}: {without_keys(str(error))}", "mend the line; https://toml.io shows the notation"
        ) from error
    return _Reading(around, file, keys=keys).config(document)


class _Reading:
    """One reading, and the mistakes found so far."""

    def __init__(self, around: Surroundings, file: str, *, keys: bool) -> None:
        self._around = around
        self._file = file
        self._keys = keys
        self._mistakes: list[str] = []
        self._overrides = self._from_environment()
        self._variables: list[str] = []  # the names that mean something in the environment

    def config(self, document: Table) -> Config:
        """Everything, or one `ConfigError` for all that is wrong."""
        self._refuse_unknown(document, SECTIONS, "")
        shared = self._table(document.get("delivery", {}), "delivery")
        delivery = self._overridden(Delivery, shared, "delivery.", "delivery")
        listed = self._listed(document.get("project", {}), "project", ("default",))
        projects = [
            self._project(table, where, name, delivery, first=number == 0)
            for number, (table, where, name) in enumerate(listed)
        ]
        sources = [
            self._source(table, where, name, [project.name for project in projects])
            for table, where, name in self._listed(document.get("source", []), "source", DEFAULT_KINDS)
        ]
        paths = self._around.paths
        buffer = self._table(document.get("buffer", {}), "buffer")
        admin = self._table(document.get("admin", {}), "admin")
        config = Config(
            projects=tuple(projects),
            sources=tuple(source for source in sources if source is not None),
            buffer=self._struct(Buffer, {"path": f"{paths.state}/buffer.db", **buffer}, "buffer"),
            admin=self._struct(Admin, {"socket": f"{paths.runtime}/admin.sock", **admin}, "admin"),
            log=self._struct(Log, self._table(document.get("log", {}), "log"), "log"),
        )
        for where, wrong in checks.of_whole(config):
            self._wrong(where, wrong)
        for name in self._overrides:
            if name not in self._variables:
                hint = suggestion(name, self._variables)
                self._mistakes.append(f"environment: {name}: no such setting{hint}")
        if self._mistakes:
            # A key may stand where a name or another value belongs, and a mistake tells these.
            mistakes = without_keys("\n".join(dict.fromkeys(self._mistakes)))
            raise ConfigError(mistakes, HINT)
        return config

    def _wrong(self, where: str, what: str) -> None:
        self._mistakes.append(f"{self._file}: {where}: {what}")

    def _refuse_unknown(self, table: Table, known: Sequence[str], where: str) -> None:
        for name in table:
            if name in known:
                continue
            kinds = [word for word, kind in KINDS.items() if name in kind.__struct_fields__]
            if where.startswith("source[") and kinds:
                self._wrong(f"{where}{name}", f"is not for this kind of source, but for {', '.join(kinds)}")
            else:
                self._wrong(f"{where}{name}", f"unknown key{suggestion(name, known)}")

    # --- the environment ---------------------------------------------------------------------------

    def _from_environment(self) -> dict[str, str]:
        """What the environment sets, by name."""
        return {name: text for name, text in self._around.env.items() if name.startswith(PREFIX)}

    def _override(self, name: str) -> str | None:
        """What a variable says, where it is set."""
        self._variables.append(name)
        return self._overrides.get(name)

    def _overridden(self, kind: type[Settings], table: Table, where: str, section: str) -> dict[str, Any]:
        """The table with what the environment says instead."""
        merged = dict(table)
        for field in msgspec.structs.fields(kind):
            name = _variable(section, field.name)
            if (text := self._override(name)) is None:
                continue
            if written_as_text(field.type):
                merged[field.name] = text
                continue
            try:
                merged[field.name] = tomllib.loads(f"value = {text}")["value"]
            except (tomllib.TOMLDecodeError, KeyError):
                self._wrong(f"{where}{field.name}", f"{name} is not a TOML value, such as 5, true or {{}}")
        return merged

    # --- tables ------------------------------------------------------------------------------------

    def _table(self, value: object, where: str) -> Table:
        if isinstance(value, dict):
            return value
        self._wrong(where, f"must be a table: [{where}]")
        return {}

    def _listed(self, value: object, section: str, kinds: Sequence[str]) -> list[tuple[Table, str, str]]:
        """Each table of a section, where it is for people, and its name; `kinds` where there is none."""
        if isinstance(value, dict) and section == "project":
            value = [value]
        if not isinstance(value, list):
            one = f"a table: [{section}], or " if section == "project" else ""
            self._wrong(section, f"must be {one}a list of tables: [[{section}]]")
            value = []
        if not value:
            value = [{"kind": kind} for kind in kinds] if section == "source" else [{}]
        found = []
        for number, item in enumerate(value, 1):
            table = self._table(item, f"{section}[{number}]")
            name = table.get("name", table.get("kind", number) if section == "source" else kinds[0])
            where = "project" if section == "project" and len(value) == 1 else f"{section}[{name}]"
            found.append((table, where, str(name)))
        return found

    def _struct(self, kind: type[S], table: Table, where: str, section: str = "") -> S:
        """A struct of the table's values; the default for each that is wrong."""
        fields = {field.name: field for field in msgspec.structs.fields(kind)}
        self._refuse_unknown(table, tuple(fields), f"{where}.")
        values: dict[str, Any] = {}
        wrong: dict[str, Sequence[str]] = {}
        for name, value in self._overridden(kind, table, f"{where}.", section or where).items():
            if name not in fields:
                continue
            try:
                values[name] = converted(value, fields[name].type)
            except ValueError as error:
                wrong[name] = error.args
                if fields[name].required:
                    values[name] = ""  # never used: the mistake ends in a ConfigError
        made = kind(**values)
        allowed = [(name, what) for name, what in checks.of(made) if name not in wrong]
        for name, what in (*allowed, *((name, what) for name, whats in wrong.items() for what in whats)):
            self._wrong(f"{where}.{name}", what)
        return made

    # --- projects and sources ----------------------------------------------------------------------

    def _project(self, table: Table, where: str, name: str, delivery: Table, *, first: bool) -> Project:
        own = self._table(table.get("delivery", {}), f"{where}.delivery")
        rest = {key: value for key, value in table.items() if key not in {"delivery", "api_key"}}
        section = "project" if where == "project" else f"project__{name}"
        short, long = PREFIX + "API_KEY", _variable(section, "api_key")
        given: object = self._override(long)
        if first:
            if (host := self._override(PREFIX + "HOST")) is not None:
                rest["host"] = host
            given = self._override(short) if given is None else given
        given = table.get("api_key") if given is None else given
        project = self._struct(Project, rest, where, section)
        return msgspec.structs.replace(
            project,
            api_key=self._key(given, where, short if first else long) if self._keys else None,
            delivery=self._struct(
                Delivery,
                {**delivery, **own},
                f"{where}.delivery" if own else "delivery",
                f"{section}__delivery",
            ),
        )

    def _key(self, given: object, where: str, variable: str) -> Secret | None:
        """The project's key, from where it is kept."""
        where = f"{where}.api_key"
        if given in (None, ""):
            self._wrong(
                where,
                "missing: put the project's key (PostHog: Settings, Project, Project API key) there, "
                f"or into the environment as {variable}",
            )
            return None
        key = self._secret(given, where)
        if key is not None and (wrong := checks.wrong_key(key.reveal())):
            self._wrong(where, wrong)
        return key

    def _secret(self, given: object, where: str) -> Secret | None:
        """A secret, from where it is kept."""
        if isinstance(given, Mapping):
            self._variables.append(str(given.get("env")))
        try:
            return Secret(look_up(given, self._around.env, self._around.read_text))
        except ValueError as error:
            self._wrong(where, str(error))
        return None

    def _source(self, table: Table, where: str, name: str, projects: Sequence[str]) -> Source | None:
        word = table.get("kind")
        if not isinstance(word, str) or word not in KINDS:
            known = ", ".join(KINDS)
            said = "missing" if word is None else f"{word!r} is not"
            self._wrong(f"{where}.kind", f"{said}: one of {known}{suggestion(str(word), tuple(KINDS))}")
            return None
        kind = KINDS[word]
        section = f"source__{name}"
        given = {key: value for key, value in table.items() if key != "kind"}
        given = self._overridden(kind, given, f"{where}.", section)
        for setting, wrong in of_passed(given):
            self._wrong(f"{where}.{setting}", wrong)
        key = given.get("hash_key")
        if isinstance(key, Mapping):
            secret = self._secret(key, f"{where}.hash_key") if self._keys else None
            given["hash_key"] = UNREAD if secret is None else secret.reveal()
        place = config.default_place(kind, self._around.paths, passed=bool(given.get("socket")))
        values = {"name": word, "project": projects[0], **place, **given}
        source = self._struct(kind, values, where, section)
        if source.project not in projects:
            close = suggestion(source.project, projects)
            self._wrong(f"{where}.project", f"there is no project {source.project!r}{close}")
        if source.format == "syslog":  # its lines have hostnames of their own
            return msgspec.structs.replace(source, distinct_id=source.distinct_id or "{hostname}")
        default = source.distinct_id.replace("{hostname}", self._around.hostname)
        return msgspec.structs.replace(source, distinct_id=default)


def _variable(section: str, name: str) -> str:
    """The environment's name for a setting."""
    return f"{PREFIX}{section}__{name}".upper().replace("-", "_").replace(".", "_")
