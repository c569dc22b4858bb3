"""The layout of messages in Python is that of the native kernels, and that of the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import WIDTHS

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.reference.kinds import linear

SIZES = [1, 2, 11, 12, 13, 63, 64, 1023, 1024, 1025, 3000, 4096]
BLOCKS = [1, 5, 12, 1023, 1024, 1025, 2048, 2**63 - 1]


@pytest.mark.parametrize("bits", WIDTHS)
def test_number_of_words(bits: int) -> None:
    """The op takes buffers of just the length that ``words_for`` says."""
    for numel, block in itertools.product(SIZES, BLOCKS):
        words = layout.words_for(numel, block, bits)
        expected = reference.pack(np.zeros(numel, np.int64), block, bits, 1)
        assert words == len(expected)
        assert layout.word_dtype(bits) == torch.from_numpy(expected).dtype
        x, maxima = torch.zeros(numel), torch.zeros(-(-numel // block), dtype=torch.int32)
        for wrong in (words - 1, words + 1):
            buffer = torch.empty(wrong, dtype=layout.word_dtype(bits))
            message = f"words must have {words} elements, got {wrong}"
            with pytest.raises(ValueError, match=message):
                ops.quantize(x, maxima, buffer, block, *linear(bits, 1), 0, 0, 0, 0, 1, True)
            with pytest.raises(ValueError, match=message):
                ops.dequantize(buffer, maxima, x, block, *linear(bits, 1), 1, 1.0)


def requantize(
    numel: int, block: int, bits: int, norm_dtype: torch.dtype, tile: int, more: tuple[int, int]
) -> None:
    """Hands the op the words of the first tiles, and memory for their means, of the length in
    Python and some elements more."""
    words = layout.words_before(tile, numel, block, bits) + more[0]
    means = layout.means_before(tile, numel, block, bits, norm_dtype) + more[1]
    ops.requantize(
        torch.zeros(1, words, dtype=layout.word_dtype(bits)),
        torch.zeros(-(-numel // block), dtype=norm_dtype),
        torch.empty(means, dtype=layout.means_dtype(bits, norm_dtype)),
        numel, block, *linear(bits, 1), 0, tile, 0, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("norm_dtype", [torch.int32, torch.int64], ids=["float", "double"])
def test_offsets_of_tiles(norm_dtype: torch.dtype, bits: int) -> None:
    """The op takes words and means of one length alone: that before each tile."""
    for numel, block in itertools.product([0, *SIZES], BLOCKS):
        tiles = layout.tiles_for(numel, block)
        for tile in {*range(min(tiles, 4) + 1), tiles // 2, max(tiles - 1, 0), tiles}:
            requantize(numel, block, bits, norm_dtype, tile, (0, 0))
    for more in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        with pytest.raises(ValueError, match=r"received must be|means must have"):
            requantize(numel, block, bits, norm_dtype, tiles, more)
    with pytest.raises(ValueError, match=f"tiles must be within 0 to {tiles}, got 0 to "):
        requantize(numel, block, bits, norm_dtype, tiles + 1, (0, 0))
