"""The points at which tests end the agent: where they stand, and what arms them."""

import ast

import pytest
from processes import run
from test_house import TREES

from agent.crash import POINTS, VARIABLE, NoSuchPoint, arm, point


def calls(name: str) -> list[tuple[str, ast.expr]]:
    """Every call of one of the module's functions: where, and with what."""
    return [
        (module, node.args[0])
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"crash.{name}"
    ]


def test_each_point_stands_where_the_list_says() -> None:
    """Once, in its module, by its own name."""
    stands = [(ast.literal_eval(name), module) for module, name in calls("point")]
    assert len(stands) == len(dict(stands))
    assert dict(stands) == POINTS


def test_one_place_arms_them() -> None:
    """Only `run` does, at its start, by the environment; nothing else names the module's insides."""
    assert [(module, ast.unparse(env)) for module, env in calls("arm")] == [("agent.cli.run", "os.environ")]
    used = {
        ast.unparse(node)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "crash"
    }
    assert used == {"crash.arm", "crash.point"}


def test_nothing_happens_unless_it_is_armed() -> None:
    """Every point is passed, and the process goes on."""
    arm({})
    arm({VARIABLE: ""})
    for name in POINTS:
        point(name)


@pytest.mark.parametrize(
    "said", ["nowhere", "put.asked:0", "put.asked:", "put.asked:-1", " put.asked", "put"]
)
def test_what_is_no_point_is_refused(said: str) -> None:
    """Whoever misspells one does not test a crash that never comes."""
    with pytest.raises(NoSuchPoint, match="is no point to crash at"):
        arm({VARIABLE: said})


def test_the_agent_does_not_start_with_it() -> None:
    """A name that is none is told in two lines, before anything is opened."""
    done = run("run", env={VARIABLE: "nowhere", "CAPTURE_AGENT_API_KEY": "phc_test"})
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"capture-agent: {VARIABLE}: 'nowhere' is no point to crash at",
        "  try: unset it: it is for tests only",
    ]
