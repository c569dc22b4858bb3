"""The folders keep apart what they should: who may include what."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_apply(mutant: Mutant) -> None:
    """``make mutate`` takes an hour: what it replaces must still be there, once."""
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
