"""``hvd_gqsgd.allreduce`` over MPI, PyTorch's process groups and Horovod."""

from __future__ import annotations

import pytest
import torch
from helpers import gradients

from hvd_gqsgd import allreduce, simulate

SIZES = [0, 1, 3, 1023, 1_000_001]
OPERATORS = [
    {},
    {"exchange": "two_phase"},
    {"dither": "exponential"},
    {"dither": "exponential", "bits": 4, "block_size": 64},
    {"norm": "l2"},
    {"norm": "l2", "dither": "exponential"},
    {"bits": 16, "correlated": False, "block_size": None, "exchange": "allreduce"},
    {"bits": 5, "exchange": "allreduce", "block_size": 1500},
    {"bits": 4, "seed": -3},
]


def usable(options, size):
    return options.get("exchange") != "allreduce" or 2 * size < 2 ** options["bits"]


@pytest.mark.core
@pytest.mark.parametrize("numel", SIZES)
def test_all_transports_give_the_bits_of_simulate(rank, size, comm, numel):
    everyone = gradients(size, numel)
    for step in (0, 5):
        result = allreduce(everyone[rank], comm, step=step)
        assert torch.equal(result, simulate(everyone, step=step))


@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_operators(rank, size, comm, options):
    if not usable(options, size):
        pytest.skip("too many ranks for these lanes")
    for numel in (1, 5000, 300_001):  # the last one has more than one chunk
        everyone = gradients(size, numel)
        mean = allreduce(everyone[rank], comm, step=3, **options)
        assert torch.equal(mean, simulate(everyone, step=3, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(rank, size, comm, dtype):
    everyone = gradients(size, 3001, dtype=dtype)
    result = allreduce(everyone[rank], comm, step=0)
    assert result.dtype == dtype
    assert torch.equal(result, simulate(everyone))
