"""Starts ranks on this machine: finds the launcher, and ends what was started."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

__all__ = ["RunFailed", "ended", "launch_command", "launch_environment", "run_ranks"]


class RunFailed(Exception):
    """A run that ended with an error, or not in time."""


def launch_command(launcher: str, ranks: int) -> list[str]:
    """The command line to put before that of a rank."""
    if launcher == "gloo":
        return [find_program("horovodrun"), "--gloo", "-np", str(ranks)]
    return [find_program("mpirun"), "-n", str(ranks)]


def find_program(name: str) -> str:
    """The program beside this Python or on the PATH."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    if found is None:
        sys.exit(f"{name} was found neither in {beside} nor on the PATH")
    return found


def launch_environment(ranks: int) -> dict[str, str]:
    """The environment for a launcher."""
    env = dict(os.environ)
    # More ranks than cores, for Open MPI 5 and 4. Other MPIs allow it anyway.
    env.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    env.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
    if ranks > len(os.sched_getaffinity(0)):
        env.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # who waits takes no core from others
        env.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    if os.geteuid() == 0:  # as in a container, where Open MPI would refuse
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    if not sys.stderr.isatty():
        env.setdefault("TQDM_MININTERVAL", "5")  # a log needs no more
    return env


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the launcher, and with it its ranks, if it still runs when the block is left."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_ranks(
    command: Sequence[str],
    *,
    ranks: int,
    timeout: float,
    launcher: str = "mpi",
    output: IO[bytes] | None = None,
) -> None:
    """Runs a command on some ranks of this machine, to the end.

    Args:
        command: that of a rank, the same on all.
        timeout: in seconds.
        output: where what they print goes; None: to where this process's goes.

    Raises:
        RunFailed: it ended with an error, or did not end within ``timeout``.
    """
    process = subprocess.Popen(
        [*launch_command(launcher, ranks), *command],
        env=launch_environment(ranks),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )
    with ended(process):
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"the run did not end within {timeout:g} s") from None
    if status != 0:
        raise RunFailed(f"the run failed with exit status {status}")
