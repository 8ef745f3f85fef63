"""Syslog on real sockets: over UDP, TCP and Unix sockets, from logger(1) and from JSON programs."""

import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from sources import datagram, stream, taking, tcp, udp

ASK = b'{"ack":true}'
README = Path(__file__).parents[1] / "README.md"
LINE = b"<38>Nov 24 13:44:25 web-1 sshd[71]: Accepted publickey for deploy"
NEWER = b"<165>1 2003-10-11T22:14:15.003Z web-2 app 7 ID47 - hello"


async def test_a_line_of_udp() -> None:
    """A datagram is one line, however many newlines are in it; its host is whose event it is."""
    async with taking(udp(format="syslog", distinct_id="{hostname}")) as taken:
        host, _, port = taken.source.address.rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect((host, int(port)))
            for data in (LINE, LINE + b"\nand more\n", b"nonsense", b"\n"):
                sender.send(data)
        events = await taken.events(3)
        assert [event["properties"]["message"] for event in events] == [
            "Accepted publickey for deploy",
            "Accepted publickey for deploy\nand more",
            "nonsense",
        ]
        assert [event["distinct_id"] for event in events] == ["web-1", "web-1", socket.gethostname()]
        assert events[2]["properties"]["unparsed"] is True
        for event in events:
            assert event["event"] == "syslog"
            assert event["properties"]["$process_person_profile"] is False
            assert event["options"] == {"process_person_profile": False}


async def test_the_time_of_receipt_unless_the_line_knows_better() -> None:
    """Whole seconds are not enough to tell events apart; a fraction is the event's own time."""
    async with taking(tcp(format="syslog", time_zone="UTC")) as taken:
        host, _, port = taken.source.address.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as sender:
            await sender.send_all(LINE + b"\n" + NEWER + b"\n")
        first, second = await taken.events(2)
        assert first["timestamp"] > "2026"
        assert first["properties"]["syslog_timestamp"].endswith("-11-24T13:44:25Z")
        assert second["timestamp"] == "2003-10-11T22:14:15.003000Z"


@pytest.mark.parametrize("framed", [b"%d %b", b"%b\n", b"%b\0"])
async def test_both_framings(framed: bytes, tmp_path: Path) -> None:
    """Counted or ended, told by the first bytes of a connection; a counted frame may hold newlines."""
    counted = framed.startswith(b"%d")
    lines = [LINE, NEWER, LINE + (b"\nmore" if counted else b"")]
    async with taking(stream(tmp_path, format="syslog")) as taken:
        async with await trio.open_unix_socket(taken.source.address) as sender:
            for line in lines:
                await sender.send_all(framed % ((len(line), line) if counted else line))
        events = await taken.events(3)
        assert events[2]["properties"]["message"].endswith("\nmore" if counted else "deploy")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("before", [b"", b"\n\n"])
async def test_counted_frames_may_follow_the_line_that_asks(
    before: bytes, end: bytes, tmp_path: Path
) -> None:
    """The greeting is a line, what comes after it tells its framing anew; however the bytes are cut."""
    frames = b"24 <13>1 - h app - - - oct\n24 <13>1 - h app - - - octB"
    said = before + ASK + end + frames
    async with taking(stream(tmp_path, format="syslog")) as taken:
        for cut in range(len(before + ASK + end) + 5):
            answer = await answered(taken.source.address, said[:cut], said[cut:])
            assert answer.splitlines()[-1] == b'{"accepted":2,"rejected":0}'
        messages = [event["properties"]["message"] for event in await taken.events(1)]
        assert set(messages) == {"oct", "octB"}


@pytest.mark.parametrize("greeting", [b"12 %b", b"12 %b\n", b"%b\n", b"%b\0"])
async def test_who_asks_may_go_on_as_it_began(greeting: bytes, tmp_path: Path) -> None:
    """A greeting in a counted frame is followed by frames, one in a line by lines."""
    counted = greeting.startswith(b"1")
    rest = b"9 a\n5 <13>b11 no priority" if counted else b"a\n5 b\n<13>12 no priority\n"
    async with taking(stream(tmp_path, format="syslog")) as taken:
        said = greeting % ASK + rest
        for cut in range(len(said)):
            answer = await answered(taken.source.address, said[:cut], said[cut:])
            assert answer.splitlines()[-1] == b'{"accepted":%d,"rejected":0}' % (2 if counted else 3)


@pytest.mark.parametrize(
    ("cut", "kept"), [(b"24 <13>1 - h app - - - oc", "<13>1 - h app - - - oc"), (b"24 ", ""), (b"24", "24")]
)
async def test_a_counted_frame_that_an_end_cuts_off_is_truncated(
    cut: bytes, kept: str, tmp_path: Path
) -> None:
    """However clean the end: the frame is refused with its beginning, the ones before it are events."""
    async with taking(stream(tmp_path, format="syslog", ack=True)) as taken:
        answer = await answered(taken.source.address, b"24 <13>1 - h app - - - octA" + cut)
        assert answer.splitlines()[-2:] == [
            b'{"line":2,"error":"truncated"}',
            b'{"accepted":1,"rejected":1}',
        ]
        assert taken.total("rejected", "truncated") == 1
        assert [refusal.sample for refusal in taken.source.putter.recent] == [kept]


async def test_a_line_of_syslog_that_an_end_ends_is_an_event(tmp_path: Path) -> None:
    """Only a count tells that more should have come."""
    async with taking(stream(tmp_path, format="syslog", ack=True)) as taken:
        answer = await answered(taken.source.address, LINE + b"\n" + LINE)
        assert answer.splitlines()[-1] == b'{"accepted":2,"rejected":0}'


async def answered(path: str, *pieces: bytes) -> bytes:
    """What the agent says to a client who sends these pieces and ends."""
    async with await trio.open_unix_socket(path) as sender:
        for piece in filter(None, pieces):
            await sender.send_all(piece)
            await trio.testing.wait_all_tasks_blocked(0.002)
        await sender.send_eof()
        return b"".join([some async for some in sender])


async def test_names_and_ids_can_be_made_of_the_line(tmp_path: Path) -> None:
    """`event` and `distinct_id` may hold what the line says."""
    settings = stream(tmp_path, format="syslog", event="{app} {severity}", distinct_id="{app}@{hostname}")
    async with taking(settings) as taken:
        async with await trio.open_unix_socket(taken.source.address) as sender:
            await sender.send_all(LINE + b"\n")
        [event] = await taken.events(1)
        assert (event["event"], event["distinct_id"]) == ("sshd info", "sshd@web-1")


async def test_an_event_in_a_message_is_that_event(tmp_path: Path) -> None:
    """Bare or after `@cee:`, whatever stands before it."""
    event = b'{"event":"signup","distinct_id":"u","properties":{"plan":"pro"}}'
    async with taking(datagram(tmp_path, format="syslog")) as taken:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(taken.source.address)
            for data in (event, b"<13>Nov 24 13:44:25 web-1 app: @cee: " + event, LINE):
                await trio.to_thread.run_sync(sender.send, data)
        events = await taken.events(3)
        assert [found["event"] for found in events] == ["signup", "signup", "syslog"]
        assert events[0]["properties"]["plan"] == events[1]["properties"]["plan"] == "pro"


@pytest.mark.parametrize("told", [{}, {"sender": True}, {"drop": ("noise",)}, {"redact": ("secret",)}])
async def test_an_event_in_a_message_keeps_its_person(told: dict[str, Any], tmp_path: Path) -> None:
    """No profile is denied to the person of a JSON event, while lines beside it have none, in any order."""
    noise, signup = (b'{"event":"%b","distinct_id":"u"}' % name for name in (b"noise", b"signup"))
    lines = [
        LINE,
        noise,
        LINE,
        b"<13>Nov 24 13:44:25 web-1 app: @cee: " + signup,
        signup,
        LINE,
        noise,
        signup,
    ]
    async with taking(stream(tmp_path, format="syslog", **told)) as taken:
        async with await trio.open_unix_socket(taken.source.address) as sender:
            await sender.send_all(b"\n".join((*lines, b"")))
        events = await taken.events(6 if "drop" in told else 8)
        assert len([event for event in events if event["event"] == "signup"]) == 3
        for event in events:
            made = event["event"] == "syslog"
            assert ("options" in event) == ("$process_person_profile" in event["properties"]) == made
            assert event["properties"]["$lib"] == "capture-agent"


async def test_a_profile_that_is_configured_is_every_events(tmp_path: Path) -> None:
    """What the source's `properties` say holds for lines and for JSON events alike."""
    settings = stream(tmp_path, format="syslog", properties={"$process_person_profile": True})
    async with taking(settings) as taken:
        async with await trio.open_unix_socket(taken.source.address) as sender:
            await sender.send_all(LINE + b'\n{"event":"signup","distinct_id":"u"}\n')
        events = await taken.events(2)
        assert [event["options"] for event in events] == [{"process_person_profile": True}] * 2


@pytest.mark.skipif(shutil.which("rsyslogd") is None, reason="needs rsyslogd")
async def test_rsyslog_by_the_recipe_of_the_readme(tmp_path: Path) -> None:
    """A message comes as it was written: no space before it, its tabs and newlines as they are."""
    recipe = README.read_text().split("- **rsyslog**", 1)[1].split("```")[1]
    said = ["hello", "a\ttab and\na newline", "schön"]
    async with taking(tcp(format="syslog")) as taken:
        own, port = str(tmp_path / "log.sock"), taken.source.address.rpartition(":")[2]
        config = tmp_path / "rsyslog.conf"
        config.write_text(
            f'global(workDirectory="{tmp_path}")\nmodule(load="imuxsock" SysSock.Use="off")\n'
            f'input(type="imuxsock" Socket="{own}")\n{recipe.replace("5514", port)}'
        )
        command = ["rsyslogd", "-n", "-f", str(config), "-i", str(tmp_path / "pid")]
        async with trio.open_nursery() as nursery:
            rsyslogd = await nursery.start(trio.run_process, command)
            while not Path(own).exists():
                await trio.sleep(0.01)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.connect(own)
                for message in (*said, '{"event":"signup","distinct_id":"u"}'):
                    sender.send(f"<13>Nov 24 13:44:25 app[71]: {message}".encode())
            *lines, signup = await taken.events(4)
            rsyslogd.terminate()
        assert [event["properties"]["message"] for event in lines] == said
        assert {(event["properties"]["app"], event["properties"]["procid"]) for event in lines} == {
            ("app", "71")
        }
        assert (signup["event"], signup["distinct_id"]) == ("signup", "u")


@pytest.mark.skipif(shutil.which("logger") is None, reason="needs logger(1)")
@pytest.mark.parametrize("rfc", ["--rfc3164", "--rfc5424", None])
@pytest.mark.parametrize("make", [datagram, stream, udp, tcp])
async def test_logger(rfc: str | None, make: Any, tmp_path: Path) -> None:
    """What logger(1) sends, by every road that it knows, is read."""
    unix = make in (datagram, stream)
    settings = make(tmp_path, format="syslog") if unix else make(format="syslog")
    async with taking(settings) as taken:
        where = ["--socket", taken.source.address]
        if not unix:
            host, _, port = taken.source.address.rpartition(":")
            where = ["--tcp" if make is tcp else "--udp", "--server", host, "--port", port]
        command = ["logger", *where, "--tag", "backup", "--id=71", "-p", "local3.warning", "all done"]
        command += [rfc] if rfc and not unix else []
        done = await trio.to_thread.run_sync(
            lambda: subprocess.run(command, check=False, capture_output=True)
        )
        assert done.returncode == 0, done.stderr
        [event] = await taken.events(1)
        properties = event["properties"]
        assert (properties["message"], properties["app"], properties["procid"]) == (
            "all done",
            "backup",
            "71",
        )
        assert (properties["facility"], properties["severity"]) == ("local3", "warning")
        assert "unparsed" not in properties
