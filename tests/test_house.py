"""The folders keep apart what they should: who may include and import what."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from mutate import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "native"
SOURCES = [file for file in NATIVE.rglob("*") if file.suffix in (".h", ".cc", ".cu")]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def included_outside(folder: str, headers: str) -> set[tuple[str, str]]:
    """Files outside a folder of ``native``, and matching headers that they include."""
    return {
        (str(file.relative_to(NATIVE)), header)
        for file in SOURCES
        if NATIVE / folder not in file.parents
        for header in INCLUDE.findall(file.read_text())
        if re.match(headers, header)
    }


@pytest.mark.parametrize(
    ("folder", "headers"),
    [
        ("torch", r"(ATen|c10|torch|pybind11)/|Python\.h"),
        ("nccl", r"nccl\.h"),
    ],
)
def test_one_folder_alone_knows(folder: str, headers: str) -> None:
    assert included_outside(folder, headers) == set()
    assert included_outside("nowhere", headers)  # or the pattern would match nothing


def test_the_core_includes_itself_alone() -> None:
    """And headers of C and C++, which have no folder and no suffix."""
    core = [file for file in SOURCES if file.parent == NATIVE / "core"]
    headers = {header for file in core for header in INCLUDE.findall(file.read_text())}
    assert {"core/config.h", "cstdint"} <= headers
    assert all(re.match(r"core/|[a-z_]+$", header) for header in headers), headers


PACKAGE = ROOT / "hvd_gqsgd"
LAYERS = ["frontends", "auto engine", "exchanges", "codecs selections transports", "_native"]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imported(name: str) -> set[str]:
    """The package's modules that a module imports, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & MODULES.keys()
            found |= modules or {node.module}
    return found & MODULES.keys()


def test_no_import_goes_in_a_circle() -> None:
    """Leaving out the package itself, which loads its public names when they are first used."""
    graph = {name: imported(name) - {"hvd_gqsgd"} for name in MODULES if name != "hvd_gqsgd"}
    assert {*TopologicalSorter(graph).static_order()} == graph.keys()


def test_imports_go_down_the_layers() -> None:
    """From the front ends to the native part; codecs and transports do not know each other."""
    floor = {f"hvd_gqsgd.{folder}": i for i, row in enumerate(LAYERS) for folder in row.split()}
    seen = set()
    for name in MODULES:
        upper = ".".join(name.split(".")[:2])
        for lower in {".".join(other.split(".")[:2]) for other in imported(name)} & floor.keys():
            if upper in floor and upper != lower:
                assert floor[upper] < floor[lower], f"{name} imports {lower}"
                seen.add((upper, lower))
    assert len(seen) > len(LAYERS)


def test_no_file_is_long() -> None:
    """One idea a file: at most 400 lines of code."""
    folders = ("hvd_gqsgd", "native", "tests", "examples")
    files = {file for folder in folders for file in (ROOT / folder).rglob("*")}
    code = [file for file in files if file.suffix in (".py", ".h", ".cc", ".cu")]
    assert {PACKAGE / "options.py", NATIVE / "core" / "codes.h"} <= set(code)
    assert [str(file) for file in code if len(file.read_text().splitlines()) > 400] == []


def test_pre_commit_runs_what_lint_runs() -> None:
    """With the tools of the same environment, so that their versions are one."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = recipe[1].replace("$(PY)", ".venv/bin/python").replace("$(VENV)", ".venv")
    commands = re.sub(r" \$\(\w+\)", "", commands)  # files, which pre-commit names
    entries = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [line.strip("\t@") for line in commands.splitlines()] == entries


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_apply(mutant: Mutant) -> None:
    """``make mutate`` takes an hour: what it replaces must still be there, once."""
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
