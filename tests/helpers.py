"""What several test files share: float data of all kinds, bits of tensors, and native calls."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.reference import two_phase as reference_two_phase
from hvd_gqsgd.reference.kinds import Code, exponential, two_phase_code

Array = NDArray[Any]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WIDTHS = range(2, 17)
TWO_PHASE_CODES = [
    exponential(4),
    exponential(8),
    *(two_phase_code("linear", bits) for bits in (2, 3, 5, 8, 11, 16)),
]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals itself, and -0.0 differs from 0.0."""
    return torch.equal(bits_of(a), bits_of(b))


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


def random_place(
    rng: np.random.Generator, rank: int, world_size: int, correlated: bool
) -> dict[str, Any]:
    """What dither depends on, besides the element."""
    return {
        "seed": int(rng.integers(-(2**63), 2**63 - 1)),
        "step": int(rng.integers(0, 2**31)),
        "tensor_id": int(rng.integers(0, 2**31)),
        "rank": rank,
        "world_size": world_size,
        "correlated": correlated,
    }


def gradient_like(
    rng: np.random.Generator, shape: Any, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Heavy-tailed numbers, as gradients are."""
    return torch.from_numpy(0.01 * rng.standard_t(3, shape)).to(dtype)


def special_values(dtype: torch.dtype) -> Tensor:
    """Numbers at the edges of a type, signed zeros, infinities and NaN."""
    info = torch.finfo(dtype)
    edges = [0.0, 1.0, 1e-45, 3.4e38, info.smallest_normal, info.smallest_normal / 2, info.max]
    smallest = from_bits(np.array([1, 2, 3]), dtype)
    positive = torch.cat([torch.tensor(edges, dtype=torch.float64).to(dtype), smallest])
    odd = torch.tensor([torch.inf, torch.nan], dtype=dtype)
    return torch.cat([positive, -positive, odd, -odd])


def data(rng: np.random.Generator, kind: int, numel: int, dtype: torch.dtype) -> Tensor:
    """One of four kinds of numbers."""
    x = gradient_like(rng, numel, dtype)
    if kind == 1:  # stretches of quite different magnitude, from nothing to overflow
        stretch = rng.choice([3, 100, 5000])
        exponents = np.repeat(rng.integers(-160, 140, numel // stretch + 1), stretch)[:numel]
        x = torch.from_numpy(rng.standard_normal(numel) * np.exp2(exponents)).to(dtype)
    elif kind == 2:
        x = random_floats(rng, numel, dtype)
    elif kind == 3 and numel:
        special = special_values(dtype)
        at = rng.integers(0, numel, 1 + numel // 500)
        x[at] = special[rng.integers(0, len(special), len(at))]
    return x


def assert_same(got: Tensor, expected: Array, what: object) -> None:
    """Native and reference results have the same type, shape and bits."""
    actual = as_numpy(got)
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    integers = f"i{actual.itemsize}"
    different = np.flatnonzero(actual.view(integers) != expected.view(integers))
    assert not len(different), (what, different[:5], actual[different[:5]], expected[different[:5]])


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
    out = torch.full((-(-x.numel() // block),), -1, dtype=layout.norm_dtype(x.dtype))
    ops.block_max(x, block, out)
    return out


def encode(
    x: Tensor, norms: Tensor, block_size: int | None, code: Code, *, seed: int = 0,
    step: int = 0, tensor_id: int = 0, rank: int = 0, world_size: int = 1, correlated: bool = True,
) -> Tensor:  # fmt: skip
    """Native words, written over rubbish."""
    block = block_size or max(x.numel(), 1)
    words = torch.full(
        (layout.words_for(x.numel(), block, code.bits),), -77, dtype=layout.word_dtype(code.bits)
    )
    ops.quantize(x, norms, words, block, *code, seed, step, tensor_id, rank, world_size, correlated)
    return words


def decode(
    words: Tensor, norms: Tensor, like: Tensor, block_size: int | None, code: Code,
    contributors: int = 1, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Native gradient, written over rubbish."""
    out = torch.full_like(like, -77)
    block = block_size or max(like.numel(), 1)
    ops.dequantize(words, norms, out, block, *code, contributors, scale)
    return out


def squares(x: Tensor, norms: Tensor, block_size: int | None) -> Tensor:
    """Native sums of squares of blocks."""
    out = torch.full(norms.shape, -77)
    ops.block_squares(x, norms, out, block_size or max(x.numel(), 1))
    return out


def requantize(
    received: Tensor, norms: Tensor, numel: int, block_size: int | None, code: Code, *,
    cuts: Iterable[int] | None = None, seed: int = 0, step: int = 0, tensor_id: int = 0,
) -> Tensor:  # fmt: skip
    """Native means of all tiles, written over rubbish: in segments between the tiles ``cuts``."""
    block = block_size or max(numel, 1)
    # To have the offsets from the reference here makes it a test of the native ones.
    norm_type = f"i{norms.element_size()}"
    offsets = reference_two_phase.tile_offsets(numel, block_size, code.bits, norm_type)
    at = reference.places(numel, block_size, code.bits)
    ends = np.zeros(len(offsets), np.int64)  # of the words of the tiles before
    np.maximum.at(ends, at.tile + 1, at.word + 1)
    edges = [0, *(cuts or ()), len(offsets) - 1]
    wide = 8 in (norms.element_size(), received.element_size())
    parts = []
    for first, last in pairwise(edges):
        size = int(offsets[last] - offsets[first])
        part = torch.full((size,), -77, dtype=torch.int64 if wide else torch.int32)
        piece = received[:, ends[first] : ends[last]]
        ops.requantize(piece, norms, part, numel, block, *code, first, last, seed, step, tensor_id)
        parts.append(part)
    return torch.cat(parts)


def decode_means(
    means: Tensor, norms: Tensor, like: Tensor, block_size: int | None, code: Code,
    scale: float = 1.0, cuts: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Native gradient from means, written over rubbish; in parts that end at the tiles ``cuts``."""
    out = torch.full_like(like, -77)
    block = block_size or max(like.numel(), 1)
    edges = [0, *cuts, layout.tiles_for(like.numel(), block)]
    for first, last in pairwise(edges):
        begin, end = (
            layout.means_before(tile, like.numel(), block, code.bits, norms.dtype)
            for tile in (first, last)
        )
        ops.dequantize_means(means[begin:end], norms, out, block, *code, first, last, scale)
    return out


def several(rng: np.random.Generator, kind: int, shape: tuple[int, int], dtype: Any) -> Tensor:
    """A row for each rank; kind 4 is of quite different magnitudes on different ranks."""
    n, numel = shape
    if kind < 4:
        return torch.stack([data(rng, kind, numel, dtype) for _ in range(n)])
    factors = torch.from_numpy(np.exp2(rng.integers(-20, 20, (n, 1))))
    return (gradient_like(rng, shape, torch.float64) * factors).to(dtype)


def shared_norms(rows: Tensor, block_size: int | None, norm: str) -> Tensor:
    """Native norms over all ranks."""
    largest = torch.stack([norms(x, block_size) for x in rows]).amax(0)
    if norm == "l2":
        total = torch.stack([squares(x, largest, block_size) for x in rows]).sum(0)
        ops.l2_norms(largest, total)
    return largest


def send(rows: Tensor, shared: Tensor, block_size: int | None, code: Code, **at: Any) -> Tensor:
    """Native words, a row for each rank."""
    return torch.stack(
        [
            encode(x, shared, block_size, code, rank=rank, world_size=len(rows), **at)
            for rank, x in enumerate(rows)
        ]
    )


def exchange(
    rows: Tensor, code: Code, block_size: int | None, norm: str = "max",
    correlated: bool = True, cuts: list[int] | None = None, **at: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All native: norms, words, means, and what each rank decodes."""
    numel = rows.shape[1]
    shared = shared_norms(rows, block_size, norm)
    words = send(rows, shared, block_size, code, correlated=correlated, **at)
    means = requantize(words, shared, numel, block_size, code, cuts=cuts, **at)
    return shared, words, means, decode_means(means, shared, rows[0], block_size, code)


def tiles_of(numel: int, block_size: int | None, bits: int) -> int:
    return int(reference.places(numel, block_size, bits).tile.max(initial=-1)) + 1


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


def spread(rng: np.random.Generator, shape: tuple[int, int], dtype: Any = torch.float32) -> Tensor:
    """Heavy-tailed numbers, of quite different magnitudes in runs of 256, some of them zero."""
    numel = shape[1]
    factors = np.exp2(rng.integers(-9, 6, numel // 256 + 1)) * (rng.random(numel // 256 + 1) > 0.1)
    of_element = torch.from_numpy(factors.repeat(256)[:numel])
    return (gradient_like(rng, shape, torch.float64) * of_element).to(dtype)
