"""The Python blocks of the README and the pages run, on 2 ranks, with the output that they show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from doc_code import FILES, README, ROOT, Block, blocks
from launch import mpirun, run

pytestmark = pytest.mark.launches

if not README.is_file():
    pytest.skip("images have no README", allow_module_level=True)

BLOCKS = [block for file in FILES for block in blocks(file)]


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """The output of each block, by its name."""
    job = run([*mpirun(2), sys.executable, str(ROOT / "tests" / "doc_code.py")], limit=120)
    assert job.returncode == 0, job.stdout[-5000:]
    (line,) = [line for line in job.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_blocks_run(block: Block, outputs: dict[str, str]) -> None:
    if block.reason:
        assert block.name not in outputs
    else:
        assert outputs[block.name] == block.output or not block.output


def test_all_blocks_are_found() -> None:
    """Those that nothing runs too, and the outputs of the README."""
    fences = sum(file.read_text().count("```python") for file in FILES)
    assert len(BLOCKS) == fences > 15
    assert all(block.output for block in BLOCKS if block.file == README)


def test_comments_leave_blocks_out(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("<!-- not run: slow -->\n```python\n1\n```\n\n```python\n2\n```\n\n    3\n")
    found = [(block.code, block.reason, block.output, block.line) for block in blocks(file)]
    assert found == [("1\n", "slow", "", 2), ("2\n", "", "3\n", 6)]
