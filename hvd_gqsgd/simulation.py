"""All ranks of an exchange in one process, to study its error for any world size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from hvd_gqsgd.checks import check_int
from hvd_gqsgd.codecs import check_compressible, check_unmasked
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.options import FrontEnd, OptionKeywords
from hvd_gqsgd.transports.simulated import SimulatedWorld

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["simulate"]

FRONT_END = FrontEnd("simulate()", own=("step",), exchanges=("one_phase",))


@overload
def simulate(gradients: Tensor, *, step: int = 0, **options: Unpack[OptionKeywords]) -> Tensor: ...
@overload
def simulate(
    gradients: np.ndarray[Any, Any], *, step: int = 0, **options: Unpack[OptionKeywords]
) -> np.ndarray[Any, Any]: ...
@FRONT_END.documented
def simulate(
    gradients: Tensor | np.ndarray[Any, Any], *, step: int = 0, **options: Unpack[OptionKeywords]
) -> Tensor | np.ndarray[Any, Any]:
    """Returns the mean that ranks would decode, if each had one row of ``gradients``.

    All ranks run in this process. They use the pipeline and the codec of the real exchange, so the
    result has the same bits: those that Horovod ranks get for the first unnamed tensor of step
    ``step``. With ``exchange="one_phase"`` it is that of the shards of all ranks, one behind the
    other, as they are under FSDP.

    Args:
        gradients: a tensor or an array of shape (world size, elements); float16, bfloat16, float32
            or float64.
        step: the number of the step, from 0 on. The dither depends on it.
        options: see :class:`hvd_gqsgd.options.Options`. Those of a training can be passed as they
            are: ``min_numel`` and ``bucket_mb`` are checked, and do not change the mean of a
            tensor.

    Returns:
        The decoded mean, of shape (elements,) and the dtype of ``gradients``. It is a NumPy array
        if ``gradients`` is one.

    Raises:
        TypeError: ``gradients`` or an option has the wrong type, or an option is unknown.
        NotImplementedError: ``gradients`` is on a device for which there are no kernels.
        ValueError: ``gradients`` has the wrong shape, an option or ``step`` is out of range, or the
            lanes are too narrow for the world size.

    Example::

        >>> rows = torch.randn(8, 100_000)
        >>> error = simulate(rows, bits=4) - rows.mean(0)
    """
    if isinstance(gradients, np.ndarray):
        check_unmasked("gradients", gradients)
        return simulate(torch.from_numpy(np.array(gradients)), step=step, **options).numpy()
    if not isinstance(gradients, Tensor):
        raise TypeError(f"gradients must be a tensor or a NumPy array, got {type(gradients)}")
    check_compressible("gradients", gradients)
    if gradients.dim() != 2 or gradients.shape[0] < 1:
        raise ValueError(
            f"gradients must be of shape (ranks, elements), got {tuple(gradients.shape)}"
        )
    check_int("step", step, 0, 2**31 - 2)  # it travels in 32 bits, and so does the next one

    resolved = FRONT_END.options(options)
    world = SimulatedWorld(len(gradients))
    ranks = [
        Pipeline(resolved, world.transport(rank), steps=Steps(resolved.bits, step))
        for rank in range(world.size)
    ]
    rows, numel = gradients.detach().contiguous(), gradients.shape[1]
    outs: list[Tensor | None] = [None] * world.size
    sharded = resolved.exchange == "one_phase"
    if sharded:
        rows = torch.nn.functional.pad(rows, (0, -numel % world.size))
        mean = rows.new_empty(rows.shape[1])
        outs = list(mean.view(world.size, rows.shape[1] // world.size))
    each = zip(ranks, rows, outs, strict=True)
    tickets = [rank.submit(row, out=out) for rank, row, out in each]
    for rank in ranks:
        rank.flush()
    arrived = [False]
    while not all(arrived):  # poll() raises what went wrong
        arrived = [
            rank.poll(ticket) is not None for rank, ticket in zip(ranks, tickets, strict=True)
        ]
    owners = zip(ranks, tickets, strict=True) if sharded else [(ranks[0], tickets[0])]
    results = [rank.decode(ticket, 1 / world.size) for rank, ticket in owners]
    return mean[:numel] if sharded else results[0]
