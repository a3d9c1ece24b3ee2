"""Imports run down the five floors only, without a circle, and each library enters by one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qmpsnap"
# rooms on one floor do not import one another
FLOORS = {"__main__": 6, "cli": 5, "engine": 3, "hypervisor": 2, "host": 2, "store": 2}
DOORS = {
    "qemu": ("qmpsnap.hypervisor.monitor",),
    "psutil": ("qmpsnap.host.process",),
    "zstandard": ("qmpsnap.store.",),
    "blake3": ("qmpsnap.store.",),
    "cryptography": ("qmpsnap.store.ed25519", "qmpsnap.store.aead"),
    "nbd": ("qmpsnap.hypervisor.nbd.",),
    "numpy": tuple(f"qmpsnap.hypervisor.vmstate.{name}" for name in ("walk", "pages", "feed")),
    "typer": ("qmpsnap.cli.",),
    "click": ("qmpsnap.cli.",),
    "rich": ("qmpsnap.cli.",),
}
# the worker's process tells the store's facts in the words of host.filesystem
ALLOWED = {
    (f"qmpsnap.store.{module}", "qmpsnap.host.filesystem")
    for module in ("worker", "remote", "separate")
}


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _modules() -> dict[str, ast.Module]:
    return {_module(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def _imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their floor"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else str(node.module)


def _floor(module: str) -> int:
    parts = module.split(".")
    if len(parts) == 1:
        return 4  # the package itself: Engine and Machine for those who import it
    return FLOORS.get(parts[1], 0)


def _upward(edges: dict[str, set[str]]) -> list[str]:
    wrong = []
    for module, imported in edges.items():
        for other in imported:
            same_room = module.split(".")[1:2] == other.split(".")[1:2]
            fine = same_room or _floor(other) < _floor(module) or (module, other) in ALLOWED
            if not fine and not (_floor(module) == _floor(other) == 0):
                wrong.append(f"{module} imports {other}")
    return wrong


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    trees = _modules()
    found = {name: set(_imports(tree, set(trees))) for name, tree in trees.items()}
    assert len(found) > 60
    return found


def _inner(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    return {
        module: {other for other in imported if other.split(".")[0] == "qmpsnap"}
        for module, imported in edges.items()
    }


def test_imports_run_down_only(edges: dict[str, set[str]]) -> None:
    assert _upward(_inner(edges)) == []


def test_no_module_imports_itself_in_a_circle(edges: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(_inner(edges)).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_each_outside_library_has_one_door(edges: dict[str, set[str]]) -> None:
    wrong = [
        f"{module} imports {library}"
        for module, imported in edges.items()
        for library, doors in DOORS.items()
        if any(other.split(".")[0] == library for other in imported)
        and not f"{module}.".startswith(
            tuple(door if door[-1] == "." else f"{door}." for door in doors)
        )
    ]
    assert wrong == []


def test_the_scripts_of_their_own_stand_on_the_standard_library_alone(
    edges: dict[str, set[str]],
) -> None:
    """They run with -I -S: nothing else is there."""
    for script in ("guest.rescuer", "vmstate.drain"):
        names = {other.split(".")[0] for other in edges[f"qmpsnap.hypervisor.{script}"]}
        assert names & {"qmpsnap", "msgspec", "psutil", "qemu"} == set()


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("qmpsnap.store.half", "qmpsnap.host.filesystem"),
        ("qmpsnap.hypervisor.monitor", "qmpsnap.engine.plan"),
        ("qmpsnap.errors", "qmpsnap.cli.main"),
        ("qmpsnap.host.lock", "qmpsnap.hypervisor.abilities"),
    ],
)
def test_the_rule_sees_what_breaks_it(module: str, imported: str) -> None:
    assert _upward({module: {imported}}) == [f"{module} imports {imported}"]


def test_numpy_is_loaded_by_what_needs_it() -> None:
    """It takes as long as all the rest: a verb that moves no RAM goes without."""
    said = "import sys, qmpsnap.engine.engine; print('numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
