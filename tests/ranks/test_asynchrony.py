"""``compress`` does not wait, and does not get in the way of the user's own operations."""

from __future__ import annotations

import time

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, backward, gradients, mlp

from hvd_gqsgd import GlobalQSGD

pytestmark = pytest.mark.usefixtures("several")


def optimizer_for(model, **options):
    return hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        named_parameters=model.named_parameters(),
        compression=GlobalQSGD(min_numel=64, bucket_mb=0.02, **options),
    )


@pytest.mark.parametrize("named", [True, False])
def test_backward_does_not_wait_for_a_delayed_rank(rank, size, named):
    """The last rank starts its backward pass only once all others have finished theirs."""
    model = mlp()
    names = {"named_parameters": model.named_parameters()} if named else {}
    optimizer = optimizer_for(model, **names)
    for step in range(3):
        optimizer.zero_grad()
        if rank == size - 1:
            hvd.allreduce(torch.ones(1), name=f"others are done {step}")
            backward(model, rank, step)
        else:
            backward(model, rank, step)  # if this waited for the last rank, both would wait forever
            hvd.allreduce(torch.ones(1), name=f"others are done {step}")
        optimizer.step()
        for parameter in model.parameters():
            assert_same_on_all_ranks(parameter)


@pytest.mark.core
def test_unnamed_operations_between_backward_and_step(rank, size):
    """Horovod names these by counting, and ranks of different speed must count the same."""
    model = mlp()
    optimizer = optimizer_for(model)
    for step in range(6 if size < 5 else 3):
        optimizer.zero_grad()
        time.sleep(0.02 * ((rank + step) % size))
        backward(model, rank, step)
        time.sleep(0.02 * ((rank * 3 + step) % size))
        mean = hvd.allreduce(torch.full((3,), float(rank)))
        assert torch.allclose(mean, torch.full((3,), (size - 1) / 2))
        optimizer.step()
        assert hvd.allgather(torch.full((1,), rank)).tolist() == list(range(size))


@pytest.mark.flat
def test_sums_start_during_the_backward_pass(rank, size):
    """Not only at the end: the exchange of one bucket overlaps with the gradients of the next."""
    compressor = GlobalQSGD(bucket_mb=0.01)
    contexts = []
    for i in range(6):
        probe, context = compressor.compress(gradients(size, 9000, seed=i)[rank])
        contexts.append((hvd.allreduce_async_(probe, name=f"probe{i}"), context))
        hvd.barrier()
        time.sleep(0.05)  # the norms of this tensor come back
    assert compressor.stats().slots_filled < 12, "no slot was used"
    for handle, context in contexts:
        compressor.decompress(hvd.synchronize(handle), context)
