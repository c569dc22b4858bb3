"""Launches ranks on this machine: over MPI with ``mpirun``, over Gloo with ``horovodrun``.

A job is a command line of a launcher, followed by that of a rank, and an environment::

    command = [*launch_command("mpi", ranks=2), sys.executable, "train.py"]
    status = run_job(command, launch_environment(), timeout=600)

Environment variables set the placement of ranks, as the options of ``mpirun`` differ between MPIs.
Without ``bound``, ranks may outnumber the cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = [
    "LAUNCHERS",
    "LaunchError",
    "capture_job",
    "find_program",
    "fits",
    "launch_command",
    "launch_environment",
    "printed_json",
    "run_job",
    "run_ranks",
    "running",
]

LAUNCHERS = {"mpi": "mpirun", "gloo": "horovodrun"}
"""The program that launches ranks, by backend."""

GRACE = 20.0
"""Seconds between SIGTERM, which launchers forward to their ranks, and SIGKILL."""

# Open MPI 5 and 4. Other MPIs ignore these, and allow more ranks than cores by default.
_UNBOUND = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # a rank that waits leaves its core to others
}


class LaunchError(Exception):
    """A job that could not be launched, that failed, or that did not end in time."""


def find_program(name: str) -> str:
    """The path of a program beside this Python, or else on the ``PATH``.

    Raises:
        LaunchError: the program is in neither place.
    """
    found = shutil.which(name, path=_search_path())
    if found is None:
        beside = Path(sys.executable).parent
        raise LaunchError(f"{name} was found neither in {beside} nor on the PATH: install it")
    return found


def fits(ranks: int) -> bool:
    """Whether each rank can have a core of its own."""
    return ranks <= len(os.sched_getaffinity(0))


def launch_command(launcher: str, ranks: int, *, bound: bool = False) -> list[str]:
    """The command line of a launcher, without the command of a rank, which follows.

    Args:
        launcher: "mpi" or "gloo".
        ranks: number of ranks, on this machine.
        bound: bind each rank to a core; over Gloo ranks are never bound.

    Raises:
        LaunchError: the launcher is not installed.
        ValueError: unknown launcher.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {launcher!r}")
    program = find_program(LAUNCHERS[launcher])
    if launcher == "gloo":
        return [program, "--gloo", "-np", str(ranks)]
    return [program, "-n", str(ranks), *(["--bind-to", "core"] if bound else [])]


def launch_environment(*, bound: bool = False) -> dict[str, str]:
    """This process's environment, with defaults for a launcher and its ranks.

    Args:
        bound: as for ``launch_command``; otherwise ranks may outnumber the cores.
    """
    env = dict(os.environ, PATH=_search_path())  # for scripts that call launchers by name
    defaults = {"OMP_NUM_THREADS": "1"} | ({} if bound else _UNBOUND)
    if not sys.stderr.isatty():
        defaults["TQDM_MININTERVAL"] = "5"  # often enough for a log
    if os.geteuid() == 0:  # as in a container, where Open MPI refuses to run otherwise
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return defaults | env


@contextlib.contextmanager
def running(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    output: int | IO[bytes] | None = None,
    cwd: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a job, and terminates all of its processes at the end of the block.

    Args:
        command: of the launcher and of a rank.
        env: as ``launch_environment`` returns it.
        output: a file, or ``subprocess.PIPE``, for stdout and stderr; None: those of this process.
        cwd: working directory; None: that of this process.
    """
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output,
        stderr=None if output is None else subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            _end(process)


def run_job(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    timeout: float | None = None,
    output: IO[bytes] | None = None,
    cwd: Path | None = None,
) -> int | None:
    """Runs a job to its end.

    Args:
        timeout: seconds; None: no limit.

    Other arguments are those of ``running``.

    Returns:
        The exit status of the launcher; None if it did not end in time and was terminated.
    """
    with running(command, env, output=output, cwd=cwd) as process:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None


def capture_job(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    timeout: float | None = None,
    cwd: Path | None = None,
) -> tuple[int | None, str]:
    """``run_job``, which also returns the output of all ranks, stderr included."""
    # A file and not a pipe: a rank that outlives its launcher would keep a pipe open.
    with tempfile.TemporaryFile() as output:
        status = run_job(command, env, timeout=timeout, output=output, cwd=cwd)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def run_ranks(
    command: Sequence[str],
    *,
    ranks: int,
    timeout: float,
    launcher: str = "mpi",
    output: IO[bytes] | None = None,
) -> None:
    """Runs a command on several ranks of this machine to its end, each bound to a core if they fit.

    Args:
        command: of a rank, the same on all.
        ranks: number of ranks.
        timeout: in seconds.
        launcher: "mpi" or "gloo".
        output: a file for stdout and stderr; None: those of this process.

    Raises:
        LaunchError: the launcher is not installed, the job failed, or it did not end in time.
    """
    bound = fits(ranks)
    job = [*launch_command(launcher, ranks, bound=bound), *command]
    status = run_job(job, launch_environment(bound=bound), timeout=timeout, output=output)
    if status is None:
        raise LaunchError(f"the run did not end within {timeout:g} s")
    if status != 0:
        raise LaunchError(f"the run failed with exit status {status}")


def printed_json(output: str) -> dict[str, Any]:
    """The last JSON object in the output of a job; other output may surround it.

    Raises:
        ValueError: the output has no JSON object.
    """
    for line in reversed(output.splitlines()):
        start = line.find("{")
        with contextlib.suppress(ValueError):
            found, _ = json.JSONDecoder().raw_decode(line, max(start, 0))
            if isinstance(found, dict):
                return found
    raise ValueError(f"there is no JSON object in the output: {output[-500:]!r}")


def _search_path() -> str:
    beside = str(Path(sys.executable).parent)
    return os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
