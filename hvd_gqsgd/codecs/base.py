"""The codec interface, and what all codecs share: norms, sizes of messages, rounding of means.

Every method works on flat, contiguous tensors. A *tile* is a block of at most 1024 elements, or a
part of a larger block; it is the least that a rank can own in a two-phase exchange.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops

__all__ = ["CodeKind", "Codec"]


class CodeKind(IntEnum):
    """The kinds of codes, numbered as ``CodeKind`` of ``native/core/args.h``."""

    LINEAR = 0
    EXPONENTIAL = 1


@dataclass(frozen=True)
class Codec(ABC):
    """One rank's encoder and decoder for codes of one width."""

    kind: ClassVar[CodeKind]

    bits: int
    levels: int
    """Levels a side; see ``levels_for``."""
    block_size: int | None
    correlated: bool
    seed: int
    rank: int
    world_size: int

    @classmethod
    @abstractmethod
    def levels_for(cls, bits: int, summands: int) -> int:
        """Levels a side of codes in lanes that must hold the sum of ``summands`` codes.

        Raises:
            ValueError: the lanes are too narrow.
        """

    @property
    def code(self) -> tuple[CodeKind, int, int]:
        """Kind, bits and levels, in the order of the native operators."""
        return self.kind, self.bits, self.levels

    @property
    def word_dtype(self) -> torch.dtype:
        """Type of the words that codes are packed in."""
        return layout.word_dtype(self.bits)

    def norm_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type of the norms of tensors of type ``dtype``."""
        return layout.norm_dtype(dtype)

    def block(self, numel: int) -> int:
        """Elements that share a norm in a tensor of ``numel`` elements."""
        return self.block_size or max(numel, 1)

    def num_norms(self, numel: int) -> int:
        """Norms of a tensor of ``numel`` elements."""
        return -(-numel // self.block(numel))

    def num_words(self, numel: int) -> int:
        """Words for the codes of a tensor of ``numel`` elements."""
        return layout.words_for(numel, self.block(numel), self.bits)

    def norms(self, x: Tensor, out: Tensor) -> None:
        """Writes this rank's largest magnitudes, which are to be Max-reduced, to ``out``."""
        ops.block_max(x, self.block(x.numel()), out)

    def squares(self, x: Tensor, norms: Tensor, out: Tensor) -> None:
        """Writes this rank's sums of squares on the global ``norms``, to be summed, to ``out``."""
        ops.block_squares(x, norms, out, self.block(x.numel()))

    def l2_norms(self, norms: Tensor, squares: Tensor) -> None:
        """Turns the global largest magnitudes into L2 norms, given the sums over all ranks."""
        ops.l2_norms(norms, squares)

    def encode(self, x: Tensor, norms: Tensor, words: Tensor, step: int, tensor_id: int) -> None:
        """Writes the codes of ``x`` on the global ``norms`` to ``words``.

        Dither is a hash of the seed, ``step``, ``tensor_id``, the element and, unless it is
        correlated, the rank.
        """
        ops.quantize(
            x, norms, words, self.block(x.numel()), *self.code,
            self.seed, step, tensor_id, self.rank, self.world_size, self.correlated,
        )  # fmt: skip

    def decode(
        self, words: Tensor, norms: Tensor, out: Tensor, contributors: int, scale: float
    ) -> None:
        """Writes ``scale`` times the sum over ``contributors`` ranks to ``out``, given the sum of
        their words.

        Raises:
            ValueError: codes of this kind cannot be added.
        """
        ops.dequantize(
            words, norms, out, self.block(out.numel()), *self.code, contributors, scale
        )  # fmt: skip

    def requantize(
        self, received: Tensor, norms: Tensor, means: Tensor, numel: int, tiles: tuple[int, int],
        step: int, tensor_id: int,
    ) -> None:  # fmt: skip
        """Rounds the mean over the ranks of some tiles of a tensor once more, for all ranks.

        ``received`` has a row for each rank, with the words of tiles ``tiles[0]`` to ``tiles[1]``
        (excluded). The dither does not depend on the rank, so neither does the result.
        """
        ops.requantize(
            received, norms, means, numel, self.block(numel), *self.code,
            *tiles, self.seed, step, tensor_id,
        )  # fmt: skip

    def decode_means(
        self, means: Tensor, norms: Tensor, out: Tensor, tiles: tuple[int, int], scale: float
    ) -> None:
        """Writes ``scale`` times the mean over the ranks to tiles ``tiles[0]`` to ``tiles[1]``
        (excluded) of ``out``, given the means of just these."""
        ops.dequantize_means(means, norms, out, self.block(out.numel()), *self.code, *tiles, scale)
