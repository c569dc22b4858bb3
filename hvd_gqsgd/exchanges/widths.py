"""The messages of a two-phase exchange: codes of one width, or of a width for each block."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.codecs import Codec
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.options import Options

__all__ = ["BlockWidths", "OneWidth", "Widths", "widths_of"]


class Widths(ABC):
    """The layout of a bucket's messages, the same on all ranks, and the way to and from them."""

    words: Sequence[int]
    """Words sent to each rank."""
    word_dtype: torch.dtype
    means: Sequence[int]
    """Offset of the flag and the means of each rank, and at last their end."""
    means_dtype: torch.dtype

    @property
    def means_of_ranks(self) -> list[int]:
        """Elements of each rank's means."""
        return [end - begin for begin, end in itertools.pairwise(self.means)]

    @abstractmethod
    def encode(self, bucket: Bucket, norms: Tensor, words: Tensor, step: int) -> None:
        """Writes the codes of all tensors to ``words``, given the global ``norms``."""

    @abstractmethod
    def average(
        self, bucket: Bucket, norms: Tensor, received: Tensor, own: Tensor, step: int
    ) -> None:
        """Writes the means of this rank's part after the flag in ``own``.

        Args:
            received: the words of that part, from all ranks.
        """

    @abstractmethod
    def decode(
        self, means: Tensor, norms: Tensor, items: Sequence[Item], outs: Sequence[Tensor],
        scale: float,
    ) -> None:  # fmt: skip
        """Writes ``scale`` times the mean of some tensors to ``outs``."""

    @abstractmethod
    def sum(self, received: Tensor, norms: Tensor, place: int, out: Tensor, scale: float) -> None:
        """Writes ``scale`` times the sum over the ranks to ``out``, of a tensor that is wholly in
        this rank's part.

        Args:
            received: the words of that part, a row for each rank.
            place: of the tensor in the bucket.
        """


class OneWidth(Widths):
    """Codes of the width of a codec."""

    def __init__(self, codec: Codec, layout: layout.Layout) -> None:
        self._codec = codec
        self._layout = layout
        self._segments = layout.segments(codec.world_size)
        self.words, self.word_dtype = self._segments.words, layout.word_dtype
        self.means, self.means_dtype = self._segments.means, layout.means_dtype

    def encode(self, bucket: Bucket, norms: Tensor, words: Tensor, step: int) -> None:
        """See :class:`Widths`."""
        self._codec.encode(bucket.tensors, norms, words, step, bucket.identities)

    def average(
        self, bucket: Bucket, norms: Tensor, received: Tensor, own: Tensor, step: int
    ) -> None:
        """See :class:`Widths`."""
        rank, segments = self._codec.rank, self._segments
        self._codec.requantize(
            received.view(self._codec.world_size, segments.words[rank]), norms, own,
            [item.numel for item in bucket.items], [place.start for place in self._layout.norms],
            layout.runs((part.tensor, part) for part in segments.of_rank[rank]),
            segments.means[rank], step, bucket.identities,
        )  # fmt: skip

    def decode(
        self, means: Tensor, norms: Tensor, items: Sequence[Item], outs: Sequence[Tensor],
        scale: float,
    ) -> None:  # fmt: skip
        """See :class:`Widths`."""
        starts = [self._layout.norms[item.place].start for item in items]
        parts = (
            (i, part)
            for i, item in enumerate(items)
            for part in self._segments.of_tensor[item.place]
        )
        self._codec.decode_means(means, norms, outs, starts, layout.runs(parts), scale)

    def sum(self, received: Tensor, norms: Tensor, place: int, out: Tensor, scale: float) -> None:
        """See :class:`Widths`."""
        words, before = self._layout.words[place], sum(self.words[: self._codec.rank])
        part = received[:, words.start - before : words.stop - before]
        self._codec.sum(part, norms[self._layout.norms[place]], out, scale)


class BlockWidths(Widths):
    """Codes of the widths that follow from the global norms, in messages of the budget's size.

    Args:
        bits: the budget and the rule.
        codec: of this rank, for its dither.
        layout: of the bucket.
        plan: memory for the widths, of ``2 * blocks + 1`` elements.
    """

    word_dtype = torch.int32

    def __init__(self, bits: BlockBits, codec: Codec, place: layout.Layout, plan: Tensor) -> None:
        self._bits, self._codec, self._layout, self._plan = bits, codec, place, plan
        self._segments = layout.block_segments(
            place.tensors, bits.words_for, place.norm_dtype, codec.world_size
        )
        edges = self._segments.words
        self.words = [end - begin for begin, end in itertools.pairwise(edges)]
        self.means, self.means_dtype = self._segments.means, place.norm_dtype

    def encode(self, bucket: Bucket, norms: Tensor, words: Tensor, step: int) -> None:
        """See :class:`Widths`."""
        segments, codec = self._segments, self._codec
        columns = layout.columns_of_blocks(self._layout.tensors, bucket.device)
        ops.block_widths(
            norms, columns, segments.blocks, segments.words, *self._bits.rule, self._plan
        )
        ops.quantize_blocks(
            bucket.tensors, norms, self._plan, words, segments.blocks, segments.words,
            self._bits.block_size, codec.seed, step, bucket.identities, codec.rank,
            codec.world_size, codec.correlated,
        )  # fmt: skip

    def average(
        self, bucket: Bucket, norms: Tensor, received: Tensor, own: Tensor, step: int
    ) -> None:
        """See :class:`Widths`."""
        segments, codec = self._segments, self._codec
        ops.requantize_blocks(
            received.view(codec.world_size, self.words[codec.rank]), norms, self._plan, own,
            [item.numel for item in bucket.items], [place.start for place in self._layout.norms],
            [number for run in segments.of_rank[codec.rank] for number in run],
            segments.blocks, segments.words, codec.rank, self._bits.block_size,
            codec.seed, step, bucket.identities,
        )  # fmt: skip

    def decode(
        self, means: Tensor, norms: Tensor, items: Sequence[Item], outs: Sequence[Tensor],
        scale: float,
    ) -> None:  # fmt: skip
        """See :class:`Widths`."""
        segments = self._segments
        starts = [self._layout.norms[item.place].start for item in items]
        runs = [
            number
            for i, item in enumerate(items)
            for _, first, last, rank in segments.of_tensor[item.place]
            for number in (i, first, last, rank)
        ]
        ops.dequantize_blocks(
            means, norms, self._plan, outs, starts, runs, segments.blocks, segments.words,
            self._bits.block_size, scale,
        )  # fmt: skip

    def sum(self, received: Tensor, norms: Tensor, place: int, out: Tensor, scale: float) -> None:
        """See :class:`Widths`."""
        segments = self._segments
        ops.sum_blocks(
            received, norms, self._plan, out, self._layout.norms[place].start, segments.blocks,
            segments.words, self._codec.rank, self._bits.block_size, scale,
        )  # fmt: skip


def widths_of(
    options: Options, codec: Codec, layout: layout.Layout,
    take: Callable[[int, torch.dtype, torch.device], Tensor], device: torch.device,
) -> Widths:  # fmt: skip
    """The widths that the options ask for, with memory from ``take``."""
    if not isinstance(options.bits, BlockBits):
        return OneWidth(codec, layout)
    plan = take(2 * layout.num_norms + 1, torch.int32, device)
    return BlockWidths(options.bits, codec, layout, plan)
