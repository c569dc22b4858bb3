"""Runs a benchmark on several ranks: of this machine, or on emulated hosts with limited links."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

__all__ = ["INTERFACE", "add_arguments", "is_rank", "launch"]

HOSTS = Path(__file__).parents[1] / "bench" / "hosts.sh"

INTERFACE = "HVD_GQSGD_BENCH_INTERFACE"
"""Environment variable that tells a rank on an emulated host which network interface it has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says where to run."""
    where = parser.add_argument_group("where to run (unless started by mpirun or horovodrun)")
    where.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    where.add_argument(
        "--rate",
        help="limit of each host's link in both directions, such as 1gbit or 200mbit: makes a host "
        "of each rank, by network namespaces; needs root",
    )


def is_rank() -> bool:
    """Whether this process is one of a job."""
    return bool({"OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE"} & os.environ.keys())


def launch(
    module: str,
    arguments: Sequence[str],
    ranks: int,
    rate: str | None,
    output: IO[bytes] | None = None,
) -> int:
    """Runs ``python -m module`` on as many ranks; returns its exit status.

    Without root a rate is left out, and that is said. What it prints goes to ``output``.
    """
    if rate is not None and os.geteuid() != 0:
        print("hvd-gqsgd: --rate needs root: measuring on this machine's memory instead",
              file=sys.stderr)  # fmt: skip
        rate = None
    command = [sys.executable, "-m", module, *arguments]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    beside = str(Path(sys.executable).parent)
    env["PATH"] = f"{beside}:{env['PATH']}"
    if rate is None:
        cores = len(os.sched_getaffinity(0))
        crowded = ["--map-by", ":OVERSUBSCRIBE", "--mca", "mpi_yield_when_idle", "1"]
        place = ["--bind-to", "core"] if ranks <= cores else [*crowded, "--bind-to", "none"]
        mpirun = shutil.which("mpirun", path=env["PATH"])
        if mpirun is None:
            print("hvd-gqsgd: mpirun was not found", file=sys.stderr)
            return 1
        job = [mpirun, "-n", str(ranks), *place, *command]
        return subprocess.run(job, env=env, stdout=output).returncode
    env[INTERFACE] = "eth0"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the hosts go down too
    status = subprocess.run([HOSTS, "up", str(ranks), rate], env=env).returncode
    if status != 0:
        return status
    try:
        job = [str(HOSTS), "mpirun", "-x", INTERFACE, "-x", "OMP_NUM_THREADS", *command]
        return subprocess.run(job, env=env, stdout=output).returncode
    finally:
        subprocess.run([HOSTS, "down"], env=env)
