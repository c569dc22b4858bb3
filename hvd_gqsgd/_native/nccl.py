"""NCCL as a class of torch: in the library of the kernels for GPUs, where NCCL was found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd._native import ops

__all__ = ["built", "communicator", "unique_id"]


def built() -> bool:
    """Whether it was."""
    return "cuda" in ops.devices() and hasattr(torch.ops.hvd_gqsgd, "nccl_unique_id")


def unique_id() -> Tensor:
    """What one rank makes and all ranks of a new communicator need: 128 bytes, on the CPU."""
    made: Tensor = torch.ops.hvd_gqsgd.nccl_unique_id()
    return made


def communicator(unique_id: Tensor, rank: int, size: int, device: torch.device) -> Any:
    """A rank's end of a communicator of GPUs, on ``device``; waits until all ranks are here.

    ``max(tensor)`` and ``sum(tensor)`` of an int32 or int64 tensor, in place; ``all_to_all(from,
    to, splits, received)`` and ``all_gather(from, to, lengths)`` of flat tensors, with the elements
    to each rank and of each rank; and the whole exchange of a tensor, ``scale`` times the sum over
    the ranks to ``out``, which may be ``x``::

        allreduce(x, out, norms, squares, words, block_size, kind, bits, levels, seed, step,
                  tensor_id, correlated, scale)

    for codes that can be added, with memory for norms, for sums of squares (or None: then norms are
    largest magnitudes), and for words. All are enqueued on the current stream of the device. All
    ranks call them in one order.

    Raises:
        RuntimeError: with NCCL's own text; two ranks with one GPU, say.
    """
    return torch.classes.hvd_gqsgd.NcclCommunicator(unique_id, rank, size, device)
