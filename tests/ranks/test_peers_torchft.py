"""The cases of torchft's tests of quantized collectives (``collectives_test.py``), by ``allreduce``
instead of ``allreduce_quantized``: sizes, magnitudes, reductions, types and shapes, within the
tolerance there. Its reduce-scatter is that of FSDP here, in ``test_fsdp.py``.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from conftest import process_group
from helpers import assert_same_on_all_ranks
from torch.distributed import ReduceOp

from hvd_gqsgd import allreduce

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)

pytestmark = pytest.mark.few

TOLERANCE = 0.04
SHAPES = [(-1,), (16, -1), (-1, 8), (4, 4, -1)]


@pytest.mark.parametrize("numel", [256, 1024, 2048])
@pytest.mark.parametrize("multiplier", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("op", [ReduceOp.AVG, ReduceOp.SUM], ids=["avg", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_allreduce(rank, size, numel, multiplier, op, dtype):
    group = process_group()
    torch.manual_seed(rank)
    given = torch.rand(numel, dtype=dtype) * multiplier
    exact = given.double()
    dist.all_reduce(exact, group=group)
    if op == ReduceOp.AVG:
        exact /= size
    for shape in SHAPES:
        found = allreduce(given.view(shape), group, op, bits=8)
        assert found.shape == given.view(shape).shape
        assert ((found.double().view(-1) - exact) / exact).abs().mean() < TOLERANCE
        assert_same_on_all_ranks(found)
