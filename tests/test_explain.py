"""`check --explain` over the real command: what becomes of an example, and that it tells no secret."""

import json
from pathlib import Path

import pytest
from processes import run
from test_shape import keyed

CONFIG = """
[project]
api_key = "phc_x"
[[source]]
kind = "unix_stream"
name = "app"
rename = { signup = "user signed up", "properties.mail" = "email", "properties.a" = "plan" }
redact = ["email", "@ip"]
hash = ["distinct_id"]
hash_key = { env = "HASH_KEY" }
[[source]]
kind = "udp"
drop = ["x", "sign*"]
[[source]]
kind = "tcp"
sample = 0.1
keep = ["sign*"]
"""
KEY = "a key of the tests"
EVENT = """{
  "event": "signup", "distinct_id": "user-1", "$set": {"email": "b@x.de"},
  "properties": {"mail": "b@x.de", "a": 1, "plan": "pro", "from": ["10.0.0.1", 1e999]}
}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "c.toml"
    file.write_text(CONFIG)
    return str(file)


def explained(config: str, *arguments: str, text: str = EVENT) -> tuple[int, str]:
    done = run("check", "--config", config, "--explain", "-", *arguments, text=text, env={"HASH_KEY": KEY})
    assert "Traceback" not in done.stderr
    assert KEY not in done.stdout + done.stderr
    return done.returncode, done.stdout or done.stderr


def test_each_source_tells_what_it_would_do(config: str, tmp_path: Path) -> None:
    """Accepted or refused and by which setting, what is changed, and the event as it would be stored."""
    code, told = explained(config)
    lines = [line.strip() for line in told.splitlines()]
    assert code == 0
    assert lines[0] == "app: accepted"
    assert {
        "event: renamed from 'signup'",
        "distinct_id: hashed",
        "properties.mail: renamed to 'email'",
        "properties.a: gives way to 'plan'",
        "properties.email: redacted",
        "properties.from[0]: redacted",
        "properties.$set.email: redacted",
        f'"distinct_id": "{keyed("user-1")}",',
        '"plan": "pro",',
    } <= set(lines)
    assert 'udp: refused as filtered: drop = "sign*"' in lines
    assert "tcp: refused as sampled: sample = 0.1 ends before this person, who is at 0.776406" in lines
    assert "b@x.de" not in told
    (tmp_path / "event.json").write_text(EVENT)
    done = run("check", "--config", config, "--explain", str(tmp_path / "event.json"), env={"HASH_KEY": KEY})
    assert done.stdout.splitlines()[0] == "app: accepted"


def test_as_json_and_for_one_source(config: str) -> None:
    """A script is told the same; where no source takes the event, the exit code is 1."""
    code, told = explained(config, "--json", "--source", "udp")
    assert code == 1
    [document] = json.loads(told)
    assert document["source"] == "udp"
    assert (document["accepted"], document["reason"], document["why"]) == (
        False,
        "filtered",
        'drop = "sign*"',
    )
    code, told = explained(config, "--json")
    documents = json.loads(told)
    assert code == 0
    assert [one["accepted"] for one in documents] == [True, False, False]
    assert documents[0]["event"]["properties"]["email"] == "[redacted]"
    assert {"where": "distinct_id", "what": "hashed"} in documents[0]["changes"]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ('{"event":"a"}', 1, "app: refused as missing_distinct_id\n"),
        ("nonsense", 1, "app: refused as malformed_json\n"),
        ('{"event":"other","distinct_id":"d"}', 0, "tcp: refused as filtered: keep does not name it\n"),
        ('{"event":"a","distinct_id":"d","timestamp":"soon"}', 0, "kept as $agent_timestamp\n"),
        (" \n", 2, "There is no event"),
        ('\n{"event":"a"}\r\n\n{"event":"b"}\n', 2, "--explain takes one"),
        ('{"event":"a","distinct_id":"d"}\nnonsense', 2, "--explain takes one"),
    ],
)
def test_odd_examples(config: str, text: str, code: int, said: str) -> None:
    """What is wrong with the example itself is told as the door would tell it."""
    done, told = explained(config, text=text)
    assert done == code
    assert said in told


def test_what_does_not_fit_together_is_a_usage_error(config: str) -> None:
    """An unknown source, and one without an example."""
    assert explained(config, "--source", "nobody")[0] == 2
    done = run("check", "--config", config, "--source", "app")
    assert done.returncode == 2
    assert "--explain" in done.stderr
