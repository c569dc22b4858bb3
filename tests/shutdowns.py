"""Shuts Horovod down on rank 1 while rank 0 starts operations, again and again.

``test_faults.py`` starts this on two ranks. Rank 0 gets Horovod's error, or its results: an
uncompressed exchange needs nothing more of rank 1.
"""

from __future__ import annotations

import time
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from mpi4py import MPI

from hvd_gqsgd import GlobalQSGD

TIMES = 60
TENSORS = 40
OPTIONS: list[dict[str, Any]] = [{}, {}, {"exchange": "two_phase"}, {"bits": "auto"}]


def exchange(number: int) -> None:
    """Exchanges tensors; rank 1 starts them and returns."""
    tensors = [torch.ones(128, 128) for _ in range(TENSORS)]
    # Names that no other time has: an operation that Horovod takes while it shuts down stays in its
    # queue.
    names = [f"{number}.{place}" for place in range(TENSORS)]
    compressor = GlobalQSGD(
        bucket_mb=0.01,
        **OPTIONS[number % len(OPTIONS)],
        named_parameters=[(n, torch.nn.Parameter(t)) for n, t in zip(names, tensors, strict=True)],
    )
    sent = []
    for name, tensor in zip(names, tensors, strict=True):
        compressed, ctx = compressor.compress(tensor)
        sent.append((hvd.allreduce_async_(compressed, name=name), ctx))
    if hvd.rank() == 1:
        time.sleep(1e-3 * (number % 5))
        return
    for handle, ctx in sent:
        compressor.decompress(hvd.synchronize(handle), ctx)


def main() -> None:
    told = 0
    for number in range(TIMES):
        hvd.init()
        try:
            exchange(number)
        except HorovodInternalError:
            told += 1
        hvd.shutdown()
        MPI.COMM_WORLD.Barrier()
    print(f"rank {MPI.COMM_WORLD.rank} was told {told} times", flush=True)


if __name__ == "__main__":
    main()
