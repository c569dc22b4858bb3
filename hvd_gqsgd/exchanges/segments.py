"""Which rank averages what in a two-phase exchange.

The tiles of a bucket, counted through all of its tensors, are dealt out to the ranks in runs that
differ by one tile at most. With fewer tiles than ranks some ranks get none.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from hvd_gqsgd import ops

__all__ = ["Geometry", "Part", "Segments", "TensorSegments"]


class Geometry(NamedTuple):
    """What the places in a bucket's messages follow from."""

    tensors: tuple[tuple[int, int], ...]
    """Elements, and elements of a block, of each tensor."""
    bits: int
    norm_dtype: torch.dtype


class TensorSegments(NamedTuple):
    """What comes before each tensor of a bucket, and behind the last one."""

    tiles: tuple[int, ...]
    words: tuple[int, ...]
    means: tuple[int, ...]


class Part(NamedTuple):
    """A run of tiles of one tensor, and where its words and means lie in its owner's segment."""

    tensor: int
    tiles: tuple[int, int]
    words: slice
    means: slice


class Segments(NamedTuple):
    """The runs of all ranks, and the parts that one of them consists of."""

    words: tuple[int, ...]
    """Words of each rank's run."""
    means: int
    """Elements that the means of this rank's run take."""
    parts: tuple[Part, ...]

    @staticmethod
    @functools.lru_cache(maxsize=256)  # the same buckets come step after step
    def of(geometry: Geometry, ranks: int, rank: int) -> Segments:
        """How ``ranks`` ranks share a bucket, and what falls to ``rank``."""
        starts = tensor_segments(geometry)
        cuts = [starts.tiles[-1] * r // ranks for r in range(ranks + 1)]
        words = _words_before(geometry, tuple(cuts))
        begin, end = cuts[rank], cuts[rank + 1]
        parts, word, mean = [], 0, 0
        for i, (numel, block) in enumerate(geometry.tensors):
            first = max(begin - starts.tiles[i], 0)
            last = min(end, starts.tiles[i + 1]) - starts.tiles[i]
            if first >= last:
                continue
            bits, norm_dtype = geometry.bits, geometry.norm_dtype
            num_words = ops.words_before(last, numel, block, bits) - ops.words_before(
                first, numel, block, bits
            )
            num_means = ops.means_before(last, numel, block, bits, norm_dtype) - ops.means_before(
                first, numel, block, bits, norm_dtype
            )
            parts.append(
                Part(i, (first, last), slice(word, word + num_words), slice(mean, mean + num_means))
            )
            word, mean = word + num_words, mean + num_means
        lengths = tuple(after - before for before, after in itertools.pairwise(words))
        return Segments(lengths, mean, tuple(parts))


@functools.lru_cache(maxsize=256)
def tensor_segments(geometry: Geometry) -> TensorSegments:
    """Where each tensor begins in a bucket."""
    tiles, words, means = [0], [0], [0]
    for numel, block in geometry.tensors:
        count = ops.tiles_for(numel, block)
        tiles.append(tiles[-1] + count)
        words.append(words[-1] + ops.words_before(count, numel, block, geometry.bits))
        means.append(
            means[-1] + ops.means_before(count, numel, block, geometry.bits, geometry.norm_dtype)
        )
    return TensorSegments(tuple(tiles), tuple(words), tuple(means))


@functools.lru_cache(maxsize=256)
def _words_before(geometry: Geometry, cuts: tuple[int, ...]) -> tuple[int, ...]:
    """Words before each of some tiles, which are in order."""
    starts, tensor, words = tensor_segments(geometry), 0, []
    for cut in cuts:
        while tensor + 1 < len(geometry.tensors) and starts.tiles[tensor + 1] <= cut:
            tensor += 1
        numel, block = geometry.tensors[tensor]
        inside = cut - starts.tiles[tensor]
        words.append(starts.words[tensor] + ops.words_before(inside, numel, block, geometry.bits))
    return tuple(words)
