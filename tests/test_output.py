"""What the commands print on: terminals, full disks, closed streams, other encodings; and Ctrl-C."""

import json
import os
import pty
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio
from processes import COMMAND, ENVIRONMENT, configure, run, running

from agent.sink import Sink, serving

# What some terminals obey, or what hides its neighbours: CSI as one character, DEL, a bidi mark, a tag.
HOSTILE = "a\x9b31mb\x7f\u202ec\U000e0041"


def on_terminal(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """A command on a terminal: its exit code and what the terminal got."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "80", **(env or {})},
    )
    os.close(theirs)
    got = b""
    try:
        while part := os.read(ours, 65536):
            got += part
    except OSError:  # it has closed its end
        os.close(ours)
    return process.wait(60), got.decode()


def send(config: Path, count: int = 1) -> None:
    """Events whose every text is hostile; PostHog's stand-in can be told to refuse them."""
    event = {"event": HOSTILE, "distinct_id": HOSTILE, "properties": {"refuse": "1", HOSTILE: HOSTILE}}
    good = '{"event":"good","distinct_id":"d"}\n'
    text = good + f"{json.dumps(event, ensure_ascii=False)}\n" * count
    done = run("send", "--stdin", "--config", str(config), text=text)
    assert done.returncode == 0, done.stderr


async def test_a_terminal_gets_nothing_of_dead_letters_that_it_could_obey(tmp_path: Path) -> None:
    """What is for people shows it escaped; JSON has it as JSON's escapes, in a pipe as it was."""
    async with serving(Sink(reject_if=("refuse", "1"))) as url:
        config = configure(tmp_path, url)
        async with running(config) as agent:
            await trio.to_thread.run_sync(send, config)
            await agent.until(delivered=1, dead=1)
            for verb in ("list", "show 1", "show 1 --json", "list --json", "export"):
                arguments = ("dead-letter", *verb.split(), "--config", str(config))
                code, shown = await trio.to_thread.run_sync(on_terminal, *arguments)
                assert code == 0, shown
                assert shown.replace("\r\n", "").isprintable(), verb
                if verb.endswith(("--json", "export")):
                    piped = await trio.to_thread.run_sync(run, *arguments)
                    assert HOSTILE in piped.stdout
                    assert json.loads(shown) == json.loads(piped.stdout)


async def test_a_terminal_gets_nothing_of_the_buffer_that_it_could_obey(tmp_path: Path) -> None:
    """`export` there is the same JSON in another spelling."""
    config = configure(tmp_path, "http://127.0.0.1:9")
    async with running(config):
        await trio.to_thread.run_sync(send, config, 3)
        _, shown = await trio.to_thread.run_sync(on_terminal, "export", "--config", str(config))
    assert shown.replace("\r\n", "").isprintable()
    piped = run("export", "--config", str(config)).stdout
    assert HOSTILE in piped
    assert list(map(json.loads, shown.splitlines())) == list(map(json.loads, piped.split("\n")[:-1]))


@pytest.mark.parametrize("setting", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colours_gets_none(tmp_path: Path, setting: dict[str, str]) -> None:
    """As no-color.org asks for, and on a terminal that knows none."""
    arguments = "doctor", "--config", str(configure(tmp_path, "http://127.0.0.1:9"))
    assert "\x1b[31m" in on_terminal(*arguments)[1]
    _, shown = on_terminal(*arguments, env=setting)
    assert "error   " in shown
    assert "\x1b[31m" not in shown


VERBS = ("check", "doctor --json", "--help", "export")


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_told_in_two_lines(tmp_path: Path, verb: str) -> None:
    """No traceback where the output cannot be written: what is wrong, and what to do."""
    config = _with_events(tmp_path) if verb == "export" else configure(tmp_path, "http://127.0.0.1:9")
    given = () if verb.startswith("-") else ("--config", str(config))
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *verb.split(), *given], check=False, stdout=full, stderr=subprocess.PIPE, timeout=60,
            env=ENVIRONMENT,
        )  # fmt: skip
    wrong, hint = done.stderr.decode().splitlines()
    assert wrong == "capture-agent: the output cannot be written: No space left on device"
    assert hint.startswith("  try: ")
    assert done.returncode == 1


@pytest.mark.parametrize("verb", [*VERBS, "status"])
def test_streams_that_are_closed_are_no_error(tmp_path: Path, verb: str) -> None:
    """As some supervisors start commands: the exit code is what it always is."""
    config = _with_events(tmp_path) if verb == "export" else configure(tmp_path, "http://127.0.0.1:9")
    command = [*COMMAND, *verb.split(), *(() if verb.startswith("-") else ("--config", str(config)))]
    usual = subprocess.run(command, check=False, capture_output=True, timeout=60, env=ENVIRONMENT)
    closing = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(closing, check=False, timeout=60, env=ENVIRONMENT).returncode == usual.returncode


def _with_events(folder: Path) -> Path:
    """The configuration of an agent that left events in its buffer."""
    config = configure(folder, "http://127.0.0.1:9")

    async def leave() -> None:
        async with running(config):
            await trio.to_thread.run_sync(send, config, 5)

    trio.run(leave)
    return config


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
async def test_other_encodings_lose_no_more_than_they_must(tmp_path: Path, encoding: str) -> None:
    """What an encoding has not is escaped."""
    async with running(config := configure(tmp_path, "http://127.0.0.1:9")):
        with socket.socket(socket.AF_UNIX) as sender:
            sender.connect(str(tmp_path / "events.sock"))
            sender.sendall('{"event":"日本語"\n'.encode())
        with trio.fail_after(30):
            done = run("status", "--config", str(config))
            while "日本語" not in done.stdout:
                done = await trio.to_thread.run_sync(run, "status", "--config", str(config))
        done = run("status", "--config", str(config), env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u65e5\u672c\u8a9e" in done.stdout


async def test_ctrl_c_ends_a_command_without_a_word(tmp_path: Path) -> None:
    """Also in the depth of a nursery, as where `doctor` waits for PostHog: 130, as shells have it."""
    async with serving(Sink(latency=60)) as url:
        sink = int(url.rsplit(":", 1)[1])
        config = configure(tmp_path, url)
        process = await trio.lowlevel.open_process(
            [*COMMAND, "doctor", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        with trio.fail_after(60):
            while f":{sink:04X} 01" not in Path("/proc/net/tcp").read_text():
                await trio.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert process.stdout is not None
            assert process.stderr is not None
            assert await process.stdout.receive_some() == b""
            assert await process.stderr.receive_some() == b""
