"""Which rank averages what in a two-phase exchange, and where it lies in the messages.

The tiles of a bucket, counted through all of its tensors, are dealt out to the ranks in runs that
differ by one tile at most. With fewer tiles than ranks some ranks get none.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from hvd_gqsgd import layout

__all__ = ["FLAG", "Geometry", "Part", "Segments"]

FLAG = 1
"""Elements before the means of each rank: whether it took part."""


class Geometry(NamedTuple):
    """What the places in a bucket's messages follow from."""

    tensors: tuple[tuple[int, int], ...]
    """Elements, and elements of a block, of each tensor."""
    bits: int
    norm_dtype: torch.dtype


class Part(NamedTuple):
    """A run of tiles of one tensor that one rank owns."""

    tensor: int
    tiles: tuple[int, int]
    words: slice
    """In what this rank is sent by each rank."""
    means: slice
    """In the means of all ranks, put end to end."""


class Segments(NamedTuple):
    """How ranks share a bucket."""

    words: tuple[int, ...]
    """Words that go to each rank."""
    means: tuple[int, ...]
    """Where the flag and the means of each rank begin, and where the last ones end."""
    of_rank: tuple[tuple[Part, ...], ...]
    of_tensor: tuple[tuple[Part, ...], ...]

    @staticmethod
    @functools.lru_cache(maxsize=256)  # the same buckets come step after step
    def of(geometry: Geometry, ranks: int) -> Segments:
        """Deals out the tiles."""
        tensors = geometry.tensors
        tiles = [layout.tiles_for(numel, block) for numel, block in tensors]
        left = [(tensor, 0) for tensor, count in enumerate(tiles) if count][::-1]
        words, means = [], [0]
        of_rank: list[tuple[Part, ...]] = []
        for rank in range(ranks):
            wanted = sum(tiles) * (rank + 1) // ranks - sum(tiles) * rank // ranks
            parts, word, mean = [], 0, means[-1] + FLAG
            while wanted:
                tensor, first = left.pop()
                last = min(first + wanted, tiles[tensor])
                if last < tiles[tensor]:
                    left.append((tensor, last))
                wanted -= last - first
                num_words, num_means = _lengths(geometry, tensor, first, last)
                part = Part(
                    tensor, (first, last),
                    slice(word, word + num_words), slice(mean, mean + num_means),
                )  # fmt: skip
                parts.append(part)
                word, mean = part.words.stop, part.means.stop
            words.append(word)
            means.append(mean)
            of_rank.append(tuple(parts))
        every = [part for parts in of_rank for part in parts]
        of_tensor: list[list[Part]] = [[] for _ in tensors]
        for part in every:
            of_tensor[part.tensor].append(part)
        return Segments(tuple(words), tuple(means), tuple(of_rank), tuple(map(tuple, of_tensor)))


def _lengths(geometry: Geometry, tensor: int, first: int, last: int) -> tuple[int, int]:
    """Words, and elements of means, of a run of tiles."""
    (numel, block), bits, norm_dtype = geometry.tensors[tensor], geometry.bits, geometry.norm_dtype
    words = [layout.words_before(tile, numel, block, bits) for tile in (first, last)]
    means = [layout.means_before(tile, numel, block, bits, norm_dtype) for tile in (first, last)]
    return words[1] - words[0], means[1] - means[0]
