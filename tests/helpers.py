"""What several test files share: float data of all kinds, bits of tensors, and native calls."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_gqsgd import ops

Array = NDArray[Any]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WIDTHS = range(2, 17)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def name(value: object) -> str | None:
    """Test ids: ``bfloat16`` for ``torch.bfloat16``, pytest's own for all else."""
    return str(value)[6:] if isinstance(value, torch.dtype) else None


def as_numpy(x: Tensor) -> Array:
    """A tensor as the reference takes it: bfloat16 as ``uint16``."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.numpy()


def bits_of(x: Tensor) -> Tensor:
    """The bits of floats as integers: -0.0 differs from 0.0, and NaN equals itself."""
    return x.view(_INTEGERS[x.element_size()])


def from_bits(bits: Array | Tensor, dtype: torch.dtype) -> Tensor:
    """The floats with these bits."""
    bits = torch.as_tensor(bits)
    return bits.to(_INTEGERS[dtype.itemsize]).view(dtype)


def random_floats(rng: np.random.Generator, shape: Any, dtype: torch.dtype) -> Tensor:
    """Finite numbers with all bit patterns alike: of every magnitude, subnormals among them."""
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    bits = rng.integers(0, np.iinfo(unsigned).max, shape, dtype=unsigned, endpoint=True)
    x = from_bits(bits.view(f"int{8 * dtype.itemsize}"), dtype)
    return torch.where(x.isfinite(), x, torch.zeros((), dtype=dtype))


def gradient_like(
    rng: np.random.Generator, shape: Any, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Heavy-tailed numbers, as gradients are."""
    return torch.from_numpy(0.01 * rng.standard_t(3, shape)).to(dtype)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The kernels for one instruction set, for the length of the block."""
    before = ops.instruction_set()
    ops.use_instruction_set(name)
    try:
        yield
    finally:
        ops.use_instruction_set(before)


def norms(x: Tensor, block_size: int | None) -> Tensor:
    """Native block norms."""
    block = block_size or max(x.numel(), 1)
    out = torch.full((-(-x.numel() // block),), -1, dtype=ops.norm_dtype(x.dtype))
    ops.block_max(x, block, out)
    return out


def encode(
    x: Tensor, norms: Tensor, block_size: int | None, bits: int, levels: int, *, seed: int = 0,
    step: int = 0, tensor_id: int = 0, rank: int = 0, world_size: int = 1, correlated: bool = True,
) -> Tensor:  # fmt: skip
    """Native words, written over rubbish."""
    block = block_size or max(x.numel(), 1)
    words = torch.full((ops.words_for(x.numel(), block, bits),), -77, dtype=ops.word_dtype(bits))
    ops.quantize(
        x, norms, words, block, bits, levels, seed, step, tensor_id, rank, world_size, correlated
    )
    return words


def decode(
    words: Tensor, norms: Tensor, like: Tensor, block_size: int | None, bits: int, levels: int,
    contributors: int = 1, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Native gradient, written over rubbish."""
    out = torch.full_like(like, -77)
    block = block_size or max(like.numel(), 1)
    ops.dequantize(words, norms, out, block, bits, levels, contributors, scale)
    return out


def threshold(false_alarms: float) -> float:
    """How far a standard normal number strays, to either side, in this share of all cases."""
    return -NormalDist().inv_cdf(false_alarms / 2)


def chi_square_normal(statistic: float, freedom: int) -> float:
    """A chi-square statistic as a standard normal number (Wilson and Hilferty, PNAS 17, 1931)."""
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


def chi_square_z(counts: Array) -> float:
    """How uneven counts of equally likely outcomes are, as a standard normal number.

    Far below zero means more even than chance.
    """
    counts = counts.ravel()
    expected = counts.mean()
    return chi_square_normal(((counts - expected) ** 2).sum() / expected, counts.size - 1)
