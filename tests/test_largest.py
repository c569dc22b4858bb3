"""The place of the largest element of each block: the bits of the reference, and the places that
are meant."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import DTYPES, as_numpy, assert_same, data, gradient_like, instruction_set, name

from hvd_gqsgd._native import fallback, ops
from hvd_gqsgd.reference import linear as reference

SIZES = [0, 1, 3, 255, 1023, 1024, 1025, 2049, 5000, 70_000]


def places(x: torch.Tensor, block_size: int) -> torch.Tensor:
    dtype = torch.uint8 if block_size <= 256 else torch.int16
    out = torch.zeros(-(-x.numel() // block_size), dtype=dtype)
    ops.block_argmax(x, block_size, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_places_of_the_largest(dtype: torch.dtype) -> None:
    """Of ties the first; NaN before infinity; with all sizes, on every instruction set."""
    rng = np.random.default_rng(0)
    kinds = itertools.cycle(range(4))
    for block_size, numel in itertools.product([1, 3, 16, 17, 64, 256, 257, 2**16], SIZES):
        x = data(rng, next(kinds), numel, dtype)
        if numel > 100:
            x[rng.integers(0, numel, 9)] = torch.tensor([torch.nan, -torch.inf, 3.0] * 3).to(dtype)
            x[numel // 2 : numel // 2 + 40] = 0
        expected = reference.places_of_largest(as_numpy(x), block_size)
        for isa in ops.instruction_sets():
            with instruction_set(isa):
                found = places(x, block_size).to(torch.int64) & 0xFFFF
            assert_same(found, expected, (isa, block_size, numel))


def test_the_places_that_are_meant() -> None:
    x = torch.tensor([1, -3, 3, 2] + [0] * 4 + [torch.inf, -torch.inf, torch.nan, 5] + [7])
    assert places(x, 4).tolist() == [1, 0, 2, 0]
    assert places(torch.tensor([0.0] * 65_535 + [1]), 2**16).tolist() == [-1]  # 65,535 in 16 bits


@pytest.mark.parametrize(
    ("block", "dtype"), [(7, torch.uint8), (300, torch.int16), (65_536, torch.int16)]
)
def test_without_kernels(block: int, dtype: torch.dtype) -> None:
    x = gradient_like(np.random.default_rng(0), 70_000)
    x[60_000:60_005] = torch.nan
    got, expected = (torch.zeros(-(-70_000 // block), dtype=dtype) for _ in range(2))
    fallback.block_argmax(x, block, got)
    ops.block_argmax(x, block, expected)
    assert got.equal(expected)


def test_opcheck() -> None:
    x = gradient_like(np.random.default_rng(0), 1500)
    torch.library.opcheck(ops.block_argmax, (x, 9, torch.zeros(167, dtype=torch.uint8)))
