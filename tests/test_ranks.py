"""Runs the tests of ``ranks/`` on several real processes, over MPI and over Gloo."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from launch import HERE, LIMIT, gloo, mpirun, run

pytestmark = pytest.mark.launches

RANKS = HERE / "ranks"
TESTS = sorted(RANKS.glob("test_*.py"))
# Larger worlds take long to start: they do not even import what has no test for them.
CORE = [path for path in TESTS if "@pytest.mark.core" in path.read_text()]
# FSDP takes seconds to import, and is for MPI alone here: with 8 ranks.
BUT_FSDP = [path for path in CORE if not path.name.startswith("test_fsdp")]
# Bits, bytes and process sets, which follow from the number of ranks. Without an optimizer, whose
# first step imports Dynamo, which takes seconds on each rank.
ARITHMETIC = [RANKS / f"test_{name}.py" for name in ("allreduce", "collective", "operators")]
ARITHMETIC += ["-k", "not training"]
# Two nodes of two ranks, where the default goes by node.
NODES = ["--ranks-per-node", "2"]
NODES += [
    RANKS / f"test_{name}.py"
    for name in ("allreduce", "collective", "ddp", "disagreement", "join", "lifecycle", "optimizer")
]

# Over Gloo an operation takes some ten times as long when there are more ranks than cores.
BRIEFLY = ["-k", "not test_operators and not uneven"]
JOBS = [
    *((mpirun, n, "not few", TESTS) for n in (1, 2)),
    (mpirun, 3, "", TESTS),
    *((mpirun, n, "core", ARITHMETIC) for n in (4, 5, 7)),
    (mpirun, 4, "not flat", NODES),
    (mpirun, 8, "core", CORE),
    (gloo, 2, "", TESTS),
    (gloo, 3, "core and not unanswered", [*BUT_FSDP, *BRIEFLY]),
]


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize(
    ("launcher", "ranks", "mark", "tests"),
    [pytest.param(*job, id=f"{job[0].__name__}-{job[1]}-{job[2]}") for job in JOBS],
)
def test_ranks(launcher, ranks, mark, tests):
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-m", mark, *map(str, tests)]
    result = run(launcher(ranks) + pytest_)
    print(result.stdout[-20000:])
    assert result.returncode == 0
    assert len(re.findall(r"\d+ passed", result.stdout)) == 1, "rank 0 alone reports"


@pytest.mark.parametrize("launcher", [mpirun, gloo])
def test_a_failing_rank_ends_the_job(launcher, tmp_path):
    """The harness itself: one rank fails, the others wait for it, and the job ends at once."""
    shutil.copy(RANKS / "conftest.py", tmp_path)
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
