"""Calls that mypy, which ``make check`` runs on this file, must accept, and some that it must not.

Nothing runs this. An error that mypy does not find is one too: an ignored one that is not there.
"""

from __future__ import annotations

import horovod.torch as hvd
import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from hvd_gqsgd import BlockBits, DynamicBits, GlobalQSGD, allreduce, simulate
from hvd_gqsgd.frontends.ddp import DDPState, GQSGDState, ddp_hook
from hvd_gqsgd.option_types import OptionKeywords

X = torch.ones(3)


def accepted(model: torch.nn.parallel.DistributedDataParallel) -> None:
    """With the types of the results."""
    GlobalQSGD()
    GlobalQSGD(4, seed=7, block_size=None)
    GlobalQSGD(bits=DynamicBits(5.0), named_parameters=model.named_parameters())
    GlobalQSGD(BlockBits(4, power=1))
    mean: Tensor = simulate(X.view(1, 3), step=3, dither="exponential")
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = simulate(np.ones((2, 3)), bits=4)
    mean = allreduce(X, None, "sum", out=mean, norm="l2")
    array = allreduce(array, MPI.COMM_WORLD, MPI.SUM, exchange="two_phase", step=1)
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        allreduce(X, dist.group.WORLD, op)
    allreduce(X, op=hvd.Average)
    options: OptionKeywords = {"bits": 4, "correlated": False}
    model.register_comm_hook(DDPState(None, **options), ddp_hook)
    model.register_comm_hook(GQSGDState(min_numel=0), ddp_hook)
    model.register_comm_hook(GlobalQSGD(bits=8).ddp_state(), ddp_hook)
    sharded: torch.nn.Module = GlobalQSGD(bits=8).fsdp(model.module)
    GlobalQSGD.fsdp(sharded, replicate_group=dist.group.WORLD)
    GlobalQSGD().fsdp(sharded, weight_bits=8, weight_exceptions=("*embed*",))
    mean = simulate(X.view(1, 3), exchange="one_phase")


def refused() -> None:
    """A value that is none, a name that is none, and a type that is another."""
    GlobalQSGD(dither="foo")  # type: ignore[arg-type]
    GlobalQSGD(bit=4)  # type: ignore[call-arg]
    GlobalQSGD("8")  # type: ignore[arg-type]
    simulate(X, exchange="ring")  # type: ignore[call-overload]
    simulate(X, bit=4)  # type: ignore[call-overload]
    allreduce(X, None, "max")  # type: ignore[arg-type]
    allreduce(X, norm="l1")  # type: ignore[arg-type]
    DDPState(bits="8")  # type: ignore[arg-type]
    OptionKeywords(seed=0.5)  # type: ignore[typeddict-item]
