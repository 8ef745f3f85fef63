"""Reading a configuration: every default, every mistake, and where keys may come from."""

import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.checks import warnings
from agent.cli.check import resolved
from agent.config import (
    Config,
    ConfigError,
    Paths,
    Secret,
    Tcp,
    Udp,
    Unix,
    UnixDatagram,
    UnixStream,
    default_paths,
)
from agent.load import Surroundings, load

CONFIG = Path(__file__).parents[1] / "config"
SYSTEM = Paths("/run/capture-agent", "/var/lib/capture-agent")
KEY = '[project]\napi_key = "phc_k"\n'


def read(text: str, env: Mapping[str, str] | None = None, files: Mapping[str, str] | None = None) -> Config:
    def read_text(path: str) -> str:
        try:
            return (files or {})[path]
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory") from None

    around = Surroundings(env=env or {}, paths=SYSTEM, hostname="berlin-7", read_text=read_text)
    return load(text, around, file="c.toml")


def mistakes(text: str, env: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, env)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return str(caught.value).splitlines()


def test_defaults() -> None:
    """With nothing but a key there is one project, the three sources, and a buffer."""
    config = read(KEY)
    assert [type(source) for source in config.sources] == [UnixStream, UnixDatagram, Udp]
    assert [source.name for source in config.sources] == ["unix_stream", "unix_datagram", "udp"]
    stream, datagram, udp = config.sources
    assert isinstance(stream, UnixStream)
    assert isinstance(datagram, UnixDatagram)
    assert isinstance(udp, Udp)
    assert (stream.path, datagram.path) == (
        "/run/capture-agent/events.sock",
        "/run/capture-agent/events.dgram",
    )
    assert (udp.listen, udp.receive_buffer) == ("127.0.0.1:8125", 32 * 2**20)
    assert config.buffer.path == "/var/lib/capture-agent/buffer.db"
    assert (config.buffer.max_size, config.buffer.durability) == (2**30, "full")
    assert config.admin.socket == "/run/capture-agent/admin.sock"
    [project] = config.projects
    assert (project.name, project.host) == ("default", "https://us.i.posthog.com")
    assert project.api_key == Secret("phc_k")
    assert (project.delivery.linger, project.delivery.max_batch_size) == (0.5, 5 * 2**20)


def test_the_complete_file_states_the_true_defaults() -> None:
    """Every value in config/capture-agent.toml is what one gets without it, and none is missing there."""
    text = (CONFIG / "capture-agent.toml").read_text()
    assert read(text) == read('[project]\napi_key = "phc_..."\n')
    document = tomllib.loads(text)
    config = read(text)
    written = [
        (document["project"], config.projects[0], {"delivery"}),
        (document["delivery"], config.projects[0].delivery, set()),
        (document["buffer"], config.buffer, set()),
        (document["admin"], config.admin, set()),
        (document["log"], config.log, set()),
        *(
            (table, made, {"socket"})  # which stands there as a comment: it goes in the place of `path`
            for table, made in zip(document["source"], config.sources, strict=True)
        ),
    ]
    shared = {field.name for field in msgspec.structs.fields(Unix)}  # written once, at the first source
    for number, (table, made, apart) in enumerate(written):
        names = {field.name for field in msgspec.structs.fields(made)} - apart
        later = number > 5
        assert set(table) - {"kind"} <= names
        assert names - set(table) <= (shared if later else set())


def test_the_minimal_file_works() -> None:
    """config/minimal.toml is enough."""
    assert read((CONFIG / "minimal.toml").read_text()) == read('[project]\napi_key = "phc_..."\n')


def test_what_is_printed_resolved_reads_back_as_the_same() -> None:
    """`check` prints a configuration that means what the given one meant; only the key is hidden."""
    text = """
        [[project]]
        name = "a"
        api_key = "phc_secret"
        delivery = { linger = "1.5 s" }
        [[project]]
        name = "b"
        host = "http://posthog.example:8000"
        api_key = "phc_secret"
        [[source]]
        kind = "udp"
        project = "b"
        properties = { site = "berlin", deep = { list = [1, 2.5, true, "x"] } }
        max_event = "12345 B"
        [[source]]
        kind = "unix_datagram"
        socket = "devlog"
        [[source]]
        kind = "tcp"
        socket = "lines"
        [buffer]
        max_age = "7 d"
    """
    config = read(text)
    printed = "\n".join(resolved(config))
    assert "phc_secret" not in printed
    again = printed.replace("[project.delivery]", "[project.delivery]").replace('"***"', '"phc_secret"')
    assert read(again) == config


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[buffer]\nmax_sise = '1 GiB'\n", "buffer.max_sise: unknown key (did you mean max_size?)"),
        ("[bufer]\n", "bufer: unknown key (did you mean buffer?)"),
        (
            "[buffer]\nwhen_full = 'drop_old'\n",
            (
                "buffer.when_full: 'drop_old' is not one of block, drop_oldest, drop_newest"
                " (did you mean drop_oldest?)"
            ),
        ),
        ("[buffer]\nmax_size = 5\n", 'buffer.max_size: must be a text with a unit, such as "5 MiB"'),
        (
            "[buffer]\nmax_size = '5'\n",
            "buffer.max_size: '5' needs a unit (B, KiB, MiB, GiB, TiB), such as \"900 KiB\"",
        ),
        ("[buffer]\nmax_size = '1 MiB'\n", "buffer.max_size: must be at least 16 MiB"),
        ("[buffer]\npath = 'b.db'\n", "buffer.path: 'b.db' must be an absolute path"),
        (
            "[delivery]\nlinger = 'soon'\n",
            "delivery.linger: 'soon' is not a number with a unit, such as \"250 ms\"",
        ),
        ("[delivery]\nmax_batch_events = 5000\n", "delivery.max_batch_events: must be at most 4096"),
        (
            "[delivery]\nmax_batch_events = '5'\n",
            "delivery.max_batch_events: must be a whole number, not a text",
        ),
        ("[delivery]\nbackoff_max = '10 ms'\n", "delivery.backoff_max: must be at least 1 s"),
        (
            "[delivery.headers]\nContent-Type = 'x'\n",
            "delivery.headers.Content-Type: is set by the agent itself",
        ),
        (
            "[delivery]\nprotocol = 'auto'\nheaders = { Authorization = 'x' }\n",
            'delivery.headers.Authorization: is set by the agent itself with protocol = "auto"',
        ),
        (
            '[delivery.headers]\nX-A = "a\\u000ab"\n',
            "delivery.headers.X-A: may only hold printable ASCII, with no space at its ends",
        ),
        (
            "[[source]]\nkind = 'tcp'\ntls_key = '/k'\n",
            "source[tcp].tls_key: is of no use without tls_cert",
        ),
        (
            "[[source]]\nkind = 'tcp'\nidle_timeout = '0'\n",
            "source[tcp].idle_timeout: must be at least 1 s",
        ),
        (
            "[[source]]\nkind = 'http'\ntrusted_proxies = ['10.0.0.1/8']\n",
            (
                "source[http].trusted_proxies: 10.0.0.1/8 has host bits set:"
                ' write a network, such as "10.0.0.0/8", or an address'
            ),
        ),
        (
            "[[source]]\nkind = 'http'\ncors = ['https://a.example/']\n",
            (
                "source[http].cors: 'https://a.example/' is not an origin,"
                ' such as "https://app.example.com", nor "*"'
            ),
        ),
        ("[[source]]\nkind = 'http'\ncors = '*'\n", "source[http].cors: must be a list, not a text"),
        (
            "[[source]]\nkind = 'udp'\nallow_uids = [1]\n",
            "source[udp].allow_uids: is not for this kind of source, but for unix_stream, unix_datagram",
        ),
        ("[[source]]\nkind = 'http'\nmax_body = '1 GiB'\n", "source[http].max_body: must be at most 100 MiB"),
        (
            "[[source]]\nkind = 'http'\nkeys = 'all'\n",
            "source[http].keys: 'all' is not one of any, configured",
        ),
        (
            (
                "[[source]]\nkind = 'http'\nlisten = '127.0.0.1:1'\n"
                "[[source]]\nkind = 'tcp'\nlisten = '127.0.0.1:1'\n"
            ),
            "source[tcp].listen: TCP 127.0.0.1:1 is that of source[http].listen already",
        ),
        ("[delivery]\nclient_key = '/k'\n", "delivery.client_key: is of no use without client_cert"),
        (
            "[admin]\nlisten = '127.0.0.1:99999'\n",
            "admin.listen: there is no port 99999: the last one is 65535",
        ),
        (
            "[admin]\nlisten = '8125'\n",
            'admin.listen: \'8125\' is not HOST:PORT, such as "127.0.0.1:8125" or "[::1]:8125"',
        ),
        ("[admin]\nlisten = '::1:80'\n", "admin.listen: an IPv6 address stands in brackets: [::1]:80"),
        (
            "[[source]]\nkind = 'unixstream'\n",
            (
                "source[unixstream].kind: 'unixstream' is not: one of unix_stream, unix_datagram, udp, tcp,"
                " http (did you mean unix_stream?)"
            ),
        ),
        (
            "[[source]]\npath = '/x'\n",
            "source[1].kind: missing: one of unix_stream, unix_datagram, udp, tcp, http",
        ),
        (
            "[[source]]\nkind = 'udp'\n[[source]]\nkind = 'udp'\nlisten = '127.0.0.1:1'\n",
            "source[udp].name: there are several sources of this name; each needs its own",
        ),
        (
            "[[source]]\nkind = 'udp'\nname = 'a'\n[[source]]\nkind = 'udp'\nname = 'b'\n",
            "source[b].listen: UDP 127.0.0.1:8125 is that of source[a].listen already",
        ),
        (
            "[[source]]\nkind = 'udp'\nproject = 'defalt'\n",
            "source[udp].project: there is no project 'defalt' (did you mean default?)",
        ),
        (
            "[[source]]\nkind = 'udp'\nname = 'a b'\n",
            (
                "source[a b].name: 1 to 64 letters, digits, dots, dashes and underscores:"
                " it is a label of the metrics"
            ),
        ),
        (
            f"[[source]]\nkind = 'unix_stream'\npath = '/{'x' * 107}'\n",
            "source[unix_stream].path: is 108 bytes long, and a Unix socket's path has at most 107: /"
            + "x" * 107,
        ),
        (
            "[[source]]\nkind = 'unix_stream'\nmode = 660\n",
            "source[unix_stream].mode: 0o1224 is no file mode, such as 0o660",
        ),
        (
            "[[source]]\nkind = 'udp'\nproperties = { x = nan }\n",
            "source[udp].properties.x: cannot be told in JSON (nan and inf are not in it)",
        ),
        (
            "[[source]]\nkind = 'udp'\nproperties = { '$cookieless_mode' = 1 }\n",
            (
                "source[udp].properties.$cookieless_mode: must be true or false:"
                " PostHog refuses a whole batch for another"
            ),
        ),
        ("source = 5\n", "source: must be a list of tables: [[source]]"),
        (
            '[[source]]\nkind = "udp"\ndistinct_id = " "\n',
            "source[udp].distinct_id: is blank, which PostHog refuses",
        ),
        ("buffer = 5\n", "buffer: must be a table: [buffer]"),
    ],
)
def test_each_mistake_is_told_in_its_place(text: str, line: str) -> None:
    """One mistake is one line: the file, the key, what is wrong, and what was probably meant."""
    first, rest = (text, "") if text[0] != "[" else ("", text)
    assert mistakes(first + KEY + rest) == [f"c.toml: {line}"]


def test_no_project_is_called_like_those_that_have_no_name() -> None:
    """Books and metrics could not tell its events from those with keys of their own."""
    why = "'other' is the label of events with keys of their own: choose another"
    assert mistakes(KEY + 'name = "other"\n') == [f"c.toml: project.name: {why}"]
    assert not read(KEY).any_key


@pytest.mark.parametrize(
    ("host", "wrong"),
    [
        (
            "https://app.posthog.com",
            "is where people look at events (did you mean https://us.i.posthog.com?)",
        ),
        (
            "https://eu.posthog.com/",
            "is where people look at events (did you mean https://eu.i.posthog.com?)",
        ),
        ("us.i.posthog.com", 'must be a URL, such as "https://us.i.posthog.com"'),
        ("ftp://us.i.posthog.com", 'must be a URL, such as "https://us.i.posthog.com"'),
        ("https://x:99999", "is no URL: its port or its brackets are wrong"),
        ("https://user:secret@x", "must not hold a user or a password"),
        ("https://x/?a=b", 'must end before "?" and "#"'),
        ("https://x y", "holds characters that no URL has"),
    ],
)
def test_hosts_that_cannot_be(host: str, wrong: str) -> None:
    """A host is an address that events can be sent to, and no secret is shown of one that is not."""
    assert mistakes(f"{KEY}host = '{host}'") == [f"c.toml: project.host: {wrong}"]


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("phx_secret", "is a personal API key (phx_...), which cannot send events: use the project's key"),
        ("phs_secret", "is a project secret key (phs_...)"),
        ("pha_secret", "is an OAuth access token (pha_...)"),
        ("p" * 65, "is longer than 64 bytes"),
        ("phc_schlüssel", "holds characters that no project's key has"),
        ("phc_sec ret", "holds characters that no project's key has"),
    ],
)
def test_keys_that_cannot_be(key: str, wrong: str) -> None:
    """A key that PostHog would refuse is refused here, without being shown."""
    [line] = mistakes(f'[project]\napi_key = "{key}"')
    assert line.startswith(f"c.toml: project.api_key: {wrong}")
    assert key not in line


def test_a_missing_key_says_where_it_is_found() -> None:
    """Nothing works without a key, so the error says how to get one."""
    [line] = mistakes("")
    assert line.startswith("c.toml: project.api_key: missing")
    assert "CAPTURE_AGENT_API_KEY" in line


def test_all_mistakes_are_told_at_once() -> None:
    """Nobody has to mend a file one error at a time."""
    text = "[buffer]\nmax_size = 'x'\nfoo = 1\n[log]\nlevel = 'loud'\n[[source]]\nkind = 'tcq'\n"
    assert len(mistakes(text)) == 5


def test_text_that_is_not_toml_is_told_with_its_line() -> None:
    """A file that is no TOML is one mistake, with line and column."""
    [line] = mistakes("[project]\napi_key = phc_x\n")
    assert line.startswith("c.toml: ")
    assert "line 2" in line


@given(st.text())
def test_no_text_makes_it_fail_otherwise(text: str) -> None:
    """Whatever a file holds, it is a configuration or a `ConfigError`."""
    with suppress(ConfigError):
        read(text)


TOML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("5 MiB"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(["project", "source", "buffer", "delivery", "admin", "log"]),
    st.sampled_from(
        ["name", "kind", "api_key", "path", "delivery", "properties", "headers", "mode", "linger"]
    ),
    TOML_VALUES,
)
def test_no_value_makes_it_fail_otherwise(section: str, key: str, value: object) -> None:
    """Whatever a key holds, it is a setting or a mistake that is told."""
    lines = [f"[[{section}]]" if section == "source" else f"[{section}]"]
    try:
        lines.append(f"{key} = {msgspec.json.encode(value).decode()}")
        tomllib.loads("\n".join(lines))
    except (tomllib.TOMLDecodeError, UnicodeEncodeError):
        return
    with suppress(ConfigError):
        read("\n".join(lines))


def test_a_project_is_one_table_or_several() -> None:
    """Both notations are named where it is neither."""
    told = "c.toml: project: must be a table: [project], or a list of tables: [[project]]"
    assert told in mistakes("project = 5\n")


@pytest.mark.parametrize("name", ["CAPTURE_AGENT_BUFFER", "CAPTURE_AGENT_BUFFER__MAXSIZE"])
def test_a_variable_that_is_none_is_told_a_real_one(name: str) -> None:
    """The suggestion is a variable that would be taken."""
    told = mistakes(KEY, env={name: "5"})
    assert len(told) == 1
    assert "did you mean CAPTURE_AGENT_BUFFER__" in told[0]


def test_the_environment_reaches_every_project() -> None:
    """What is said for `[delivery]` holds for all; a project's own delivery, or variable, goes before it."""
    text = (
        "[[project]]\nname = 'a'\n[[project]]\nname = 'b-1'\napi_key = 'phc_b'\n"
        "delivery = { linger = '2 s' }\n[[project]]\nname = 'c'\napi_key = { env = 'CAPTURE_AGENT_KEY_C' }\n"
    )
    env = {
        "CAPTURE_AGENT_API_KEY": "phc_a",
        "CAPTURE_AGENT_HOST": "http://10.0.0.1",
        "CAPTURE_AGENT_KEY_C": "phc_c",
        "CAPTURE_AGENT_DELIVERY__LINGER": "9 s",
        "CAPTURE_AGENT_DELIVERY__PROXY": "http://10.0.0.9:3128",
        "CAPTURE_AGENT_PROJECT__B_1__DELIVERY__TIMEOUT": "7 s",
        "CAPTURE_AGENT_PROJECT__B_1__HOST": "http://10.0.0.2",
    }
    first, second, third = read(text, env).projects
    assert [project.api_key for project in (first, second, third)] == [
        Secret("phc_a"),
        Secret("phc_b"),
        Secret("phc_c"),
    ]
    assert (first.host, second.host) == ("http://10.0.0.1", "http://10.0.0.2")
    assert [project.delivery.linger for project in (first, second, third)] == [9.0, 2.0, 9.0]
    assert {project.delivery.proxy for project in (first, second, third)} == {Secret("http://10.0.0.9:3128")}
    assert [project.delivery.timeout for project in (first, second)] == [30.0, 7.0]


def test_a_missing_key_names_the_variable_that_would_be_taken() -> None:
    """Of the second project it is not the short one."""
    text = "[[project]]\nname = 'a'\napi_key = 'phc_a'\n[[project]]\nname = 'b'\n"
    [told] = mistakes(text)
    assert told.endswith("or into the environment as CAPTURE_AGENT_PROJECT__B__API_KEY")


def test_the_environment_overrides() -> None:
    """CAPTURE_AGENT_ and the path in capitals set anything, over what the file says."""
    text = f"{KEY}[buffer]\nmax_size = '2 GiB'\n[[source]]\nkind = 'udp'\nname = 'edge-1'\n"
    env = {
        "CAPTURE_AGENT_API_KEY": "phc_env",
        "CAPTURE_AGENT_HOST": "http://10.0.0.1",
        "CAPTURE_AGENT_BUFFER__MAX_SIZE": "4 GiB",
        "CAPTURE_AGENT_BUFFER__WHEN_FULL": "drop_oldest",
        "CAPTURE_AGENT_DELIVERY__CONCURRENCY": "2",
        "CAPTURE_AGENT_DELIVERY__DISABLE_GEOIP": "false",
        "CAPTURE_AGENT_DELIVERY__HEADERS": '{ X-A = "b" }',
        "CAPTURE_AGENT_SOURCE__EDGE_1__LISTEN": "127.0.0.1:9",
        "PATH": "/bin",
    }
    config = read(text, env)
    assert config.projects[0].api_key == Secret("phc_env")
    assert config.projects[0].host == "http://10.0.0.1"
    assert (config.buffer.max_size, config.buffer.when_full) == (4 * 2**30, "drop_oldest")
    delivery = config.projects[0].delivery
    assert (delivery.concurrency, delivery.disable_geoip, delivery.headers) == (
        2,
        False,
        {"X-A": Secret("b")},
    )
    [source] = config.sources
    assert isinstance(source, Udp)
    assert source.listen == "127.0.0.1:9"


def test_a_variable_that_means_nothing_is_a_mistake() -> None:
    """A misspelt variable is told, as a misspelt key is."""
    [line] = mistakes(KEY, {"CAPTURE_AGENT_APIKEY": "phc_secret"})
    assert line.startswith("environment: CAPTURE_AGENT_APIKEY: no such setting")
    assert "phc_secret" not in line


def test_where_keys_may_come_from() -> None:
    """From a file, a variable, or a credential of systemd; white space around it is not the key's."""
    files = {"/k": " phc_file\n", "/run/credentials/posthog": "phc_credential"}
    env = {"KEY": "phc_env", "CREDENTIALS_DIRECTORY": "/run/credentials"}
    for form, expected in (
        ('{ file = "/k" }', "phc_file"),
        ('{ env = "KEY" }', "phc_env"),
        ('{ credential = "posthog" }', "phc_credential"),
    ):
        config = read(f"[project]\napi_key = {form}", env, files)
        assert config.projects[0].api_key == Secret(expected)


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        ('{ file = "/k" }', "/k: No such file or directory"),
        ('{ env = "KEY" }', "the environment variable KEY is not set"),
        (
            '{ credential = "k" }',
            "systemd passes credentials to the agent's unit only (LoadCredential=NAME:... in it): ",
        ),
        ('{ file = "/k", env = "KEY" }', "must be "),
        ("5", "must be "),
    ],
)
def test_keys_that_are_not_where_they_should_be(form: str, wrong: str) -> None:
    """Each says what was looked for."""
    [line] = mistakes(f"[project]\napi_key = {form}")
    assert line.startswith(f"c.toml: project.api_key: {wrong}")


def test_every_entry_that_is_wrong_is_told() -> None:
    """Also several of one list or table, by what is wrong with their types and by what they may be."""
    text = """
        [project]
        api_key = "phc_x"
        [[source]]
        kind = "http"
        drop = ["a", 3, "b", true]
        trusted_proxies = ["10.0.0.0/8", "bogus", "300.1.1.1"]
        cors = ["*", "x", "y"]
        rename = { a = "b", c = 5, d = [] }
        [[source]]
        kind = "unix_stream"
        allow_uids = [1, -3, 5000000000]
        """
    told = [line.removeprefix("c.toml: source[").partition(": ")[::2] for line in mistakes(text)]
    assert told == [
        ("http].trusted_proxies", _no_network("bogus")),
        ("http].trusted_proxies", _no_network("300.1.1.1")),
        ("http].cors", _no_origin("x")),
        ("http].cors", _no_origin("y")),
        ("http].drop", "entry 2 must be a text, not a whole number"),
        ("http].drop", "entry 4 must be a text, not true or false"),
        ("http].rename", "'c' must be a text, not a whole number"),
        ("http].rename", "'d' must be a text, not a list"),
        ("unix_stream].allow_uids", "-3 is no user id"),
        ("unix_stream].allow_uids", "5000000000 is no user id"),
    ]


def _no_network(text: str) -> str:
    no = f"{text!r} does not appear to be an IPv4 or IPv6 network"
    return f'{no}: write a network, such as "10.0.0.0/8", or an address'


def _no_origin(text: str) -> str:
    return f'{text!r} is not an origin, such as "https://app.example.com", nor "*"'


def test_a_project_overrides_the_common_delivery() -> None:
    """`delivery` in a project changes what it names, and leaves the rest as `[delivery]` says."""
    text = """
        [[project]]
        name = "a"
        api_key = "phc_a"
        [[project]]
        name = "b"
        api_key = "phc_b"
        delivery = { concurrency = 1 }
        [delivery]
        concurrency = 4
        linger = "1 s"
    """
    a, b = read(text).projects
    assert (a.delivery.concurrency, a.delivery.linger) == (4, 1.0)
    assert (b.delivery.concurrency, b.delivery.linger) == (1, 1.0)


def test_a_hostname_may_be_the_distinct_id() -> None:
    """`{hostname}` in a source's distinct_id is this host's name."""
    [source] = read(f"{KEY}[[source]]\nkind = 'udp'\ndistinct_id = 'box {{hostname}}'\n").sources
    assert source.distinct_id == "box berlin-7"


def test_a_socket_that_systemd_opens_has_no_place_of_its_own() -> None:
    """A source with `socket` listens nowhere else, whichever its kind, and wherever that is said."""
    text = f"{KEY}[[source]]\nkind = 'udp'\nsocket = 'a'\n[[source]]\nkind = 'unix_stream'\nmode = 0o600\n"
    inherited, own = read(text).sources
    assert isinstance(inherited, Udp)
    assert isinstance(own, UnixStream)
    assert (inherited.socket, inherited.listen) == ("a", "")
    assert (own.socket, own.path) == ("", "/run/capture-agent/events.sock")
    text = f"{KEY}[[source]]\nkind = 'unix_datagram'\n[[source]]\nkind = 'tcp'\n"
    env = {"CAPTURE_AGENT_SOURCE__UNIX_DATAGRAM__SOCKET": "b", "CAPTURE_AGENT_SOURCE__TCP__SOCKET": "c"}
    datagram, tcp = read(text, env).sources
    assert isinstance(datagram, UnixDatagram)
    assert isinstance(tcp, Tcp)
    assert (datagram.socket, datagram.path, tcp.socket, tcp.listen) == ("b", "", "c", "")
    assert not list(warnings(read(text, env)))


@pytest.mark.parametrize(
    ("kind", "setting", "unit"),
    [
        ("udp", "listen = '127.0.0.1:8125'", "ListenStream= or ListenDatagram="),
        ("unix_stream", "path = '/s'", "ListenStream= or ListenDatagram="),
        ("unix_datagram", "mode = 0o660", "SocketMode="),
        ("unix_datagram", "group = 'adm'", "SocketGroup="),
    ],
)
def test_what_systemd_rules_is_not_configured_here(kind: str, setting: str, unit: str) -> None:
    """A place, mode or group beside `socket` is a mistake that says where it belongs."""
    name = setting.partition(" ")[0]
    [line] = mistakes(f"{KEY}[[source]]\nkind = '{kind}'\nsocket = 'events'\n{setting}\n")
    why = f"systemd opens it, as {unit} in the .socket unit says"
    assert line == f"c.toml: source[{kind}].{name}: does not go with `socket`: {why}"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a:b", "'a:b' is no name that FileDescriptorName= takes: ASCII without a colon"),
        ("ä", "'ä' is no name that FileDescriptorName= takes: ASCII without a colon"),
        ("x" * 256, "is no name that FileDescriptorName= takes"),
        ("admin", '"admin" is the name of the admin socket: give this one another'),
    ],
)
def test_a_sockets_name_is_one_that_systemd_takes(name: str, told: str) -> None:
    """What no .socket unit can say is a mistake, and so is the name that means something else."""
    [line] = mistakes(f"{KEY}[[source]]\nkind = 'udp'\nsocket = '{name}'\n")
    assert line.startswith("c.toml: source[udp].socket: ")
    assert told in line


def test_two_sources_cannot_have_one_socket() -> None:
    """Who took an event would be chance."""
    one, two = "[[source]]\nkind = 'udp'\nname = 'a'\n", "[[source]]\nkind = 'tcp'\nname = 'b'\n"
    told = mistakes(f"{KEY}{one}socket = 'x'\n{two}socket = 'x'\n")
    assert told == ['c.toml: source[b].socket: "x" is that of source[a].socket already']


def test_a_secret_shows_itself_to_nobody() -> None:
    """Neither repr nor str nor an encoder gives a key away."""
    text = f"{KEY}[delivery]\nheaders = {{ X-Token = 'phc_k' }}\nproxy = 'http://user:phc_k@proxy:3128'\n"
    config = read(text)
    for shown in (
        repr(config),
        f"{config.projects[0].api_key}",
        msgspec.json.encode(config, enc_hook=str).decode(),
        "\n".join(resolved(config)),
    ):
        assert "phc_k" not in shown


def test_paths_without_a_file() -> None:
    """systemd's folders win, then the system's, then the user's own."""

    def here(env: Mapping[str, str], system: bool) -> Paths:
        return default_paths(env, runtime_writable=system, state_writable=system, uid=1000, tmp="/tmp")

    assert here({}, system=True) == SYSTEM
    assert here({"RUNTIME_DIRECTORY": "", "STATE_DIRECTORY": ""}, system=True) == SYSTEM
    assert here({"HOME": "/home/a"}, system=False) == Paths(
        "/tmp/capture-agent-1000", "/home/a/.local/state/capture-agent"
    )
    own = {"HOME": "/home/a", "XDG_RUNTIME_DIR": "/run/user/1000", "XDG_STATE_HOME": "/home/a/state"}
    assert here(own, system=False) == Paths("/run/user/1000/capture-agent", "/home/a/state/capture-agent")
    systemd = {"RUNTIME_DIRECTORY": "/run/a:/run/b", "STATE_DIRECTORY": "/var/lib/a"}
    assert here(own | systemd, system=False) == Paths("/run/a", "/var/lib/a")


def test_syslog_has_words_of_its_own() -> None:
    """Its lines say whose they are; what is only for it is a mistake elsewhere."""
    text = '[project]\napi_key = "phc_k"\n[[source]]\nkind = "udp"\nformat = "syslog"\n'
    assert read(text).sources[0].distinct_id == "{hostname}"
    assert read(text + 'distinct_id = "{app}@{hostname}"').sources[0].distinct_id == "{app}@{hostname}"
    with pytest.raises(ConfigError, match=r"event: \{person\} is not one of"):
        read(text + 'event = "{person} did"')
    with pytest.raises(ConfigError, match='time_zone: is of no use without format = "syslog"'):
        read(text.replace('"syslog"', '"json"') + 'time_zone = "UTC"')


SHAPED = """
    [[source]]
    kind = "udp"
    drop = ["debug*"]
    keep = ["*"]
    sample = 0.1
    rename = { old = "new", "properties.a" = "b" }
    redact = ["password", "@email"]
    hash = ["distinct_id"]
    hash_key = {key}
"""


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ('"0123456789abcdef"', "0123456789abcdef"),
        ('{ file = "/k" }', "0123456789 of a file"),
        ('{ env = "HASHING" }', "0123456789 of a variable"),
        ('{ credential = "k" }', "0123456789 of systemd"),
    ],
)
def test_a_source_shapes(key: str, text: str) -> None:
    """All settings are read, and the key of the hash from wherever a project's key may be."""
    env = {"HASHING": "0123456789 of a variable", "CREDENTIALS_DIRECTORY": "/c"}
    files = {"/k": " 0123456789 of a file\n", "/c/k": "0123456789 of systemd"}
    config = read(KEY + SHAPED.replace("{key}", key), env, files)
    [source] = config.sources
    assert source.hash_key.reveal() == text
    assert (source.drop, source.keep, source.sample) == (("debug*",), ("*",), 0.1)
    assert source.rename == {"old": "new", "properties.a": "b"}
    assert (source.redact, source.hash) == (("password", "@email"), ("distinct_id",))
    printed = "\n".join(resolved(config))
    assert 'drop = ["debug*"]' in printed
    assert text not in printed
    assert (
        read(printed.replace('"***"', f'"{text}"').replace(f'api_key = "{text}"', 'api_key = "phc_k"'))
        == config
    )


def test_the_environment_wins_over_where_a_hash_key_is_kept() -> None:
    """A file that nobody needs is not read."""
    env = {"CAPTURE_AGENT_SOURCE__UDP__HASH_KEY": "0123456789 of the environment"}
    [source] = read(KEY + SHAPED.replace("{key}", '{ file = "/none" }'), env).sources
    assert source.hash_key == Secret("0123456789 of the environment")


def test_without_keys_no_hash_key_is_looked_up() -> None:
    """Commands that only ask where the agent is need not be able to read it."""
    around = Surroundings(env={}, paths=SYSTEM, hostname="h", read_text=pytest.fail)
    load(SHAPED.replace("{key}", '{ file = "/k" }'), around, file="c.toml", keys=False)


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [
        ("drop = ['']", "drop[1]: is empty"),
        ("keep = ['a', 'b[']", 'keep[2]: \'b[\' has a "[" without "]"; [[] is the character itself'),
        ("sample = 1.5", "sample: must be from 0 to 1: the share of persons that is taken"),
        ("sample = nan", "sample: must be from 0 to 1: the share of persons that is taken"),
        ("redact = ['@emial']", "redact.@emial: is none of @email, @card, @ip (did you mean @email?)"),
        ("redact = ['properties.a']", "redact[1]: is written without 'properties.': 'a'"),
        ("rename = { a = '' }", "rename.a: the new name is blank"),
        ("rename = { 'properties.' = 'b' }", "rename.properties.: names nothing"),
        (
            "rename = { 'properties.a' = 'properties.b' }",
            "rename.properties.a: the new name is written without 'properties.'",
        ),
        (
            "rename = { a = 'properties.b' }",
            "rename.a: an event cannot become a property: write 'properties.a' to rename one",
        ),
        (f"rename = {{ a = '{'x' * 201}' }}", "rename.a: is longer than 200 characters"),
        (
            "hash = ['a']",
            "hash_key: is missing: hash needs a secret, or anybody could try which id a hash is of",
        ),
        ("hash_key = 'too short'", "hash_key: is of no use without hash"),
        (
            "hash = ['a']\nhash_key = 'too short'",
            "hash_key: must have at least 16 characters: openssl rand -hex 32 makes a good one",
        ),
        (
            "hash = ['a', '@ip']\nhash_key = '0123456789abcdef'",
            "hash[2]: '@ip' is no name: what is hashed is named whole",
        ),
        (
            "hash = ['properties.a']\nhash_key = '0123456789abcdef'",
            "hash[1]: is written without 'properties.': 'a'",
        ),
        ("hash = ['']\nhash_key = '0123456789abcdef'", "hash[1]: is empty"),
        ("hash = ['a']\nhash_key = { file = '/none' }", "hash_key: /none: No such file or directory"),
        (
            "hash = ['a']\nhash_key = { x = 1 }",
            'hash_key: must be a text, { file = "..." }, { env = "NAME" } or { credential = "NAME" }',
        ),
    ],
)
def test_mistakes_in_shaping(setting: str, wrong: str) -> None:
    """Each is told, where it is and what would be right."""
    assert mistakes(f'{KEY}[[source]]\nkind = "udp"\n{setting}\n') == [f"c.toml: source[udp].{wrong}"]


def test_a_name_that_is_renamed_before_it_would_be_hidden_is_warned_of() -> None:
    """It is allowed, but hides less than it seems to."""
    rename = "rename = { 'properties.mail' = 'contact', 'properties.email' = 'email 2' }"
    config = read(f"{KEY}[[source]]\nkind = 'udp'\nredact = ['mail', 'email*', '@ip']\n{rename}\n")
    assert list(warnings(config)) == [
        (
            "source[udp].rename.properties.mail",
            "comes before redact and hash, which name 'mail' and not 'contact'",
        )
    ]


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ("redact = ['hostname']", ["hostname"]),
        ("redact = ['host*', 'app', '@ip']\ndistinct_id = '{app}@{hostname}'", ["hostname", "app"]),
        ("redact = ['app']", []),
        ("redact = ['hostname']\ndistinct_id = 'fleet'", []),
        ("redact = ['hostname']\nhash = ['distinct_id']\nhash_key = 'sixteen and more'", []),
        ("hash = ['hostname']\nhash_key = 'sixteen and more'", ["hostname"]),
    ],
)
def test_a_hidden_name_that_the_distinct_id_tells_is_warned_of(told: str, names: list[str]) -> None:
    """A syslog source whose ids are made of what it hides says so, and what to do."""
    config = read(f"{KEY}[[source]]\nkind = 'udp'\nformat = 'syslog'\n{told}\n")
    what = "tells the {} that redact or hash names: add 'distinct_id' to hash, or set another"
    assert list(warnings(config)) == [("source[udp].distinct_id", what.format(name)) for name in names]


@pytest.mark.parametrize(
    "text",
    [
        "[project]\nphc_secret0 = 1\napi_key = 'phc_k'\n",
        "phc_secret0 = 1\n",
        "[phc_secret0]\n[phc_secret0]\n",
        "[project]\nname = 'phc_secret0'\nhost = 'x'\napi_key = 'phc_k'\n[[source]]\nkind = 'phc_secret0'\n",
        f"{KEY}[[source]]\nkind = 'udp'\nproject = 'phc_secret0'\n",
        f"{KEY}[[source]]\nkind = 'udp'\nlisten = 'phc_secret0'\n",
        f"{KEY}[[source]]\nkind = 'unix_stream'\npath = 'phc_secret0'\n",
        f"{KEY}[buffer]\nmax_size = 'phc_secret0'\nwhen_full = 'phc_secret0'\n",
        f"{KEY}[delivery]\nheaders = {{ 'Bearer secret0' = 'Authorization' }}\n",
        f"{KEY}[delivery]\nproxy = 'user:secret0@proxy'\n",
        "[project]\napi_key = { env = 'secret0' }\n",
        "[project]\napi_key = { file = 'secret0' }\n",
        "[project]\napi_key = { credential = 'secret0' }\n",
        "[project]\napi_key = { text = 'secret0' }\n",
        f"{KEY}[[source]]\nkind = 'udp'\nhash = ['distinct_id']\nhash_key = {{ env = 'secret0' }}\n",
        f"{KEY}[[source]]\nkind = 'udp'\nhash = ['distinct_id']\nhash_key = 'secret0'\n",
    ],
)
def test_no_mistake_tells_a_secret(text: str) -> None:
    """Also where it stands in the place of something else."""
    for env in ({}, {"CREDENTIALS_DIRECTORY": "/run/credentials"}):
        assert "secret0" not in "\n".join(mistakes(text, env))
