"""Where everything lies in a message: tiles, words and means, as offsets.

A block of consecutive elements shares a norm, and is cut in *tiles* of at most 1024 elements.
``native/core/lanes.h`` has the layout of the lanes within a tile's words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = [
    "TILE",
    "means_before",
    "means_dtype",
    "norm_dtype",
    "tiles_for",
    "word_dtype",
    "words_before",
    "words_for",
]

TILE = 1024
"""Elements that are packed together: ``kTile`` of ``native/core/lanes.h``."""


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer type that the norms of tensors of this type travel as."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def word_dtype(bits: int) -> torch.dtype:
    """The type of the words that lanes of this width are packed in."""
    return torch.int32 if 32 % bits == 0 else torch.int64


def words_for(numel: int, block_size: int, bits: int) -> int:
    """How many words the codes of a tensor take."""
    return words_before(tiles_for(numel, block_size), numel, block_size, bits)


def tiles_for(numel: int, block_size: int) -> int:
    """How many tiles a tensor has: each block is cut in tiles of at most 1024 elements."""
    return numel // block_size * -(-block_size // TILE) + -(-(numel % block_size) // TILE)


def words_before(tile: int, numel: int, block_size: int, bits: int) -> int:
    """How many words the codes of the first ``tile`` tiles of a tensor take."""
    return _before(tile, numel, block_size, lambda elements: -(-elements // _lanes(bits)))


def means_dtype(bits: int, norm_dtype: torch.dtype) -> torch.dtype:
    """The type of the buffer for rounded means: the wider one of norms and words."""
    return max(word_dtype(bits), norm_dtype, key=lambda dtype: dtype.itemsize)


def means_before(tile: int, numel: int, block_size: int, bits: int, norm_dtype: torch.dtype) -> int:
    """How many elements of that type the means of the first ``tile`` tiles take, norms included."""
    unit, word = means_dtype(bits, norm_dtype).itemsize, word_dtype(bits).itemsize
    return _before(
        tile, numel, block_size,
        lambda elements: 1 + -(-(-(-elements // _lanes(bits)) * word) // unit),
    )  # fmt: skip


def _before(tile: int, numel: int, block_size: int, size: Callable[[int], int]) -> int:
    """The sizes of the first tiles, added up; ``size`` is that of a tile of so many elements."""

    def in_part(elements: int) -> int:
        left = elements % TILE
        return elements // TILE * size(TILE) + (size(left) if left else 0)

    block, inside = divmod(tile, -(-block_size // TILE))
    elements = min(block * block_size + inside * TILE, numel)
    # A tile may end with its block, the last one of the tensor, or in the midst of either.
    return elements // block_size * in_part(block_size) + in_part(elements % block_size)


def _lanes(bits: int) -> int:
    return 8 * word_dtype(bits).itemsize // bits
