"""Sums of exponential codes that are codes again, in plain NumPy; after ``two_phase.py``.

The reduction of Global-QSGD (arXiv 2305.18627) for exponential dithering. Two levels a and b, with
a = 2^d b in magnitude, add up to no level, so the sum is rounded to one of the neighbours, which is
right on average:

    same sign         2a with the probability 2^-d, and a otherwise
    opposite signs    a/2 with the probability 2^(1-d), and a otherwise; 0 if d = 0

A sum is at most twice its larger part, so n codes reach 2^(n-1) times the largest one, in whichever
order they are added. Codes begin as x 2^-(n-1) / M for that, where the paper has x / (n M), which
is not always enough.
"""

from __future__ import annotations

import numpy as np

from hvd_gqsgd.reference.linear import (
    Array,
    dither,
    floats,
    hash_bits,
    lanes_of,
    mix64,
    narrow,
    places,
    shared_norms,
    tile_keys,
)
from hvd_gqsgd.reference.two_phase import exponential_codes, exponential_levels

__all__ = ["combined_mean", "exponential_sum"]

COMBINE_STREAM = 2**32  # and those after it, one a rank


def exponential_sum(a: Array, b: Array, bits: int, xi: Array) -> Array:
    """The code of the sum, up or down for xi, in units of 2^-32, below the probability."""
    top = (1 << (bits - 1)) - 1
    swap = (a & top) > (b & top)
    large, small = np.where(swap, a, b), np.where(swap, b, a)
    sign, number = large & (top + 1), large & top
    apart = number - (small & top)
    same = (a ^ b) & (top + 1) == 0
    chance = np.exp2(32.0 - np.where(same, apart, apart - 1))
    move = xi < np.where(chance < 2, 0, chance)  # 32 bits cannot tell less from nothing
    total = np.where(same, np.minimum(number + move, top), number - move) | sign
    out: Array = np.where(~same & (apart == 0), 0, total)
    return np.where(small & top == 0, np.where(number == 0, 0, large), out)


def combined_mean(
    rows: Array, order: list[int], *, bits: int, block_size: int | None, correlated: bool,
    seed: int, step: int, tensor_id: int,
) -> Array:  # fmt: skip
    """What n ranks decode, with one row each, whose codes are added one by one in this order."""
    n, numel = rows.shape
    shared = shared_norms(rows, block_size, "max")
    at = places(numel, block_size, bits)
    index = (at.word - np.array([at.word[at.tile == t].min() for t in at.tile])) * lanes_of(bits)
    total = keys = np.zeros(0)
    for rank in order:
        xi = dither(
            numel, block_size, seed=seed, step=step, tensor_id=tensor_id,
            rank=rank, world_size=n, correlated=correlated,
        )  # fmt: skip
        codes = exponential_codes(rows[rank], shared, block_size, bits, xi, headroom=n - 1)
        key = tile_keys(
            int(at.tile.max()) + 1, seed=seed, step=step, tensor_id=tensor_id,
            stream=COMBINE_STREAM + rank,
        )  # fmt: skip
        if rank == order[0]:
            total, keys = codes, key
            continue
        keys = keys + key  # modulo 2^64
        mixed = np.array([mix64(int(k)) for k in keys], np.uint64)
        total = exponential_sum(total, codes, bits, hash_bits(mixed[at.tile], index + at.lane))
    maxima = floats(shared)[at.block]
    real = maxima.dtype.type
    ratio = real(2.0 ** (n - 1) / n)
    with np.errstate(over="ignore", invalid="ignore"):
        out = exponential_levels(total, bits).astype(real) * ratio * maxima
    return narrow(np.where(np.isfinite(maxima), out, real(np.nan)), rows.dtype)
