"""What can be configured, and what each setting is when nobody sets it.

Every default is written here and nowhere else. How a file becomes these structs is `load`'s business.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import msgspec

from agent import AgentError

KIB, MIB, GIB = 1024, 1024**2, 1024**3

# How a value is written in the file; its type here is what the program computes with.
Size = Annotated[int, msgspec.Meta(extra={"unit": "size"})]  # bytes
Duration = Annotated[float, msgspec.Meta(extra={"unit": "duration"})]  # seconds


class Text(NamedTuple):
    """What a configuration's file said when it was read; `file` names it in messages."""

    file: str
    text: str


class ConfigError(AgentError):
    """The configuration cannot be used; its text has a line for each mistake."""

    exit_code = 2


class Secret:
    """A text that shows itself to nobody but who asks for it by name."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return "***" if self._text else ""  # that there is none is no secret

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> str:
        raise TypeError("a secret is not serialised")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of a configuration, complete and valid."""


class Delivery(Settings, frozen=True, kw_only=True):
    """How a project's events go out."""

    # Every PostHog installation serves /batch.
    protocol: Literal["batch", "v1", "auto"] = "batch"
    # One request costs 0.5 ms of CPU: at 1,000 events that is little of an event's 4 µs.
    max_batch_events: int = 1000
    # PostHog's SDKs stop here (posthog-python `posthog/consumer.py`); before compression.
    max_batch_size: Size = 5 * MIB
    # Half a second is soon enough for analytics, and 2 requests a second are few.
    linger: Duration = 0.5
    compression: Literal["gzip", "none"] = "gzip"
    # An upper bound; the agent finds the right number below it.
    concurrency: int = 8
    # Longer than PostHog's load balancer takes to give up.
    timeout: Duration = 30.0
    # PostHog's SDKs begin with a second and end at 30.
    backoff_base: Duration = 1.0
    backoff_max: Duration = 30.0
    # For ever: an outage of any length must not lose an event.
    max_attempts: int = 0
    cooldown: Duration = 60.0
    historical_migration: bool = False
    # The sender's address is this host's and not the user's.
    disable_geoip: bool = True
    # Either may hold a password.
    headers: Mapping[str, Secret] = {}
    proxy: Secret = Secret("")
    ca_file: str = ""
    client_cert: str = ""
    client_key: str = ""


class Project(Settings, frozen=True, kw_only=True):
    """A PostHog project. `api_key` is None only where nothing is to be delivered."""

    name: str = "default"
    host: str = "https://us.i.posthog.com"
    api_key: Secret | None = None
    delivery: Delivery = Delivery()


class Common(Settings, frozen=True, kw_only=True):
    """What every source has."""

    name: str
    project: str
    # The name of a socket that systemd opens; "" opens one at `path` or `listen`.
    socket: str = ""
    format: Literal["json", "logfmt", "syslog"] = "json"
    # Syslog only: the events' name, with {app} and {severity}; "" is "syslog". And the zone of times that say
    # none; "" is the host's.
    event: str = ""
    time_zone: str = ""
    # "" rejects an event that has none; with syslog it is "{hostname}", the line's own.
    distinct_id: str = ""
    properties: Mapping[str, object] = {}
    # PostHog's SDKs cap an event here (posthog-python `posthog/consumer.py`).
    max_event: Size = 900 * KIB
    # 0 is no limit; what is beyond it is refused and counted. After a silence `burst` events may come at
    # once, 0 is what two seconds allow.
    max_events_per_second: float = 0.0
    burst: int = 0
    # Nothing of what comes is changed or left out unless told to. In this order:
    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    sample: float = 1.0
    rename: Mapping[str, str] = {}
    redact: tuple[str, ...] = ()
    hash: tuple[str, ...] = ()
    hash_key: Secret = Secret("")


class Unix(Common, frozen=True, kw_only=True):
    """What the sources have that know their senders."""

    # Empty only with `socket`.
    path: str
    # The owner and its group may write; which group, `group` says.
    mode: int = 0o660
    group: str = ""
    # Adds the kernel's word on who sent an event: $agent_uid, $agent_gid, $agent_pid; and on request in which
    # systemd unit or container that process runs: $agent_unit, $agent_container.
    sender: bool = False
    sender_unit: bool = False
    # Empty: whoever the file's mode lets in.
    allow_uids: tuple[int, ...] = ()
    # As `max_events_per_second` and `burst`, for each user.
    uid_events_per_second: float = 0.0
    uid_burst: int = 0


class UnixStream(Unix, frozen=True, kw_only=True, tag_field="kind", tag="unix_stream"):
    """A listening Unix stream socket."""

    ack: bool = False
    # Beyond it clients wait to be accepted, until one leaves or has to (`agent.accept.shortage`).
    max_connections: int = 1000


class UnixDatagram(Unix, frozen=True, kw_only=True, tag_field="kind", tag="unix_datagram"):
    """A Unix datagram socket."""

    receive_buffer: Size = 32 * MIB


class Udp(Common, frozen=True, kw_only=True, tag_field="kind", tag="udp"):
    """A UDP socket."""

    listen: str = "127.0.0.1:8125"
    # The kernel's default holds 166 datagrams; this holds some 26,000 of 343 bytes.
    receive_buffer: Size = 32 * MIB


class Tcp(Common, frozen=True, kw_only=True, tag_field="kind", tag="tcp"):
    """A listening TCP socket."""

    # Its own port number, so that it may stand beside UDP; on loopback: nothing here is for others.
    listen: str = "127.0.0.1:8125"
    ack: bool = False
    # Beyond it clients wait to be accepted.
    max_connections: int = 1000
    # A client that sends nothing for so long is left; longer than the pauses of programs that log by the
    # hour.
    idle_timeout: Duration = 7200.0
    # With a certificate it speaks TLS, with an authority only with clients that show one of its certificates.
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""


class Http(Common, frozen=True, kw_only=True, tag_field="kind", tag="http"):
    """A listening TCP socket that speaks HTTP, as PostHog's SDKs do with PostHog."""

    # Beside 8125; on loopback: what an SDK sends is not encrypted here.
    listen: str = "127.0.0.1:8127"
    # A body's shape is the SDK's.
    format: Literal["json"] = "json"
    # "any": an SDK's events go to the project whose key it has, as they would without the agent.
    keys: Literal["any", "configured"] = "any"
    # What PostHog takes in one request (`rust/capture/src/router.rs`); unpacked, it may be no larger here.
    max_body: Size = 20 * MIB
    # Clients at once; more wait to be accepted.
    max_connections: int = 1000
    # Networks of the proxies whose word on a client's address is taken. Nobody's: anybody can say anything.
    trusted_proxies: tuple[str, ...] = ()
    # Origins of the web pages that may send events, or "*". None: this host's programs are no browsers.
    cors: tuple[str, ...] = ()
    # How long PostHog has to answer a flag call: its SDKs wait 3 s. While it is away the last good reply
    # stands in, as long as a day and from as much memory; 0 remembers none.
    flags_timeout: Duration = 2.0
    flags_max_age: Duration = 86400.0
    flags_cache: Size = 16 * MIB


Source = UnixStream | UnixDatagram | Udp | Tcp | Http
Stream = UnixStream | Tcp


class Buffer(Settings, frozen=True, kw_only=True):
    """Where events wait."""

    path: str
    kind: Literal["sqlite", "memory"] = "sqlite"
    # A day of 100 events a second.
    max_size: Size = GIB
    # Nothing is dropped unless told to.
    when_full: Literal["block", "drop_oldest", "drop_newest"] = "block"
    max_age: Duration = 0.0
    # An acknowledgement is a promise, also when the power fails.
    durability: Literal["full", "normal"] = "full"


class Admin(Settings, frozen=True, kw_only=True):
    """Where the metrics and the status are."""

    socket: str
    # On loopback: nothing here is for others.
    listen: str = "127.0.0.1:9469"


class Log(Settings, frozen=True, kw_only=True):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json"] = "auto"


class Config(Settings, frozen=True, kw_only=True):
    """A whole configuration; the first project is the default."""

    projects: tuple[Project, ...]
    sources: tuple[Source, ...]
    buffer: Buffer
    admin: Admin
    log: Log = Log()

    @property
    def any_key(self) -> bool:
        """Whether a source keeps the keys that clients send, so that events go out with others than ours."""
        return any(getattr(source, "keys", "") == "any" for source in self.sources)


class Paths(msgspec.Struct, frozen=True):
    """The folders of the sockets and of the buffer, where nothing says otherwise."""

    runtime: str
    state: str


def default_place(kind: type[Source], paths: Paths, *, passed: bool) -> dict[str, str]:
    """Where a source's socket is when nothing says so: nowhere of its own, where systemd has `passed` it."""
    if kind in (UnixStream, UnixDatagram):
        end = "sock" if kind is UnixStream else "dgram"
        return {"path": "" if passed else f"{paths.runtime}/events.{end}"}
    return {"listen": ""} if passed else {}


def default_paths(
    env: Mapping[str, str], *, runtime_writable: bool, state_writable: bool, uid: int, tmp: str
) -> Paths:
    """systemd's folders, else the system's where they are writable, else the user's own."""
    home = env.get("HOME") or f"{tmp}/capture-agent-{uid}"
    user_runtime = env.get("XDG_RUNTIME_DIR")
    own_runtime = f"{user_runtime}/capture-agent" if user_runtime else f"{tmp}/capture-agent-{uid}"
    own_state = f"{env.get('XDG_STATE_HOME') or f'{home}/.local/state'}/capture-agent"
    runtime = "/run/capture-agent" if runtime_writable else own_runtime
    state = "/var/lib/capture-agent" if state_writable else own_state
    # systemd separates several folders by colons; the first is ours.
    return Paths(
        (env.get("RUNTIME_DIRECTORY") or runtime).split(":")[0],
        (env.get("STATE_DIRECTORY") or state).split(":")[0],
    )
