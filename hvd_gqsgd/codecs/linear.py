"""Linear dithering: codes that are added as integers.

Global-QSGD (arXiv 2305.18627), standard dithering on a norm that all ranks share, here the maximum
per block. With n ranks and lanes of b bits there are s = floor((2^b - 1) / (2n)) levels a side:

    code        u = clip(floor(x * s / M + s + xi), 0, 2s)      so  E[u] = x * s / M + s
    mean        (sum of u - n * s) * M / (s * n)

A sum of n codes is at most 2sn <= 2^b - 1, so that a lane cannot overflow, whatever the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd import ops
from hvd_gqsgd.options import Options

__all__ = ["LinearCodec", "levels_for"]


def levels_for(bits: int, world_size: int) -> int:
    """Levels a side that lanes of ``bits`` bits leave to each of ``world_size`` ranks.

    Raises:
        ValueError: the lanes are too narrow for even one level; names the width that works.
    """
    levels = ((1 << bits) - 1) // (2 * world_size)
    if levels < 1:
        needed = (2 * world_size).bit_length()
        raise ValueError(
            f"bits={bits} is too narrow for {world_size} ranks: a lane must hold the sum of "
            f"{world_size} codes from 0 to 2, so bits must be at least {needed}"
        )
    return levels


@dataclass(frozen=True)
class LinearCodec:
    """One rank's encoder and decoder. Every method works on flat, contiguous tensors."""

    bits: int
    levels: int
    block_size: int | None
    correlated: bool
    seed: int
    rank: int
    world_size: int

    @classmethod
    def from_options(cls, options: Options, rank: int, world_size: int) -> LinearCodec:
        """The codec of rank ``rank`` of ``world_size``.

        Raises:
            ValueError: the width is too narrow for this many ranks.
        """
        return cls(
            bits=options.bits,
            levels=levels_for(options.bits, world_size),
            block_size=options.block_size,
            correlated=options.correlated,
            seed=options.seed,
            rank=rank,
            world_size=world_size,
        )

    @property
    def word_dtype(self) -> torch.dtype:
        """Type of the words that codes are packed in."""
        return ops.word_dtype(self.bits)

    def num_norms(self, numel: int) -> int:
        """Norms of a tensor of ``numel`` elements."""
        return -(-numel // self._block(numel))

    def num_words(self, numel: int) -> int:
        """Words for the codes of a tensor of ``numel`` elements."""
        return ops.words_for(numel, self._block(numel), self.bits)

    def norms(self, x: Tensor, out: Tensor) -> None:
        """Writes this rank's block norms, which are to be Max-reduced, to ``out``."""
        ops.block_max(x, self._block(x.numel()), out)

    def encode(self, x: Tensor, norms: Tensor, words: Tensor, step: int, tensor_id: int) -> None:
        """Writes the codes of ``x`` on the global ``norms``, which are to be summed, to ``words``.

        Dither is a hash of the seed, ``step``, ``tensor_id``, the element and, unless it is
        correlated, the rank.
        """
        ops.quantize(
            x, norms, words, self._block(x.numel()), self.bits, self.levels,
            self.seed, step, tensor_id, self.rank, self.world_size, self.correlated,
        )  # fmt: skip

    def decode(
        self, words: Tensor, norms: Tensor, out: Tensor, contributors: int, scale: float
    ) -> None:
        """Writes ``scale`` times the sum over ``contributors`` ranks to ``out``."""
        ops.dequantize(
            words, norms, out, self._block(out.numel()), self.bits, self.levels,
            contributors, scale,
        )  # fmt: skip

    def _block(self, numel: int) -> int:
        return self.block_size or max(numel, 1)
