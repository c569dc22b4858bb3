"""Programs that ``hvd-gqsgd doctor`` runs: ``python -m hvd_gqsgd.tools.probes NAME``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hvd_gqsgd._native import loader

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PROBES", "RIGHT", "probe_horovod", "probe_mpi", "probe_mpi4py", "probe_torch"]

RIGHT = "hvd_gqsgd: the mean of {} ranks is right"
"""The output of each rank where its mean is right."""


def probe_mpi() -> None:
    """Starts MPI, and prints a JSON object.

    ``library`` and ``threads`` describe the MPI of mpi4py. ``error`` is the reason why the native
    part for MPI cannot be used, or null. Without mpi4py the object has only ``missing``.
    """
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        print(json.dumps({"missing": "mpi4py"}))
        return
    from mpi4py import MPI

    version = MPI.Get_library_version()
    threads = {
        MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized", MPI.THREAD_MULTIPLE: "multiple",
    }[MPI.Query_thread()]  # fmt: skip
    library = " ".join(re.split(r"[,\n\0]", version)[0].split())
    print(json.dumps({"library": library, "threads": threads, "error": _mpi_error(version)}))


def _mpi_error(version: str) -> str | None:
    error = loader.try_load("_C") or loader.try_load("_mpi")
    if error is not None:
        return error
    from hvd_gqsgd._native import mpi as native_mpi

    if not native_mpi.usable_with(version):
        return "built for another MPI than mpi4py"
    return None


def probe_horovod() -> None:
    """Compares means over Horovod with those of ``simulate``, as one of the ranks of a job."""
    import horovod.torch as hvd

    from hvd_gqsgd import GlobalQSGD

    hvd.init()
    _compare(
        hvd.rank(), hvd.size(),
        lambda x, exchange: hvd.allreduce(x, compression=GlobalQSGD(exchange=exchange)),
    )  # fmt: skip
    hvd.shutdown()


def probe_torch() -> None:
    """The same over a process group of PyTorch."""
    import torch.distributed as dist

    from hvd_gqsgd import allreduce

    dist.init_process_group("gloo")
    group = dist.group.WORLD
    _compare(
        dist.get_rank(), dist.get_world_size(),
        lambda x, exchange: allreduce(x, group, exchange=exchange),
    )  # fmt: skip
    dist.destroy_process_group()


def probe_mpi4py() -> None:
    """The same over mpi4py."""
    from mpi4py import MPI

    from hvd_gqsgd import allreduce

    comm = MPI.COMM_WORLD
    _compare(comm.rank, comm.size, lambda x, exchange: allreduce(x, comm, exchange=exchange))


def _compare(rank: int, size: int, mean_of: Callable[[Tensor, Any], Tensor]) -> None:
    import torch

    from hvd_gqsgd import simulate

    everyone = torch.randn(size, 10_000, generator=torch.Generator().manual_seed(0))
    exchanges: tuple[Any, ...] = ("allreduce", "two_phase")
    for exchange in exchanges:
        expected = simulate(everyone, exchange=exchange)
        if not torch.equal(mean_of(everyone[rank], exchange), expected):
            sys.exit(f"hvd_gqsgd: rank {rank} has a wrong mean by {exchange}")
    # In one write, so that ranks do not mix.
    print(f"{RIGHT.format(size)}\n", end="", flush=True)


PROBES = {
    "mpi": probe_mpi, "horovod": probe_horovod, "torch": probe_torch, "mpi4py": probe_mpi4py,
}  # fmt: skip

if __name__ == "__main__":
    PROBES[sys.argv[1]]()
