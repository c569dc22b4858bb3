"""Same seed, same bits: on reruns, in buckets of any size, with any number of threads, and on any
instruction set, another one on each rank too. That transports do not matter is in
``test_collective.py`` and ``test_ddp.py``, and CUDA in ``test_cuda_kernels.py``.
"""

from __future__ import annotations

import contextlib

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, gradients
from torch import nn

from hvd_gqsgd import BlockBits, GlobalQSGD, allreduce, simulate
from hvd_gqsgd._native import ops

pytestmark = pytest.mark.few

OPERATORS = [
    {}, {"exchange": "two_phase"}, {"dither": "exponential"}, {"norm": "l2"},
    {"bits": BlockBits(4)},
]  # fmt: skip
# The first one has work for two threads, which take about 65536 elements each.
NUMELS = (70_001, 9000, 5000)
SETS = ops.instruction_sets()


@contextlib.contextmanager
def running_on(instruction_set, threads):
    before = ops.instruction_set(), torch.get_num_threads()
    ops.use_instruction_set(instruction_set)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        ops.use_instruction_set(before[0])
        torch.set_num_threads(before[1])


def train(rank, size, *, named=False, first_step=0, **options):
    """Some steps of an optimizer whose gradients are known to the bit; the parameters then."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(numel)) for numel in NUMELS])
    if named:
        options["named_parameters"] = list(model.named_parameters())
    compressor = GlobalQSGD(**options)
    compressor.load_state_dict(compressor.state_dict() | {"step": first_step})
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), compressor
    )
    for step in range(2):
        optimizer.zero_grad()
        for i, parameter in enumerate(model):  # so that they come in this order
            (parameter * gradients(size, NUMELS[i], seed=10 * step + i)[rank]).sum().backward()
        optimizer.step()
    return torch.cat([parameter.detach() for parameter in model])


@pytest.mark.parametrize("options", OPERATORS[:2], ids=str)
def test_training(rank, size, several, options):
    expected = train(rank, size, **options)
    assert_same_on_all_ranks(expected)
    assert torch.equal(train(rank, size, **options), expected)
    for threads, bucket_mb in ((1, 0.01), (2, 0.3)):
        with running_on(SETS[(threads + rank) % len(SETS)], threads):
            assert torch.equal(train(rank, size, bucket_mb=bucket_mb, **options), expected)


@pytest.mark.parametrize("other", [{"seed": 1}, {"first_step": 1}, {"named": True}], ids=str)
def test_other_seeds_steps_and_names_give_other_bits(rank, size, several, other):
    different = train(rank, size, **other)
    assert_same_on_all_ranks(different)
    # In each tensor, but for elements that are zeros or maxima.
    for one, two in zip(different.split(NUMELS), train(rank, size).split(NUMELS), strict=True):
        assert (one != two).float().mean() > 0.3


@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_allreduce(rank, size, comm, options):
    everyone = gradients(size, NUMELS[0])
    expected = simulate(everyone, step=3, **options)
    for threads in (1, 2):
        with running_on(SETS[(threads + rank) % len(SETS)], threads):
            result = allreduce(everyone[rank], comm, step=3, **options)
        assert torch.equal(result, expected)
    for other in ({"seed": 1, "step": 3}, {"step": 4}):
        different = allreduce(everyone[rank], comm, **other, **options)
        assert (different != expected).float().mean() > 0.3
