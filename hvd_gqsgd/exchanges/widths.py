"""The messages of codes: of one width, or of a width for each block."""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.codecs import Codec, CodeKind
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.options import Options

__all__ = ["BlockWidths", "OneWidth", "Widths", "widths_of"]


class Widths(ABC):
    """The layout of a bucket's messages, the same on all ranks, and the way to and from them."""

    num_words: int
    """Words of all codes."""
    word_dtype: torch.dtype
    means_dtype: torch.dtype

    @property
    @abstractmethod
    def words(self) -> Sequence[int]:
        """Words sent to each rank, in two phases or in one."""

    @property
    @abstractmethod
    def means(self) -> Sequence[int]:
        """Offset of the flag and the means of each rank, and at last their end."""

    @property
    def means_of_ranks(self) -> list[int]:
        """Elements of each rank's means."""
        return [end - begin for begin, end in itertools.pairwise(self.means)]

    def settle(self, norms: Tensor) -> None:
        """Takes over the global norms, before anything is decoded; ``encode`` does so too."""
        del norms  # one width does not depend on them

    @abstractmethod
    def encode(self, bucket: Bucket, norms: Tensor, words: Tensor, step: int) -> None:
        """Writes the codes of all tensors to ``words``, given the global ``norms``."""

    @abstractmethod
    def decode_sum(
        self, words: Tensor, norms: Tensor, items: Sequence[Item], outs: Sequence[Tensor],
        contributors: int, scale: float,
    ) -> None:  # fmt: skip
        """Writes ``scale`` times the sum over ``contributors`` ranks to ``outs``, for some tensors,
        given the sum of their words."""

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

    def __init__(self, codec: Codec, place: layout.Layout) -> None:
        self._codec = codec
        self._layout = place
        self.num_words, self.word_dtype = place.num_words, place.word_dtype
        self.means_dtype = place.means_dtype

    @functools.cached_property
    def _segments(self) -> layout.Segments:
        return self._layout.segments(self._codec.world_size)

    @property
    def words(self) -> Sequence[int]:
        """See :class:`Widths`."""
        return self._segments.words

    @property
    def means(self) -> Sequence[int]:
        """See :class:`Widths`."""
        return self._segments.means

    def encode(self, bucket: Bucket, norms: Tensor, words: Tensor, step: int) -> None:
        """See :class:`Widths`."""
        self._codec.encode(bucket.tensors, norms, words, step, bucket.identities)

    def decode_sum(
        self, words: Tensor, norms: Tensor, items: Sequence[Item], outs: Sequence[Tensor],
        contributors: int, scale: float,
    ) -> None:  # fmt: skip
        """See :class:`Widths`."""
        word_starts = [self._layout.words[item.place].start for item in items]
        norm_starts = [self._layout.norms[item.place].start for item in items]
        self._codec.decode(words, norms, outs, word_starts, norm_starts, contributors, scale)

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
        place: layout of the bucket.
        plan: memory for the widths, of ``2 * blocks + 1`` elements.
        summands: codes whose sum a lane must hold. Those that are added have a budget in common;
            else each rank's segment has one of its own.
    """

    def __init__(
        self, bits: BlockBits, codec: Codec, place: layout.Layout, plan: Tensor, summands: int
    ) -> None:
        self._codec, self._layout, self._plan = codec, place, plan
        self._rule, self._block, self._summands = bits.rule(summands), bits.block_size, summands
        added = summands > 1
        self._segments = layout.block_segments(
            place.tensors, bits.words_for, place.norm_dtype, 1 if added else codec.world_size,
            summands,
        )  # fmt: skip
        self.word_dtype = torch.int64 if added else torch.int32
        self.num_words = self._segments.words[-1] * 4 // self.word_dtype.itemsize
        self.means_dtype = place.norm_dtype

    @property
    def words(self) -> Sequence[int]:
        """See :class:`Widths`."""
        return [end - begin for begin, end in itertools.pairwise(self._segments.words)]

    @property
    def means(self) -> Sequence[int]:
        """See :class:`Widths`."""
        return self._segments.means

    def settle(self, norms: Tensor) -> None:
        """See :class:`Widths`."""
        segments = self._segments
        columns = layout.columns_of_blocks(self._layout.tensors, norms.device)
        ops.block_widths(norms, columns, segments.blocks, segments.words, *self._rule, self._plan)

    def encode(self, bucket: Bucket, norms: Tensor, words: Tensor, step: int) -> None:
        """See :class:`Widths`."""
        segments, codec = self._segments, self._codec
        self.settle(norms)
        ops.quantize_blocks(
            bucket.tensors, norms, self._plan, words.view(torch.int32), segments.blocks,
            segments.words, self._block, self._summands, codec.seed, step, bucket.identities,
            codec.rank, codec.world_size, codec.correlated, codec.kind is CodeKind.NEAREST,
        )  # fmt: skip

    def decode_sum(
        self, words: Tensor, norms: Tensor, items: Sequence[Item], outs: Sequence[Tensor],
        contributors: int, scale: float,
    ) -> None:  # fmt: skip
        """See :class:`Widths`."""
        row = words.view(torch.int32)[None]
        for item, out in zip(items, outs, strict=True):
            self._sum(row, norms, item.place, out, scale, 0, contributors)

    def average(
        self, bucket: Bucket, norms: Tensor, received: Tensor, own: Tensor, step: int
    ) -> None:
        """See :class:`Widths`."""
        segments, codec = self._segments, self._codec
        ops.requantize_blocks(
            received.view(codec.world_size, self.words[codec.rank]), norms, self._plan, own,
            [item.numel for item in bucket.items], [place.start for place in self._layout.norms],
            [number for run in segments.of_rank[codec.rank] for number in run],
            segments.blocks, segments.words, codec.rank, self._block,
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
            self._block, scale,
        )  # fmt: skip

    def sum(self, received: Tensor, norms: Tensor, place: int, out: Tensor, scale: float) -> None:
        """See :class:`Widths`."""
        self._sum(received, norms, place, out, scale, self._codec.rank, 1)

    def _sum(
        self, rows: Tensor, norms: Tensor, place: int, out: Tensor, scale: float, segment: int,
        contributors: int,
    ) -> None:  # fmt: skip
        segments = self._segments
        ops.sum_blocks(
            rows, norms, self._plan, out, self._layout.norms[place].start, segments.blocks,
            segments.words, segment, self._block, self._summands, contributors, scale,
        )  # fmt: skip


def widths_of(
    options: Options, codec: Codec, place: layout.Layout,
    take: Callable[[int, torch.dtype, torch.device], Tensor], device: torch.device,
    summands: int = 1,
) -> Widths:  # fmt: skip
    """The widths that the options ask for, with memory from ``take``.

    Args:
        options: the same on all ranks.
        codec: of the width that the ranks have settled for the step.
        place: layout of the bucket.
        take: gives memory.
        device: of the bucket.
        summands: codes whose sum a lane must hold.
    """
    if not isinstance(options.bits, BlockBits):
        return OneWidth(codec, place)
    plan = take(2 * place.num_norms + 1, torch.int32, device)
    return BlockWidths(options.bits.at(codec.bits), codec, place, plan, summands)
