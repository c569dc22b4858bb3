"""Many ranks in one process, for studies of the error at any number of ranks."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.options import Options
from hvd_gqsgd.transports.simulated import SimulatedWorld

__all__ = ["simulate"]


@overload
def simulate(gradients: Tensor, *, step: int = 0, **options: Any) -> Tensor: ...
@overload
def simulate(
    gradients: np.ndarray[Any, Any], *, step: int = 0, **options: Any
) -> np.ndarray[Any, Any]: ...
def simulate(
    gradients: Tensor | np.ndarray[Any, Any], *, step: int = 0, **options: Any
) -> Tensor | np.ndarray[Any, Any]:
    """The mean that ``n`` ranks would get, each with one row of ``gradients``.

    The rows go through the pipeline and the codec of the real exchange, with the summing alone done
    in this process: the result has the bits that Horovod ranks get for their first unnamed tensor
    of step ``step``.

    Args:
        gradients: of shape (n, d); float16, bfloat16, float32 or float64.
        step: number of the step, which the dither depends on.
        options: as for ``GlobalQSGD``: bits, dither, exchange, norm, block_size, correlated, seed.

    Returns:
        The decoded mean, of shape (d,) and the dtype of ``gradients``; a NumPy array for one.

    Raises:
        ValueError: wrong shape, an option out of range, or lanes too narrow for n ranks.
        TypeError: not a floating-point type, or an option of the wrong type.
    """
    if isinstance(gradients, np.ndarray):
        return simulate(torch.from_numpy(np.array(gradients)), step=step, **options).numpy()
    if gradients.dim() != 2 or gradients.shape[0] < 1:
        raise ValueError(
            f"gradients must be of shape (ranks, elements), got {tuple(gradients.shape)}"
        )
    if not gradients.dtype.is_floating_point:
        raise TypeError(f"gradients must be floating-point, got {gradients.dtype}")

    resolved = Options(**options)
    world = SimulatedWorld(len(gradients))
    ranks = [Pipeline(resolved, world.transport(r), step=step) for r in range(world.size)]
    rows = gradients.detach().contiguous()
    tickets = [rank.submit(row) for rank, row in zip(ranks, rows, strict=True)]
    for rank in ranks:
        rank.flush()
    arrived = [False]
    while not all(arrived):  # poll() raises what went wrong
        arrived = [
            rank.poll(ticket) is not None for rank, ticket in zip(ranks, tickets, strict=True)
        ]
    return ranks[0].decode(tickets[0], 1 / world.size)
