"""The launcher of ranks: what it starts, with which environment, and that it ends all of it."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hvd_gqsgd.tools import launch
from hvd_gqsgd.tools.launch import (
    LAUNCHERS,
    LaunchError,
    capture_job,
    launch_command,
    launch_environment,
    run_ranks,
)

pytestmark = pytest.mark.launches

WORLD = "import os; print('rank of', os.environ.get('OMPI_COMM_WORLD_SIZE'))"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Writes a shell script as a program beside this Python; at first there are none at all."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))

    def write(name: str, script: str) -> Path:
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return file

    return write


def test_command_lines(programs: Callable[[str, str], Path]) -> None:
    with pytest.raises(LaunchError, match=r"mpirun was found neither in .* nor on the PATH"):
        launch_command("mpi", 2)
    with pytest.raises(ValueError, match="launcher must be one of mpi, gloo, got 'ssh'"):
        launch_command("ssh", 2)
    mpirun, horovodrun = (str(programs(name, "")) for name in LAUNCHERS.values())
    assert launch_command("mpi", 3) == [mpirun, "-n", "3"]
    assert launch_command("mpi", 2, bound=True) == [mpirun, "-n", "2", "--bind-to", "core"]
    assert launch_command("gloo", 2, bound=True) == [horovodrun, "--gloo", "-np", "2"]


def test_the_program_beside_python_goes_first(
    programs: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or else the one on the PATH; and jobs find the same ones by their names."""
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("PATH", str(other))
    beside = programs("mpirun", "")
    beside.rename(other / "mpirun")
    assert launch.find_program("mpirun") == str(other / "mpirun")
    programs("mpirun", "")
    assert launch.find_program("mpirun") == str(beside)
    assert launch_environment()["PATH"] == f"{tmp_path}:{other}"


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults give way to settings of the user's, and bound ranks neither yield nor outnumber."""
    for name in ("OMP_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.delenv(name, raising=False)
    assert launch_environment()["OMP_NUM_THREADS"] == "1"
    assert launch_environment()["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert "OMPI_MCA_mpi_yield_when_idle" not in launch_environment(bound=True)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch_environment()["OMP_NUM_THREADS"] == "3"
    for user, allowed in ((0, True), (1, False)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT", raising=False)
        assert ("OMPI_ALLOW_RUN_AS_ROOT" in launch_environment()) == allowed


def test_more_ranks_than_cores() -> None:
    """They run, where ranks with a core each would not."""
    ranks = len(os.sched_getaffinity(0)) + 1
    assert launch.fits(ranks - 1)
    assert not launch.fits(ranks)
    for bound in (False, True):
        job = [*launch_command("mpi", ranks, bound=bound), sys.executable, "-c", WORLD]
        status, output = capture_job(job, launch_environment(bound=bound), timeout=60)
        assert (status == 0) == (output.count(f"rank of {ranks}") == ranks) == (not bound), output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_is_ended_with_all_of_its_ranks(launcher: str) -> None:
    rank = "import os, time; print('rank', os.getpid(), 'runs', flush=True); time.sleep(100)"
    job = [*launch_command(launcher, 2), sys.executable, "-c", rank]
    with launch.running(job, launch_environment(), output=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = (re.search(rb"rank (\d+) runs", line) for line in process.stdout)
        started = (int(match[1]) for match in said if match)
        ranks = list(itertools.islice(started, 2))
        assert all(Path("/proc", str(rank)).exists() for rank in ranks)
    deadline = time.monotonic() + 10
    while any(Path("/proc", str(rank)).exists() for rank in ranks):
        assert time.monotonic() < deadline, "a rank outlives its job"
        time.sleep(0.1)
    assert len(ranks) == 2


def test_a_job_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    command = ["sh", "-c", "trap '' TERM; echo started; while true; do sleep 0.1; done"]
    status, output = capture_job(command, launch_environment(), timeout=0.5)
    assert (status, output) == (None, "started\n")


def test_a_rank_that_keeps_the_output_open_is_not_waited_for() -> None:
    began = time.monotonic()
    command = ["sh", "-c", "setsid sleep 20 & echo done"]
    assert capture_job(command, launch_environment(), timeout=10) == (0, "done\n")
    assert time.monotonic() - began < 10


def test_failures_of_run_ranks(programs: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Say whether the job failed or took too long; both streams go to the file."""
    programs("mpirun", 'shift 2; [ "$1" != --bind-to ] || shift 2; exec "$@"')
    log = tmp_path / "log"
    with log.open("wb") as output:
        run_ranks(["/bin/sh", "-c", "echo out; echo err >&2"], ranks=1, timeout=10, output=output)
        with pytest.raises(LaunchError, match="failed with exit status 3"):
            run_ranks(["/bin/sh", "-c", "exit 3"], ranks=1, timeout=10, output=output)
        with pytest.raises(LaunchError, match=r"did not end within 0\.2 s"):
            run_ranks(["/bin/sleep", "20"], ranks=1000, timeout=0.2, output=output)
    assert log.read_text() == "out\nerr\n"


def test_json_among_other_output() -> None:
    bar = '  0%|   | 0/1\r100%|##| 1/1\r      {"ms": {"a": 1}} \nwarning: {not JSON}\n'
    assert launch.printed_json('{"first": 1}\n' + bar) == {"ms": {"a": 1}}
    for none in ("", "nothing", "[1]", "{"):
        with pytest.raises(ValueError, match="no JSON object"):
            launch.printed_json(none)
