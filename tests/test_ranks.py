"""Runs the tests of ``ranks/`` on several real processes, over MPI and over Gloo."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from launch import HERE, LIMIT, gloo, mpirun, run

pytestmark = pytest.mark.launches

# Over Gloo an operation takes some ten times as long when there are more ranks than cores.
JOBS = [
    *((mpirun, n, "not few") for n in (1, 2)),
    (mpirun, 3, ""),
    *((mpirun, n, "core") for n in (4, 5, 7, 8)),
    (gloo, 2, ""),
    (gloo, 3, "core and not unanswered"),
]


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize(
    ("launcher", "ranks", "mark"), JOBS, ids=lambda value: getattr(value, "__name__", value)
)
def test_ranks(launcher, ranks, mark):
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-m", mark, str(HERE / "ranks")]
    result = run(launcher(ranks) + pytest_)
    print(result.stdout[-20000:])
    assert result.returncode == 0
    assert len(re.findall(r"\d+ passed", result.stdout)) == 1, "rank 0 alone reports"


@pytest.mark.parametrize("launcher", [mpirun, gloo])
def test_a_failing_rank_ends_the_job(launcher, tmp_path):
    """The harness itself: one rank fails, the others wait for it, and the job ends at once."""
    shutil.copy(HERE / "ranks" / "conftest.py", tmp_path)
    (tmp_path / "test_one_rank_fails.py").write_text(
        "import horovod.torch as hvd\n"
        "def test_one_rank_fails(rank):\n"
        "    assert rank != 1, 'on purpose'\n"
        "    hvd.barrier()\n"
    )
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = run(launcher(2) + pytest_, limit=120)
    assert result.returncode != 0
    assert "on purpose" in result.stdout
