"""Ranks that run out of data and leave by ``hvd.join()``.

All operations have names: Horovod names the others by counting, and ranks have counted differently
once one of them had more batches than another. In the tests that end after the first rank has left,
that is the last one: of 7 ranks over MPI, Horovod 0.28.1 crashes in any allreduce if rank 0 is the
only one that has.
"""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, backward, bound, gradients, mlp

from hvd_gqsgd import AgreementError, GlobalQSGD
from hvd_gqsgd.codecs.linear import levels_for


@pytest.mark.core
def test_join_with_uneven_batches(rank, size, several):
    """Average divides by all ranks, as Horovod's does, though some have left."""
    compressor = GlobalQSGD(min_numel=0)
    for step in range(rank + 1):  # rank r has r + 1 batches
        everyone = gradients(size, 5000, seed=step)
        present = everyone[step:]  # the ranks that still have a batch
        mean = hvd.allreduce(everyone[rank], name="x", compression=compressor)
        total = hvd.allreduce(everyone[rank], name="y", op=hvd.Sum, compression=compressor)
        limit = bound(present, levels_for(8, size)) * len(present)
        assert ((mean - present.sum(0) / size).abs() <= limit / size).all()
        assert ((total - present.sum(0)).abs() <= limit).all()
    hvd.join()


@pytest.mark.core
def test_join_with_an_optimizer(rank, size, several):
    model = mlp()
    compressor = GlobalQSGD(min_numel=64, bucket_mb=0.02)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        named_parameters=model.named_parameters(),
        compression=compressor,
    )
    for step in range(2 + rank % 2):
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
    hvd.join()
    hvd.broadcast_parameters(model.state_dict(), root_rank=1)
    optimizer.zero_grad()
    backward(model, rank)
    optimizer.step()
    for parameter in model.parameters():
        assert_same_on_all_ranks(parameter)


@pytest.mark.core
@pytest.mark.parametrize("steps", [0, 5])  # Horovod remembers what it has seen before
def test_two_phases_need_all_ranks(rank, size, several, steps):
    """A rank that has left owns a part of the bucket: an error on all others, and no hang."""
    compressor = GlobalQSGD(exchange="two_phase")
    for _ in range(steps):
        hvd.allreduce(torch.ones(9000), name="x", compression=compressor)
    if rank < size - 1:
        with pytest.raises(AgreementError, match=r"left by hvd.join.*exchange='allreduce'"):
            hvd.allreduce(torch.ones(9000), name="x", compression=compressor)
    hvd.join()
    everyone = gradients(size, 9000)
    mean = hvd.allreduce(everyone[rank], name="all are back", compression=GlobalQSGD(bits=4))
    assert_same_on_all_ranks(mean)


@pytest.mark.core
def test_two_phases_need_all_ranks_of_an_optimizer(rank, size, several):
    model = mlp()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        named_parameters=model.named_parameters(),
        compression=GlobalQSGD(bits=4, min_numel=64, bucket_mb=0.02),
    )
    for step in range(4):
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
    if rank < size - 1:
        optimizer.zero_grad()
        backward(model, rank)
        with pytest.raises(AgreementError, match=r"left by hvd.join"):
            optimizer.step()
    hvd.join()
