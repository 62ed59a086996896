"""Imports go one way: between the folders of the benchmark, and between its files."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("harness", "cases", "report", "compiler", "gpu")  # each imports only from those before it
COMMANDS = "the commands"  # the files beside the rooms, which import from all of them


def modules() -> dict[str, Path]:
    """Name → file."""
    files = sorted((ROOT / "bench").rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def imports() -> dict[str, set[str]]:
    """Module → modules of the benchmark that are named in its imports, those inside of functions too."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in known:
                inner = {f"{node.module}.{each.name}" for each in node.names}
                # A package is empty, or its names are asked for themselves.
                found[name] |= (inner & known.keys()) or {node.module}
            elif isinstance(node, ast.Import):
                found[name] |= {each.name for each in node.names} & known.keys()
    return found


def room(module: str) -> str:
    """The folder that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else COMMANDS


def test_no_file_imports_what_imports_it() -> None:
    TopologicalSorter(imports()).prepare()  # which raises where there is a circle


def test_rooms_import_from_rooms_before_them() -> None:
    order = [*ROOMS, COMMANDS]
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if order.index(room(other)) > order.index(room(name))
    ]
    assert not wrong


def test_every_file_can_be_imported_first() -> None:
    """In a process in which nothing of the benchmark is imported yet."""
    names = [name for name in modules() if not name.endswith("__main__")]
    code = """
import importlib, sys
for name in sys.argv[1:]:
    for each in [each for each in sys.modules if each.partition('.')[0] == 'bench']:
        del sys.modules[each]
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, check=True)


def test_the_model_imports_no_benchmark() -> None:
    for path in (*(ROOT / "degmix").rglob("*.py"), *(ROOT / "degmix_kernels").rglob("*.py")):
        assert "import bench" not in (text := path.read_text(encoding="utf-8")), path
        assert "from bench" not in text, path
