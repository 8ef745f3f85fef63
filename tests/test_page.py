"""The status page: its words, its markup, and what the agent serves of it."""

import copy
import re
import socket
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from processes import configure, running
from sources import PROJECT
from trio.testing import MockClock

from agent import config as settings
from agent import page
from agent.admin import PAGES_A_SECOND, Paced
from agent.buffer import Books, Entry, Stats
from agent.buffer.memory import open_memory
from agent.clock import Clock
from agent.deliver.pace import Held
from agent.events import Instant
from agent.httpd import Message, Receive, Send
from agent.metrics import DEAD_REASONS, Metrics
from agent.outside import Outside
from agent.page.concerns import concerns
from agent.page.figures import MEAN, figures
from agent.page.history import EVERY_SECONDS, MOST_SAMPLES, History, sample
from agent.sink import Reply, Sink, serving
from agent.timekeeper import Timekeeper

# An agent that has nothing to say but what a test changes.
DOCUMENT: dict[str, Any] = {
    "version": "1.0",
    "pid": 7,
    "uptime_seconds": 61.0,
    "state": "running",
    "sources": [
        {
            "name": "app",
            "kind": "udp",
            "address": "127.0.0.1:8125",
            "received": 12_345,
            "accepted": 12_000,
            "rejected": {"missing_event": 45, "malformed_json": 300},
            "connections": None,
            "dropped": 17,
        }
    ],
    "buffer": {
        "events": 3,
        "disk_bytes": 2**20,
        "limit_bytes": 2**30,
        "free_bytes": 2**29,
        "filled": 0.25,
        "oldest_seconds": 3700.0,
        "when_full": "block",
        "dead_letters": 2,
        "waiting": 0,
        "dropping": 0,
        "trouble": None,
    },
    "projects": [
        {
            "name": "default",
            "host": "https://us.i.posthog.com",
            "held": None,
            "held_keys": [],
            "clock_ahead_seconds": None,
            "failures": 0,
            "next_try_seconds": None,
            "delivered": 11_995,
            "dead": {"rejected": 2},
            "requests": {"0": 4, "200": 9},
            "last_error": None,
        }
    ],
    "other": None,
    "books": {
        "received": 12_345,
        "accepted": 12_000,
        "rejected": 345,
        "shed": {},
        "delivered": 11_995,
        "dead": 2,
        "replayed": 0,
        "buffered": 3,
        "balanced": True,
    },
    "rejects": [],
}
NO_HISTORY = History().document(0)
HELD = {"reason": "key", "why": "", "since_seconds": 65.0, "next_probe_seconds": 12.0}


def document(**changes: Any) -> dict[str, Any]:
    """The document with changes: `buffer__waiting=1` is one of the buffer's, `project__...` a project's."""
    made = copy.deepcopy(DOCUMENT)
    for name, value in changes.items():
        part, _, field = name.partition("__")
        where = made["projects"][0] if part == "project" else made[part] if field else made
        where[field or part] = value
    return made


def text_of(markup: str) -> str:
    """What a person reads of it."""
    return " ".join(re.sub(r"<[^>]*>", " ", markup).split())


@pytest.mark.parametrize("reason", Held.__args__)  # type: ignore[attr-defined]  # typing keeps the values there
def test_each_hold_says_why_and_what_to_do(reason: str) -> None:
    """Whatever holds a project, or keys that clients sent, a person is told what it means and what to do."""
    held = {**HELD, "reason": reason}
    of_project, of_clients = concerns(document(project__held=held, project__held_keys=[{**held, "keys": 3}]))
    assert (of_project.level, of_project.what) == ("bad", f"Project default is held ({reason})")
    assert of_project.facts == "for 1 min 5 s; next try in 12 s"
    assert (of_clients.level, of_clients.why) == ("warn", of_project.why)
    assert "3 keys that clients sent" in of_clients.what
    for concern in (of_project, of_clients):
        assert len(concern.why) > 20
        assert concern.todo.endswith(".")


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"buffer__trouble": "disk I/O error"}, "bad", "cannot be written"),
        ({"buffer__waiting": 4}, "bad", "is full"),
        ({"buffer__filled": 0.9}, "warn", "almost full"),
        ({"buffer__dropping": 4, "buffer__when_full": "drop_newest"}, "bad", "new events are dropped"),
        ({"state": "stopping"}, "warn", "is stopping"),
        ({"project__next_try_seconds": 2.0}, "warn", "waits between two tries"),
        ({"project__clock_ahead_seconds": 61.0}, "warn", "clock is ahead of"),
        ({"project__clock_ahead_seconds": -61.0}, "warn", "clock is behind"),
    ],
)
def test_concerns(changes: dict[str, Any], level: str, words: str) -> None:
    """What is wrong is told, once, in the list and in the one line that is read aloud."""
    (concern,) = concerns(document(**changes))
    assert concern.level == level
    assert words in concern.what
    parts = figures(document(**changes), NO_HISTORY)
    assert parts["title"] == "capture-agent: 1 to look at"
    assert words in text_of(parts["verdict"])
    assert concern.todo in text_of(parts["attention"])


def test_the_worst_stands_first() -> None:
    """A hold stands before a warning."""
    found = concerns(document(buffer__filled=0.9, project__held=HELD))
    assert [concern.level for concern in found] == ["bad", "warn"]


def test_what_is_read_aloud_stands_still() -> None:
    """The verdict changes when something begins or ends, not with each second of it."""
    later = {**HELD, "since_seconds": 99.0, "next_probe_seconds": 1.0}
    one, other = (figures(document(project__held=held), NO_HISTORY) for held in (HELD, later))
    assert one["attention"] != other["attention"]
    assert one["verdict"] == other["verdict"]


def test_figures() -> None:
    """Every figure of the document that a person needs is on the page."""
    history = {**NO_HISTORY, "in_per_second": [9.0, 12.34], "out_per_second": [0.0, 1234.5]}
    parts = {name: text_of(part) for name, part in figures(document(), history).items()}
    assert parts["title"] == "capture-agent: all well"
    assert parts["about"] == "1.0, running, up 1 min 1 s, process 7"
    assert "In 12 events per second Out 1,234 events per second" in parts["tiles"]
    assert "Oldest 1 h 1 min" in parts["tiles"]
    source = "app udp at 127.0.0.1:8125 12,345 12,000 345 malformed_json: 300 missing_event: 45 17"
    assert source in parts["sources"]
    assert "default to https://us.i.posthog.com flows 11,995 2 200: 9 none: 4" in parts["projects"]
    assert f"default rejected 2 {MEAN['rejected']}" in parts["dead"]
    assert "The books balance" in parts["books"]
    assert parts["books"].count("Difference 0") == 2
    assert parts["rejected"] == ""
    assert set(MEAN) == set(DEAD_REASONS)


def test_books_under_way() -> None:
    """A difference is shown, and said to be passing."""
    books = {
        **DOCUMENT["books"],
        "received": 12_350,
        "shed": {"full_newest": 1, "expired": 2},
        "balanced": False,
    }
    shown = text_of(figures(document(books=books), NO_HISTORY)["books"])
    assert "just being booked" in shown
    assert "less shed (full_newest) 1 Difference 4" in shown
    assert "less shed (expired) 2 less in the buffer 3 Difference -2" in shown


def test_what_others_chose_is_text() -> None:
    """Names, addresses, samples and PostHog's words become no markup."""
    evil = """</script><script>alert(1)</script><img src=x onerror="a'">"""
    made = document(
        project__name=evil,
        project__held={**HELD, "why": evil},
        rejects=[{"at": "2026-01-01T00:00:00.000Z", "source": evil, "reason": evil, "sample": evil}],
    )
    made["sources"][0].update(name=evil, address=evil, rejected={evil: 1})
    made["buffer"]["trouble"] = evil
    whole = page.whole(figures(made, NO_HISTORY))
    checked = Checked(whole)
    assert "img" not in checked.tags
    assert checked.tags.count("script") == 1


def test_history() -> None:
    """Rates are of the time that passed, and the pictures end where the memory does."""
    history = History()
    stats = Stats(5, 0, 0, 0, 1_000_000, 0, 0, 0, {})
    for number in range(MOST_SAMPLES + 5):
        books = Books({Entry("accepted", "a", ""): 30 * number, Entry("accepted", "b", ""): 20 * number})
        books[Entry("delivered", "default", "")] = 10 * number
        at = number * EVERY_SECONDS * 1_000_000
        history.add(sample(books, stats, Instant(3_500_000, at, "")))
    told = history.document(at + 2_000_000)
    assert {len(column) for column in told.values() if isinstance(column, list)} == {3600 // EVERY_SECONDS}
    assert (told["ago_seconds"][-1], told["ago_seconds"][0]) == (2.0, 3592.0)
    assert set(told["in_per_second"]) == {5.0}
    assert set(told["out_per_second"]) == {1.0}
    assert (told["waiting"][0], told["oldest_seconds"][0]) == (5, 2.5)


def test_history_of_books_that_began_anew() -> None:
    """No rate is negative, and a buffer that is empty has no age."""
    history = History()
    for number, total in enumerate((100, 0)):
        books = Books({Entry("accepted", "a", ""): total})
        history.add(sample(books, Stats(0, 0, 0, 0, None, 0, 0, 0, {}), Instant(0, number * 10**7, "")))
    told = history.document(10**7)
    assert (told["in_per_second"], told["oldest_seconds"]) == ([0.0], [0.0])


async def test_the_agent_remembers(autojump_clock: MockClock) -> None:
    """Samples are taken from the start on, one each ten seconds."""
    kept = settings.Buffer(path="/memory", kind="memory")
    made = settings.Config(
        projects=(PROJECT,), sources=(), buffer=kept, admin=settings.Admin(socket="", listen="")
    )
    async with open_memory(kept) as buffer, trio.open_nursery() as nursery:
        clock = Clock()
        outside = Outside(made, buffer, [], Metrics(), clock, Timekeeper(clock, buffer))
        nursery.start_soon(outside.watch)
        await trio.sleep(3 * EVERY_SECONDS + 1)
        assert len(outside._history.document(0)["waiting"]) == 3
        nursery.cancel_scope.cancel()


# --- as the agent serves it --------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checked(HTMLParser):
    """A document that was parsed: its tags, attributes and inline texts; unbalanced tags are an error."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.inline: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"script", "style"}:
            self.inline[self._open[-1]] = self.inline.get(self._open[-1], "") + data

    def of(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [value for _, attribute, value in self.attributes if attribute == name]


def test_the_markup_is_sound() -> None:
    """Tags balance, ids are single and referred to rightly, and tables and pictures can be read aloud."""
    checked = Checked(page.whole(figures(document(), NO_HISTORY)))
    ids = checked.of("id")
    assert len(ids) == len(set(ids))
    for name in ("aria-labelledby", "aria-describedby"):
        assert set(checked.of(name)) <= set(ids)
    assert checked.of("lang") == ["en"]
    assert {"header", "main", "footer", "h1", "noscript", "caption"} <= set(checked.tags)
    assert checked.tags.count("th") == len(checked.of("scope"))
    assert checked.tags.count("svg") == len(checked.of("aria-describedby")) == 3
    assert checked.of("aria-live") == ["polite", "polite"]
    assert set(figures(document(), NO_HISTORY)) - {"title"} <= set(ids)


def test_the_page_is_held_to_itself() -> None:
    """The policy names the page's own script and style alone, and nothing in it needs more."""
    checked = Checked(page.whole(figures(document(project__held=HELD), NO_HISTORY)))
    policy = dict(rule.split(" ", 1) for rule in page.headers()["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        assert checked.tags.count(tag) == 1
        digest = b64encode(sha256(checked.inline[tag].encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy.pop("connect-src") == "'self'"
    assert set(policy) == {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert set(policy.values()) == {"'none'"}
    assert not [
        name for _, name, _ in checked.attributes if name.startswith("on") or name in {"style", "src", "href"}
    ]
    assert not re.search(
        r"url\(|@import|\beval\(|import\(", checked.inline["script"] + checked.inline["style"]
    )


async def test_the_agent_serves_it(tmp_path: Path) -> None:
    """Socket and address show the page with its headers; what events contained is on the socket only."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    async with serving(Sink()) as url:
        config = configure(tmp_path, url)
        config.write_text(config.read_text().replace('listen = ""', f'listen = "{address}"'))
        async with running(config) as agent:
            async with await trio.open_unix_socket(agent.stream) as stream:
                await stream.send_all(b'{"event":"e","distinct_id":"d"}\n' * 3)
                await stream.send_all(b'{"event":"hunter2","distinct_id":"d","properties":{"n":1e999}}\n')
                await stream.send_all(b'{"event":"<b>hunter2</b>","properties":{}}\n')
            await agent.until(delivered=3, dead=1, rejected=1)
            socket_only = httpx.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
            async with (
                httpx.AsyncClient(transport=socket_only, base_url="http://agent") as private,
                httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as public,
            ):
                for client in (private, public):
                    for path, kind in (
                        ("/", "text/html"),
                        ("/figures", "application/json"),
                        ("/history", ""),
                    ):
                        answer = await client.get(path)
                        assert answer.status_code == 200
                        assert answer.headers["content-type"].startswith(kind)
                        assert answer.headers["x-content-type-options"] == "nosniff"
                        assert answer.headers["cache-control"] == "no-store"
                        assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
                        assert "phc_test" not in answer.text
                        assert ("hunter2" in answer.text) == (client is private and path != "/history")
                    assert (await client.post("/")).status_code == 405
                shown = (await public.get("/figures")).json()
                assert shown["edition"] in (await public.get("/")).text
                assert "missing_distinct_id: 1" in shown["parts"]["sources"]
                assert "All is well." in shown["parts"]["verdict"]
                Checked((await private.get("/")).text)


async def test_words_of_who_answers_are_on_the_socket_only(tmp_path: Path) -> None:
    """Who says no may repeat what was sent to him: the address tells the status."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    refusal = Reply(401, b'{"detail":"hunter2 is not known here"}')
    async with serving(Sink(script=lambda _request: refusal)) as url:
        config = configure(tmp_path, url)
        config.write_text(config.read_text().replace('listen = ""', f'listen = "{address}"'))
        async with running(config) as agent:
            async with await trio.open_unix_socket(agent.stream) as stream:
                await stream.send_all(b'{"event":"e","distinct_id":"d"}\n')
            with trio.fail_after(20):
                while not (status := await agent.status())["projects"][0]["held"]:
                    await trio.sleep(0.05)
            assert "hunter2" in status["projects"][0]["held"]["why"]
            async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as public:
                told = (await public.get("/status")).json()["projects"][0]
                assert (told["held"]["reason"], told["held"]["why"]) == ("key", "HTTP 401")
                for path in ("/", "/status", "/figures", "/metrics"):
                    assert "hunter2" not in (await public.get(path)).text


async def test_pages_on_the_address_are_paced(autojump_clock: MockClock) -> None:
    """Whoever asks on and on gets so many a second, and each in his turn."""
    asked: list[float] = []

    async def app(_scope: Message, _receive: Receive, _send: Send) -> None:
        asked.append(trio.current_time())

    async def nothing(*_: object) -> Any:
        raise AssertionError("nobody reads or writes")

    paced = Paced(app)
    async with trio.open_nursery() as nursery:
        for _ in range(PAGES_A_SECOND + 1):
            nursery.start_soon(paced, {}, nothing, nothing)
    assert asked[-1] - asked[0] == pytest.approx(1)
