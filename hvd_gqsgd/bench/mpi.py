"""Times the allreduce over MPI against MPI_Allreduce of float32, on the ranks of a job:

    mpirun -n 2 --bind-to core python -m hvd_gqsgd.bench.mpi [--json]

Each call is timed from a barrier to the end of the slowest rank. The calls run in turn, so that a
disturbance of some seconds affects all of them. ``ratio`` is the median time over that of
``MPI_Allreduce`` from one buffer to another. ``ratio_in_place`` is the median time with the result
in the memory of the input, over that of ``MPI_Allreduce`` with ``MPI_IN_PLACE``.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from hvd_gqsgd import allreduce
from hvd_gqsgd._native import mpi as native_mpi

__all__ = ["main", "measure"]

OPERATORS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8, "exchange": "allreduce"},
    "4 bits, two phases": {"bits": 4, "exchange": "two_phase"},
    "8 bits, two phases": {"bits": 8, "exchange": "two_phase"},
    "exponential, two phases": {"dither": "exponential"},
    "exponential, MPI operator": {"dither": "exponential", "exchange": "reduce_scatter"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures on all ranks, and prints on rank 0."""
    parser = argparse.ArgumentParser(
        prog="mpirun -n 2 --bind-to core python -m hvd_gqsgd.bench.mpi",
        description="Times the allreduce over MPI against MPI_Allreduce of float32.",
    )
    parser.add_argument(
        "--megabytes", type=float, default=16, help="of float32 (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument(
        "--chunk", type=int, default=native_mpi.CHUNK, help="elements in one message"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if not options.megabytes > 0 or options.repeats < 1:
        parser.error(
            "--megabytes must be above 0, and --repeats at least 1, got "
            f"{options.megabytes:g} and {options.repeats}"
        )
    native_mpi.CHUNK = options.chunk
    result = measure(round(options.megabytes * 2**20 / 4), options.repeats)
    if MPI.COMM_WORLD.rank:
        return
    if options.json:
        print(json.dumps(result))
        return
    library = "native" if result["native"] else "mpi4py alone"
    print(f"{result['numel']:,} float32 on {result['ranks']} ranks, {library}; {result['mpi']}")
    print(f"{'':34}{'ms':>10}{'ratio':>8}{'in place: ms':>16}{'ratio':>8}")
    for name, row in result["rows"].items():
        print(
            f"{name:34}{row['ms']:10.2f}{row['ratio']:8.2f}"
            f"{row['ms_in_place']:16.2f}{row['ratio_in_place']:8.2f}"
        )


def measure(numel: int, repeats: int) -> dict[str, Any]:
    """Times all operators; a collective call.

    Returns:
        The MPI and all settings, and in ``rows`` for each operator ``ms``, ``ratio``,
        ``ms_in_place`` and ``ratio_in_place``. The same on all ranks.
    """
    world = MPI.COMM_WORLD
    x = torch.randn(numel, generator=torch.Generator().manual_seed(world.rank))
    out, scratch = torch.zeros_like(x), x.clone()
    plain = "MPI_Allreduce of float32"
    calls: dict[tuple[str, bool], Callable[[], object]] = {
        (plain, False): lambda: world.Allreduce(x.numpy(), out.numpy(), MPI.SUM),
        (plain, True): lambda: world.Allreduce(MPI.IN_PLACE, scratch.numpy(), MPI.SUM),
    }
    for name, options in OPERATORS.items():
        ours = functools.partial(allreduce, comm=world, step=0, **options)
        calls[name, False] = functools.partial(ours, x, out=out)
        calls[name, True] = functools.partial(ours, scratch, out=scratch)

    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in calls}
    for repeat in range(-2, repeats):  # the first rounds fill caches and are not counted
        for key, call in calls.items():
            if key[1]:
                scratch.copy_(x)  # sums in place would soon be infinite
            world.Barrier()
            start = time.perf_counter()
            call()
            elapsed = np.array(time.perf_counter() - start)
            world.Allreduce(MPI.IN_PLACE, elapsed, MPI.MAX)
            if repeat >= 0:
                seconds[key].append(float(elapsed))
    ms = {key: 1e3 * statistics.median(values) for key, values in seconds.items()}
    return {
        "numel": numel,
        "ranks": world.size,
        "repeats": repeats,
        "mpi": MPI.Get_library_version().split(",")[0].strip("\0\n "),
        "native": native_mpi.usable_with(MPI.Get_library_version()),
        "rows": {
            name: {
                "ms": ms[name, False],
                "ratio": ms[name, False] / ms[plain, False],
                "ms_in_place": ms[name, True],
                "ratio_in_place": ms[name, True] / ms[plain, True],
            }
            for name in (plain, *OPERATORS)
        },
    }


if __name__ == "__main__":
    main()
