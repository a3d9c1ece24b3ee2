"""Imports run down only, and each outside library enters by one door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
FILES = sorted((TOP / "qmpsnap").rglob("*.py"))
FLOORS = {"cli": 3, "engine": 2, "hypervisor": 1, "host": 1, "store": 1}
GROUND = 0
DOORS = {
    "qemu": {"hypervisor/monitor.py", "hypervisor/agent.py"},
    "psutil": {"host/process.py"},
    "zstandard": {"store/"},
    "blake3": {"store/"},
    "nbd": {"hypervisor/nbd/"},
    "typer": {"cli/"},
    "rich": {"cli/"},
}
# What a file system is, is one thing for both roots; the worker asks it of the store.
GRANTED = {
    "store/worker.py": {"host.filesystem"},
    "store/remote.py": {"host.filesystem"},
    "store/separate.py": {"host.filesystem"},
}


def imported(path: Path) -> Iterator[str]:
    """Every module that the file names in an import, also inside functions and for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path: Path) -> str:
    return path.relative_to(TOP / "qmpsnap").as_posix()


def package(dotted: str) -> str:
    return dotted.split(".")[0]


def up_or_aside(name: str, module: str) -> bool:
    """Whether *module* (without `qmpsnap.`) lies above the file *name*, or beside its package."""
    here = name.split("/")[0] if "/" in name else ""
    there = package(module)
    if there == here or there not in FLOORS:
        return False
    if name in {"__init__.py", "__main__.py"}:  # the faces of the package itself
        return False
    return FLOORS[there] >= FLOORS.get(here, GROUND)


def test_imports_run_down_only() -> None:
    wrong = [
        f"{own(path)} imports {module}"
        for path in FILES
        for module in imported(path)
        if module.startswith("qmpsnap.")
        and up_or_aside(own(path), below := module.removeprefix("qmpsnap."))
        and not any(below.startswith(one) for one in GRANTED.get(own(path), ()))
    ]
    assert wrong == []


def test_each_outside_library_enters_by_one_door() -> None:
    wrong = [
        f"{own(path)} imports {module}"
        for path in FILES
        for module in imported(path)
        if (doors := DOORS.get(package(module)))
        and not any(own(path) == door or own(path).startswith(door) for door in doors)
    ]
    assert wrong == []


def test_the_doors_are_used() -> None:
    seen = {package(module) for path in FILES for module in imported(path)}
    assert {"qemu", "psutil", "zstandard", "blake3", "typer", "rich"} <= seen


def test_no_module_goes_in_a_circle() -> None:
    graph = {
        "qmpsnap." + own(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): {
            module for module in imported(path) if module.startswith("qmpsnap.")
        }
        for path in FILES
        if path.parent != TOP / "qmpsnap"
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module in done or module not in graph:
            return
        for further in sorted(graph[module]):
            visit(further, (*way, module))
        done.add(module)

    for module in graph:
        visit(module, ())
