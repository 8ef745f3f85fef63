"""The manual page and the shells' completion, both made of what `--help` is made of."""

import shutil
import subprocess
from pathlib import Path

import click
import pytest
from processes import COMMAND, ENVIRONMENT, run

from agent import __version__
from agent.cli import VERBS, main
from agent.cli.roff import page


def test_the_page_has_every_command_and_option() -> None:
    """What a command takes is on the page with the text of its `--help`."""
    done = run("man", env={"SOURCE_DATE_EPOCH": "1798761600"})
    assert done.returncode == 0
    first = done.stdout.splitlines()[0]
    assert first == f'.TH CAPTURE-AGENT 1 2027-01-01 "capture-agent {__version__}" "User Commands"'
    text = done.stdout.replace("\\-", "-").replace("\\&", "")
    context = click.Context(main, info_name="capture-agent")
    for verb in VERBS:
        command = main.get_command(context, verb)
        assert command is not None
        assert f'.SS "{verb}"' in text
        for option in command.params:
            if isinstance(option, click.Option) and option.help:
                assert option.help.split("\n")[0].split("  ")[0] in text
    assert '.SS "dead-letter replay"' in text


def test_the_page_is_good_roff(tmp_path: Path) -> None:
    """The programs that show manual pages have nothing to say against it."""
    file = tmp_path / "capture-agent.1"
    file.write_text(page(main, version="1.0", day="2026-12-31"))
    checks = {"groff": ["groff", "-man", "-ww", "-z"], "mandoc": ["mandoc", "-Tlint", "-Wwarning"]}
    found = {name: command for name, command in checks.items() if shutil.which(name)}
    if not found:
        pytest.skip("neither groff nor mandoc is installed")
    for command in found.values():
        done = subprocess.run([*command, str(file)], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_texts_that_roff_would_obey_are_shown() -> None:
    """Help may begin a line with a dot, and hold a backslash."""

    @click.group()
    def group() -> None:
        """.profile is not read.

        A path like C:\\n is a text.
        """

    text = page(group, version="1", day="2026-12-31")
    assert "\n\\&.profile is not read.\n" in text
    assert "C:\\en" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_reads_its_script(shell: str) -> None:
    """The script is of that shell, which has nothing to say against it."""
    done = run("completion", shell)
    assert done.returncode == 0
    assert f"_CAPTURE_AGENT_COMPLETE={shell}_complete" in done.stdout
    if shutil.which(shell):
        checked = subprocess.run(
            [shell, "-n"], check=False, input=done.stdout, capture_output=True, text=True
        )
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("do", ["doctor"]), ("doctor --", ["--config", "--json", "--as", "--help"]), ("completion f", ["fish"])],
)
def test_words_are_completed(tmp_path: Path, typed: str, offered: list[str]) -> None:
    """What bash asks for it is given: commands, options, choices."""
    program = tmp_path / "capture-agent"  # click goes by the name
    code = "from agent.cli import main; main(prog_name='capture-agent')"
    program.write_text(f'#!/bin/sh\nexec {COMMAND[0]} -c "{code}" "$@"\n')
    program.chmod(0o755)
    words = f"capture-agent {typed}"
    done = subprocess.run(
        [str(program)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={
            **ENVIRONMENT,
            "_CAPTURE_AGENT_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
    )
    assert [entry.split(",")[1] for entry in done.stdout.splitlines()] == offered
