"""Programs that ``hvd-gqsgd doctor`` runs: ``python -m hvd_gqsgd.tools.probes mpi|rank``."""

from __future__ import annotations

import json
import re
import sys

from hvd_gqsgd._native import loader

__all__ = ["RIGHT", "probe_exchange", "probe_mpi"]

RIGHT = "hvd_gqsgd: the mean of {} ranks is right"
"""The output of ``probe_exchange``."""


def probe_mpi() -> None:
    """Starts MPI, and prints a JSON object.

    ``library`` and ``threads`` are those of mpi4py's MPI, and ``error`` is the reason if the native
    part for MPI cannot be used, or else null. Without mpi4py there is but ``missing``.
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
        return "built for another MPI than that of mpi4py"
    return None


def probe_exchange() -> None:
    """Compares means over Horovod with those of ``simulate``, as one of the ranks of a job."""
    import horovod.torch as hvd
    import torch

    from hvd_gqsgd import GlobalQSGD, simulate

    hvd.init()
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(hvd.size(), 10_000, generator=generator)
    for exchange in ("allreduce", "two_phase"):
        compressor = GlobalQSGD(exchange=exchange)
        mean = hvd.allreduce(everyone[hvd.rank()], name="doctor", compression=compressor)
        if not torch.equal(mean, simulate(everyone, exchange=exchange)):
            sys.exit(f"hvd_gqsgd: rank {hvd.rank()} has a wrong mean by {exchange}")
    print(f"{RIGHT.format(hvd.size())}\n", end="", flush=True)  # in one piece
    hvd.shutdown()


if __name__ == "__main__":
    {"mpi": probe_mpi, "rank": probe_exchange}[sys.argv[1]]()
