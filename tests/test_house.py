"""The house's rules: who may import whom, what is pure, how long a module is, and how it is checked."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "agent").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

LONGEST = 350

# Which room a module stands in; the longest name that fits decides.
ROOMS = {
    "agent": "ground",
    "agent.buffer": "ground",
    "agent.buffer.": "buffer",
    "agent.decode": "door",
    "agent.texts": "door",
    "agent.completion": "door",
    "agent.vouch": "door",
    "agent.envelope": "door",
    "agent.hide": "door",
    "agent.shape": "door",
    "agent.accept": "accept",
    "agent.deliver": "deliver",
    "agent.deliver.cargo": "delivery logic",
    "agent.deliver.clocks": "delivery logic",
    "agent.deliver.keys": "delivery logic",
    "agent.deliver.reply": "delivery logic",
    "agent.deliver.v1": "delivery logic",
    "agent.deliver.verdict": "delivery logic",
    "agent.deliver.wire": "delivery logic",
    "agent.deliver.shipment": "delivery logic",
    "agent.deliver.pace": "delivery logic",
    "agent.flow": "tool",
    "agent.httpc": "tool",
    "agent.httpd": "tool",
    "agent.guard": "tool",
    "agent.places": "tool",
    "agent.logs": "tool",
    "agent.memory": "tool",
    "agent.notify": "tool",
    "agent.signals": "tool",
    "agent.systemd": "tool",
    "agent.trust": "tool",
    "agent.admin": "pages",
    "agent.status": "pages",
    "agent.letters": "pages",
    "agent.page": "pages",
    "agent.contents": "pages",
    "agent.tail": "pages",
    "agent.sink": "sink",
    "agent.doctor": "doctor",
    "agent.outside": "top",
    "agent.app": "top",
    "agent.ways_out": "top",
    "agent.offline": "top",
    "agent.handover": "top",
    "agent.reload": "top",
    "agent.page_sockets": "top",
    "agent.pulse": "top",
    "agent.timekeeper": "top",
    "agent.cli": "cli",
    "agent.__main__": "cli",
}
MAY_IMPORT = {
    "ground": {"ground"},
    "tool": {"ground", "tool"},
    "buffer": {"ground", "buffer"},
    "door": {"ground", "door"},
    "accept": {"ground", "door", "tool", "accept"},
    "delivery logic": {"ground", "delivery logic"},
    "deliver": {"ground", "delivery logic", "tool", "deliver"},
    "pages": {"pages", "ground", "tool", "accept", "deliver", "delivery logic"},
    "sink": {"ground", "tool", "sink"},
    "top": {"ground", "tool", "buffer", "accept", "deliver", "pages", "top"},
    "doctor": {"ground", "tool", "buffer", "accept", "delivery logic", "deliver", "doctor"},
    "cli": {"ground", "tool", "accept", "sink", "doctor", "top", "cli"},
}
GROUND = {
    "agent",
    "agent.advice",
    "agent.bounds",
    "agent.source_checks",
    "agent.buffer",
    "agent.checks",
    "agent.shape_checks",
    "agent.clock",
    "agent.config",
    "agent.crash",
    "agent.events",
    "agent.globs",
    "agent.load",
    "agent.metrics",
    "agent.pack",
    "agent.portal",
    "agent.patterns",
    "agent.references",
    "agent.scan",
    "agent.units",
    "agent.values",
    "agent.veil",
}
PURE = {
    "agent.advice",
    "agent.bounds",
    "agent.source_checks",
    "agent.checks",
    "agent.shape_checks",
    "agent.config",
    "agent.events",
    "agent.globs",
    "agent.load",
    "agent.pack",
    "agent.portal",
    "agent.patterns",
    "agent.references",
    "agent.scan",
    "agent.units",
    "agent.values",
    "agent.veil",
    "agent.accept.flags.breaker",
    "agent.accept.flags.calls",
    "agent.accept.flags.replies",
    "agent.page.concerns",
    "agent.page.figures",
    "agent.page.history",
    "agent.page.markup",
    "agent.doctor.finding",
    "agent.doctor.live",
    "agent.doctor.replies",
    "agent.sink.flags",
    "agent.sink.judge",
    "agent.sink.payload",
    "agent.sink.times",
}
PURE_ROOMS = {"door", "delivery logic"}
IMPURE_MODULES = {"trio", "socket", "sqlite3", "httpx", "threading", "time", "random", "os", "subprocess"}

# Imports that wait on purpose: what takes long to load and is not always needed.
LATE = {("agent.buffer.file", "agent.buffer.schema")}


def room(module: str) -> str:
    fitting = [
        name
        for name in ROOMS
        if module == name
        or (module.startswith(name if name.endswith(".") else name + ".") and name != "agent")
    ]
    found = ROOMS[max(fitting, key=len)] if fitting else "ground"
    assert found != "ground" or module in GROUND, f"{module} stands in no room: give it one in ROOMS"
    return found


def imports(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that it imports, with the statement; not those for types only."""
    guarded = {
        id(inner)
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(TREES[module]):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            base = str(node.module)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base, node


@pytest.mark.parametrize("module", MODULES)
def test_imports(module: str) -> None:
    """A module imports only what its room may know."""
    allowed = MAY_IMPORT[room(module)]
    for imported, _ in imports(module):
        if imported in MODULES:
            assert room(imported) in allowed, (
                f"{module} ({room(module)}) imports {imported} ({room(imported)})"
            )


def test_no_cycles() -> None:
    """No module needs itself."""
    needs = {module: {name for name, _ in imports(module) if name in MODULES} for module in MODULES}
    while leaves := {module for module, needed in needs.items() if not needed & needs.keys() - {module}}:
        needs = {module: needed for module, needed in needs.items() if module not in leaves}
    assert not needs


@pytest.mark.parametrize("module", MODULES)
def test_purity(module: str) -> None:
    """Pure modules neither import nor call what reaches outside."""
    if module not in PURE and room(module) not in PURE_ROOMS:
        return
    for imported, _ in imports(module):
        assert imported.split(".")[0] not in IMPURE_MODULES, f"{module} imports {imported}"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input"}, f"{module} calls {node.func.id}"
        if isinstance(node, ast.Attribute) and node.attr in {"now", "utcnow", "today"}:
            assert not isinstance(node.value, ast.Name) or node.value.id not in {"datetime", "date"}, module


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top(module: str) -> None:
    """Imports inside functions are for the commands, which start fast, and for what is named here."""
    inside = {
        id(inner)
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    late = [imported for imported, node in imports(module) if id(node) in inside]
    if room(module) != "cli":
        assert {(module, imported) for imported in late} <= LATE


@pytest.mark.parametrize("module", MODULES)
def test_shape(module: str) -> None:
    """A module says what it is for on its first line, and is short; a name says what a thing is."""
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= LONGEST, f"{module} wants to be two rooms"
    assert (ast.get_docstring(TREES[module]) or "").split("\n")[0].endswith((".", ":", ",", ";")), module
    assert re.search(r"class \w*(Manager|Handler|Helper|Processor|Service|Util)", text) is None, module
    assert re.search(r"\b(TODO|FIXME|XXX)\b", text) is None, module


def test_one_place_catches_everything() -> None:
    """`except Exception` stands once, where one hostile client must end only itself."""
    found = [
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception"))
    ]
    assert found == ["agent.guard"]


@pytest.mark.parametrize("tool", ["ruff check .", "ruff format --check .", "mypy"])
def test_tools_find_nothing(tool: str) -> None:
    """The linter, the formatter and the type checker are content."""
    done = subprocess.run(
        [sys.executable, "-m", *tool.split()], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_the_command_of_the_readme() -> None:
    """What CI runs is what the README tells people to type."""
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.endswith("-m pytest")]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()
