"""Norms of blocks, and levels and bytes of widths per block, for ``hvd_gqsgd.bench.error``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.exchanges.contribution import MARKS
from hvd_gqsgd.options import Options

__all__ = ["block_norms", "bytes_of_codes", "levels_of_elements"]


def block_norms(rows: Tensor, options: Options) -> Tensor:
    """The norm of each block over all ranks, as the bits of a float."""
    numel = rows.shape[1]
    block = options.block_size or max(numel, 1)
    norms = torch.zeros((len(rows), -(-numel // block)), dtype=layout.norm_dtype(rows.dtype))
    for x, out in zip(rows, norms, strict=True):
        ops.block_max(x, block, out)
    largest = norms.amax(0)
    if options.norm == "l2":
        squares = torch.zeros(norms.shape, dtype=torch.int64)
        for x, into in zip(rows, squares, strict=True):
            ops.block_squares(x, largest, into, block)
        ops.l2_norms(largest, squares.sum(0))
    return largest


def levels_of_elements(
    norms: Tensor, numel: int, bits: BlockBits, ranks: int, summands: int
) -> Tensor:
    """The levels per side of each element of a tensor, float64 of shape (d,).

    Elements of blocks without a width have 1.

    Args:
        norms: the global norm of each block.
        numel: number of elements, d.
        bits: the rule of widths.
        ranks: number of ranks.
        summands: number of codes that a lane sums; 1 in two phases.
    """
    tensors = ((numel, bits.block_size),)
    owners = ranks if summands == 1 else 1
    segments = layout.block_segments(tensors, bits.words_for, norms.dtype, owners, summands)
    plan = torch.empty(2 * len(norms) + 1, dtype=torch.int32)
    columns = layout.columns_of_blocks(tensors, norms.device)
    ops.block_widths(norms, columns, segments.blocks, segments.words, *bits.rule(summands), plan)
    levels = ((2 ** plan[: len(norms)].double() - 1) / (2 * summands)).floor().clamp(min=1)
    return levels.repeat_interleave(bits.block_size)[:numel]


def bytes_of_codes(
    numels: Sequence[int], bits: BlockBits, norm_dtype: torch.dtype, ranks: int, two_phase: bool
) -> int:
    """Bytes of a bucket's codes and means, or marks and codes in an Allreduce, as in ``Stats``."""
    tensors = tuple((numel, bits.block_size) for numel in numels)
    if not two_phase:
        summed = layout.block_segments(tensors, bits.words_for, norm_dtype, 1, ranks)
        return 8 * MARKS + 4 * summed.words[-1]
    segments = layout.block_segments(tensors, bits.words_for, norm_dtype, ranks)
    return 4 * segments.words[-1] // 2 + norm_dtype.itemsize * segments.means[-1] // 2
