"""Starts jobs of several ranks, over MPI and over Gloo, and ends them when they take too long."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT = 900  # seconds for one run; each test in it has a limit of its own


def mpirun(ranks: int) -> list[str]:
    """Command line that starts ranks, more than cores if need be, over MPI."""
    return [_program("mpirun"), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", f"{ranks}"]


def gloo(ranks: int) -> list[str]:
    """The same over Gloo."""
    return [_program("horovodrun"), "--gloo", "-np", f"{ranks}"]


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is neither beside {sys.executable} nor on the PATH")
    return found


def environment() -> dict[str, str]:
    """One thread a rank, polite waiting, and what Open MPI wants to hear of root."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    env["OMPI_MCA_mpi_yield_when_idle"] = "1"  # there are more ranks than cores
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


def run(command: list[str], limit: int = LIMIT) -> subprocess.CompletedProcess[str]:
    """Runs a job, and ends all of it when it takes longer than ``limit`` seconds."""
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 15)  # the launcher passes it on to all ranks
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"{' '.join(command)} took more than {limit} s:\n{output[-20000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")
