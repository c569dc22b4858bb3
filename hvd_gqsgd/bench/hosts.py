"""Launches a benchmark on the ranks of this machine, or on emulated hosts with limited links."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from hvd_gqsgd.tools.launch import (
    LaunchError,
    fits,
    launch_command,
    launch_environment,
    run_job,
)

__all__ = [
    "HOSTS",
    "INTERFACE",
    "add_arguments",
    "emulated_hosts",
    "is_rank",
    "launch",
    "relaunch",
]

HOSTS = Path(__file__).with_name("hosts.sh")
"""The script that emulates hosts."""

INTERFACE = "HVD_GQSGD_BENCH_INTERFACE"
"""Environment variable with the network interface of an emulated host, for its rank."""


SLOTS = "HVD_GQSGD_SLOTS"
"""Environment variable with the number of ranks on each emulated host."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--ranks``, ``--rate`` and ``--hosts``."""
    group = parser.add_argument_group("ranks (unless started by mpirun or horovodrun)")
    group.add_argument("--ranks", type=_ranks, default=2, help="(default: %(default)s)")
    group.add_argument(
        "--rate",
        help="limit of each host's link in both directions, such as 1gbit or 200mbit; emulates "
        "hosts by network namespaces, and needs root",
    )
    group.add_argument(
        "--hosts", type=_ranks, metavar="N",
        help="number of hosts, for --rate; divides --ranks (default: one rank per host)",
    )  # fmt: skip


def _ranks(text: str) -> int:
    """The value of ``--ranks`` or ``--hosts``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def is_rank() -> bool:
    """Whether this process is a rank of a job."""
    return bool({"OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE"} & os.environ.keys())


def launch(
    module: str,
    arguments: Sequence[str],
    ranks: int,
    rate: str | None,
    output: IO[bytes] | None = None,
    hosts: int | None = None,
) -> int:
    """Runs ``python -m module`` on several ranks, to the end.

    Args:
        module: with a command line that takes ``arguments``.
        arguments: the same on all ranks.
        ranks: number of ranks.
        rate: limit of the links between emulated hosts; None: ranks of this machine. Without
            root the ranks run on this machine too, with a warning.
        output: a file for stdout and stderr; None: those of this process.
        hosts: number of emulated hosts; None: one per rank.

    Returns:
        The exit status; 1, with a message on stderr, if there is no launcher, or if the ranks
        cannot be spread evenly.
    """
    if hosts is not None and (rate is None or ranks % hosts):
        print(f"hvd-gqsgd: --hosts needs --rate, and a number that divides --ranks, got {ranks} "
              f"ranks on {hosts} hosts and --rate {rate}", file=sys.stderr)  # fmt: skip
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends ranks and hosts too
    if rate is not None and os.geteuid() != 0:
        print("hvd-gqsgd: --rate needs root: measuring over shared memory instead",
              file=sys.stderr)  # fmt: skip
        rate = None
    command = [sys.executable, "-m", module, *arguments]
    bound = fits(ranks)
    try:
        if rate is not None:
            with emulated_hosts(hosts or ranks, rate, ranks) as run:
                return _status(run(command, output=output))
        job = [*launch_command("mpi", ranks, bound=bound), *command]
    except LaunchError as error:
        print(f"hvd-gqsgd: {error}", file=sys.stderr)
        return 1
    return _status(run_job(job, launch_environment(bound=bound), output=output))


def relaunch(module: str, arguments: Sequence[str], options: argparse.Namespace) -> int:
    """Runs the command on the ranks that the options of ``add_arguments`` give, by ``launch``."""
    return launch(module, arguments, options.ranks, options.rate, hosts=options.hosts)


@contextlib.contextmanager
def emulated_hosts(
    hosts: int, rate: str, ranks: int, launcher: str = "mpi"
) -> Iterator[Callable[..., int | None]]:
    """Emulates hosts while a block runs; needs root.

    Args:
        hosts: number of hosts.
        rate: limit of their links, as of ``hosts.sh``.
        ranks: number of ranks, which ``hosts`` divides.
        launcher: "mpi" or "gloo".

    Returns:
        A function that runs the command of a rank on all ranks to the end. It takes the command and
        the keywords ``timeout`` and ``output`` of ``run_job``, and has its result.

    Raises:
        LaunchError: the hosts could not be made.
    """
    env = launch_environment() | {INTERFACE: "eth0", SLOTS: str(ranks // hosts)}
    up = subprocess.run(
        [HOSTS, "up", str(hosts), rate], env=env, check=False, stderr=subprocess.PIPE, text=True
    )
    if up.returncode != 0:
        raise LaunchError(f"no hosts could be emulated: {up.stderr.strip()}")
    job = [str(HOSTS), "gloo"]
    if launcher == "mpi":
        passed = [n for n in ("HOROVOD_HIERARCHICAL_ALLREDUCE",) if n in env]
        exports = [f for name in (INTERFACE, "OMP_NUM_THREADS", *passed) for f in ("-x", name)]
        job = [str(HOSTS), "mpirun", *exports]
    try:
        yield lambda command, **given: run_job([*job, *command], env, **given)
    finally:
        subprocess.run([HOSTS, "down"], env=env, check=False)


def _status(status: int | None) -> int:
    assert status is not None, "without a time limit a job ends by itself"
    return status
