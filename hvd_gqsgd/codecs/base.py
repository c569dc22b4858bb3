"""The codec interface, and what all codecs share: norms, sizes of messages, rounding of means.

Every method works on flat, contiguous tensors, and on all tensors of a bucket at once; their norms
and words lie one behind the other. A *tile* is a block of at most 1024 elements, or a
part of a larger block; it is the least that a rank can own in a two-phase exchange.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    NEAREST = 2
    """Linear codes, rounded to nearest."""


@dataclass(frozen=True)
class Codec(ABC):
    """One rank's encoder and decoder for codes of one width."""

    kind: ClassVar[CodeKind]
    """Of codes with native code."""
    widths: ClassVar[tuple[int, ...] | None] = None
    """The widths of lanes that there are, of which all steps and blocks have one; None: all."""
    added: ClassVar[bool] = True
    """Whether lanes can be added as integers, as in an Allreduce."""

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

    def norms(self, xs: Sequence[Tensor], out: Tensor) -> None:
        """Writes this rank's largest magnitudes, which are to be Max-reduced, to ``out``."""
        ops.block_max_each(xs, self.block_size, out)

    def squares(self, xs: Sequence[Tensor], norms: Tensor, out: Tensor) -> None:
        """Writes this rank's sums of squares on the global ``norms``, to be summed, to ``out``."""
        lengths = [self.num_norms(x.numel()) for x in xs]
        for x, norm, square in zip(xs, norms.split(lengths), out.split(lengths), strict=True):
            ops.block_squares(x, norm, square, self.block(x.numel()))

    def l2_norms(self, norms: Tensor, squares: Tensor) -> None:
        """Turns the global largest magnitudes into L2 norms, given the sums over all ranks."""
        ops.l2_norms(norms, squares)

    def encode(
        self, xs: Sequence[Tensor], norms: Tensor, words: Tensor, step: int,
        tensor_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """Writes the codes of ``xs`` on the global ``norms`` to ``words``.

        Dither is a hash of the seed, ``step``, the tensor's number, the element and, unless it is
        correlated, the rank. Codes that are rounded to nearest have none.
        """
        ops.quantize_each(
            xs, norms, words, self.block_size, *self.code,
            self.seed, step, tensor_ids, self.rank, self.world_size, self.correlated,
        )  # fmt: skip

    def decode(
        self, words: Tensor, norms: Tensor, outs: Sequence[Tensor], word_starts: Sequence[int],
        norm_starts: Sequence[int], contributors: int, scale: float,
    ) -> None:  # fmt: skip
        """Writes ``scale`` times the sum over ``contributors`` ranks to ``outs``, given the sum of
        their words; the words and norms of these tensors begin at ``word_starts`` and
        ``norm_starts``.

        Raises:
            ValueError: codes of this kind cannot be added.
        """
        ops.dequantize_each(
            words, norms, outs, word_starts, norm_starts, self.block_size, *self.code,
            contributors, scale,
        )  # fmt: skip

    def sum(self, received: Tensor, norms: Tensor, out: Tensor, scale: float) -> None:
        """Writes ``scale`` times the sum over the ranks to ``out``, given its norms and its words
        from each rank, a row of ``received``. Nothing is rounded to codes again."""
        ops.sum_codes(received, norms, out, self.block(out.numel()), *self.code, scale)

    def requantize(
        self, received: Tensor, norms: Tensor, means: Tensor, numels: Sequence[int],
        norm_starts: Sequence[int], runs: Sequence[int], begin: int, step: int,
        tensor_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """Rounds the mean over the ranks of some tiles of a bucket once more, for all ranks.

        The dither does not depend on the rank, so neither does the result.

        Args:
            received: a row for each rank, with the words of these tiles.
            means: written to; the means of the bucket from ``begin`` on.
            numels, norm_starts, tensor_ids: of all tensors of the bucket.
            runs: the tiles; see ``hvd_gqsgd.layout.runs``.
        """
        ops.requantize_each(
            received, norms, means, numels, norm_starts, runs, begin, self.block_size, *self.code,
            self.seed, step, tensor_ids,
        )  # fmt: skip

    def decode_means(
        self, means: Tensor, norms: Tensor, outs: Sequence[Tensor], norm_starts: Sequence[int],
        runs: Sequence[int], scale: float,
    ) -> None:  # fmt: skip
        """Writes ``scale`` times the mean over the ranks to some tiles of ``outs``, which are
        tensors of the bucket whose norms begin at ``norm_starts``."""
        ops.dequantize_means_each(
            means, norms, outs, norm_starts, runs, self.block_size, *self.code, scale
        )  # fmt: skip
