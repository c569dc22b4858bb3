"""Widths per block in plain NumPy: ``two_phase.py`` goes on here.

The rule of DQ-SGD (arXiv 2107.14575), levels in proportion to a power of the norm, for blocks. With
l(M) the logarithm of a norm to the base 2, linear between powers of two and cut to 8 binary places,
a block has the width

    w = floor(c + power * l(M) + 1/2), at least ``least`` and at most ``most``

and none if M is 0 or not finite. A segment of a bucket has so many words. c is the largest multiple
of 2^-8 at which the words of its blocks are no more than that. What is left widens, by one bit
each, the blocks that would be wider at the next c: in their order, until one does not fit.

Where n ranks add their codes the bucket is one segment, and a block of q columns takes 64-bit words
of floor(64 / w) lanes for its 32 q elements. Widths are widened as far as no fewer lanes fit.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from hvd_gqsgd.reference.linear import (
    Array,
    codes,
    dither,
    dither_stream,
    floats,
    narrow,
    places,
    shared_norms,
)
from hvd_gqsgd.reference.two_phase import REQUANTIZE_STREAM

__all__ = [
    "Rule",
    "allreduce_mean",
    "codes",
    "columns_of",
    "dither",
    "mean",
    "one_phase_mean",
    "pack_added",
    "pack_block",
    "widths",
    "words_of",
]

UNIT = 256
ROWS = 32


class Rule(NamedTuple):
    """The budget in bits, the power, and the least and the largest width."""

    budget: float
    power: float
    least: int
    most: int


def columns_of(numel: int, block_size: int) -> Array:
    """Columns of 32 elements that each block fills, the last one perhaps not whole."""
    sizes = np.bincount(np.arange(numel) // block_size)
    return -(-sizes // ROWS)


def words_of(columns: Array, width: Array, summands: int) -> Array:
    """32-bit words of blocks, whose codes are added if there are more than one."""
    if summands == 1:
        return columns * width
    lanes = 64 // np.maximum(width, 1)
    return np.where(width > 0, 2 * -(-ROWS * columns // lanes), 0)


def widths(norms: Array, columns: Array, words: int, rule: Rule, summands: int = 1) -> Array:
    """The width of each block of one segment."""
    places_of_norm = 23 if norms.dtype == np.int32 else 52
    origin = 127 if norms.dtype == np.int32 else 1023
    logs = [int(norm) * UNIT // 2**places_of_norm - origin * UNIT for norm in norms]
    weights = np.array([log * round(rule.power * 256) // 256 for log in logs], np.int64)
    used = (norms > 0) & np.isfinite(floats(norms))

    def at(offset: int) -> Array:
        wanted = np.floor((offset + weights) / UNIT + 0.5).astype(np.int64)
        clipped = np.clip(wanted, rule.least, rule.most)
        if summands > 1:
            clipped = np.minimum(64 // (64 // clipped), rule.most)
        return np.where(used, clipped, 0)

    def size(width: Array) -> Array:
        return words_of(columns, width, summands)

    # From where all blocks have the least width to where all have the largest one.
    spread = 1 + int(abs(weights).max(initial=0)) + 20 * UNIT
    low, high = -spread, spread
    while high - low > 1:
        middle = (low + high) // 2
        if size(at(middle)).sum() <= words:
            low = middle
        else:
            high = middle
    chosen, wider = at(low), at(low + 1)
    left = words - int(size(chosen).sum())
    for block in np.flatnonzero(wider > chosen):
        left -= int(size(wider)[block] - size(chosen)[block])
        if left < 0:
            break
        chosen[block] = wider[block]
    return chosen


def pack_block(lanes: Array, width: int) -> Array:
    """The words of a block's lanes (``int32``): 32 lanes of a column fill ``width`` words."""
    columns = -(-lanes.size // ROWS)
    words = np.zeros((width, columns), np.uint32)
    for column in range(columns):
        number = sum(int(lanes[row * columns + column]) << row * width for row in range(ROWS))
        for word in range(width):
            words[word, column] = number >> 32 * word & 0xFFFFFFFF
    return words.ravel().view(np.int32)


def pack_added(lanes: Array, columns: int, width: int, s: int) -> Array:
    """The words of a block's lanes (codes + s) that ranks add, as ``int64``: the top lane of a word
    has the code alone."""
    count = 64 // width
    pairs = -(-ROWS * columns // count)
    padded = np.full(count * pairs, s, np.int64)
    padded[: lanes.size] = lanes
    words = [
        sum(int(padded[lane * pairs + j]) << lane * width for lane in range(count))
        - (s << (count - 1) * width)
        for j in range(pairs)
    ]
    return np.array(words, np.int64)


def _segments(columns: Array, ranks: int, rule: Rule, norm_size: int) -> list[tuple[Array, int]]:
    """The blocks of each rank, and their words: whole units of the size of a norm."""
    cuts = [len(columns) * rank // ranks for rank in range(ranks + 1)]
    parts = []
    for first, last in itertools.pairwise(cuts):
        words = round(rule.budget * 1024) * int(columns[first:last].sum()) // 1024
        parts.append((np.arange(first, last), -(-words * 4 // norm_size) * norm_size // 4))
    return parts


def _encode(x: Array, norms: Array, width: Array, xi: Array, summands: int = 1) -> Array:
    """Codes of elements on norms and at widths of their own; 0 without a width."""
    out = np.zeros(x.size, np.int64)
    for w in np.unique(width[width > 0]):
        at, s = width == w, ((1 << w) - 1) // (2 * summands)
        out[at] = codes(x[at], norms[at], 1, s, xi[at], int(w))
    return out


class _Averaged(NamedTuple):
    share: Array  # of the mean in the norm
    shared: Array  # norms
    block: Array  # of each element, as all below
    width: Array
    levels: Array
    maxima: Array


def _average(
    rows: Array, rule: Rule, segments: int, block_size: int, correlated: bool, norm: str,
    summands: int = 1, **at: Any,
) -> _Averaged:  # fmt: skip
    """The first phase, of blocks that so many owners have."""
    n, numel = rows.shape
    shared = shared_norms(rows, block_size, norm)
    columns = columns_of(numel, block_size)
    width_of_block = np.zeros(len(columns), np.int64)
    if summands > 1:
        rule = rule._replace(least=max(rule.least, int(2 * summands).bit_length()))
    for blocks, words in _segments(columns, segments, rule, shared.itemsize):
        if summands > 1:
            least = words_of(columns, np.full(columns.size, rule.least), summands).sum()
            words = max(words + words % 2, int(least))
        width_of_block[blocks] = widths(shared[blocks], columns[blocks], words, rule, summands)
    block = places(numel, block_size, 8).block
    width, maxima = width_of_block[block], floats(shared)[block]
    real = maxima.dtype.type
    levels = np.maximum(((1 << width) - 1) // (2 * summands), 1)

    total = np.zeros(numel, np.int64)
    for rank, x in enumerate(rows):
        xi = dither(numel, block_size, rank=rank, world_size=n, correlated=correlated, **at)
        total += _encode(x, shared[block], width, xi, summands)
    share = total.astype(real) * (1 / n / levels).astype(real)
    return _Averaged(share, shared, block, width, levels, maxima)


def mean(
    rows: Array, rule: Rule, *, block_size: int, correlated: bool, seed: int, step: int,
    tensor_id: int, norm: str = "max",
) -> Array:  # fmt: skip
    """The whole of it: what n ranks, with one row each, decode of a bucket of one tensor."""
    n, numel = rows.shape
    at: dict[str, Any] = {"seed": seed, "step": step, "tensor_id": tensor_id}
    first = _average(rows, rule, n, block_size, correlated, norm, **at)
    real, block = first.share.dtype.type, first.block
    largest = np.zeros(len(first.shared), real)
    np.maximum.at(largest, block, abs(first.share))
    xi = dither_stream(numel, block_size, stream=REQUANTIZE_STREAM, **at)
    again = _encode(first.share, largest.view(first.shared.dtype)[block], first.width, xi)
    share = (again.astype(real) * (1 / first.levels).astype(real)) * largest[block]
    return _in_units(share, first.maxima, rows.dtype)


def one_phase_mean(
    rows: Array, rule: Rule, *, block_size: int, correlated: bool, seed: int, step: int,
    tensor_id: int, norm: str = "max",
) -> Array:  # fmt: skip
    """The mean of a shard, of which n ranks have one row each, on the rank that owns it."""
    at: dict[str, Any] = {"seed": seed, "step": step, "tensor_id": tensor_id}
    first = _average(rows, rule, 1, block_size, correlated, norm, **at)
    return _in_units(first.share, first.maxima, rows.dtype)


def allreduce_mean(
    rows: Array, rule: Rule, *, block_size: int, correlated: bool, seed: int, step: int,
    tensor_id: int, norm: str = "max",
) -> Array:  # fmt: skip
    """The mean that n ranks, with one row each, decode of a bucket of one tensor whose codes were
    added."""
    at: dict[str, Any] = {"seed": seed, "step": step, "tensor_id": tensor_id}
    first = _average(rows, rule, 1, block_size, correlated, norm, summands=len(rows), **at)
    return _in_units(first.share, first.maxima, rows.dtype)


def _in_units(share: Array, maxima: Array, dtype: Any) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        out = share * maxima
    return narrow(np.where(np.isfinite(maxima), out, maxima.dtype.type(np.nan)), dtype)
