"""Where everything lies in a message: tiles, words and means, as offsets.

A block of consecutive elements shares a norm, and is cut in *tiles* of at most 1024 elements.
``native/core/lanes.h`` has the layout of the lanes within a tile's words.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

__all__ = [
    "FLAG",
    "TILE",
    "BlockSegments",
    "Layout",
    "Part",
    "Segments",
    "Shard",
    "block_segments",
    "columns_of_blocks",
    "lay_out",
    "means_before",
    "means_dtype",
    "norm_dtype",
    "part_identity",
    "runs",
    "shards",
    "tiles_for",
    "word_dtype",
    "words_before",
    "words_for",
]

TILE = 1024
"""Elements that are packed together: ``kTile`` of ``native/core/lanes.h``."""

_FIRST_TILE_SHIFT = 31  # kFirstTileShift of native/core/hash.h

FLAG = 1
"""Elements before the means of each rank: whether it took part."""


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


# --- buckets: concatenated tensors, and the part that each rank averages -------------------------


class Part(NamedTuple):
    """A run of tiles of one tensor that one rank averages."""

    tensor: int
    tiles: tuple[int, int]
    words: slice
    """In the words that each rank sends to this one."""
    means: slice
    """In the concatenated means of all ranks."""


class Segments(NamedTuple):
    """The division of a bucket among the ranks."""

    words: tuple[int, ...]
    """Words sent to each rank."""
    means: tuple[int, ...]
    """Offset of the flag and the means of each rank, and at last their end."""
    of_rank: tuple[tuple[Part, ...], ...]
    of_tensor: tuple[tuple[Part, ...], ...]


def runs(parts: Iterable[tuple[int, Part]]) -> list[int]:
    """Parts as native operators take them: four numbers each, of which the first, given here, is
    that of the tensor in the call."""
    return [number for tensor, part in parts for number in (tensor, *part.tiles, part.means.start)]


class Layout(NamedTuple):
    """Offsets of a bucket's tensors in its messages, headers excluded."""

    tensors: tuple[tuple[int, int], ...]
    """Elements, and elements of a block, of each tensor."""
    bits: int
    norm_dtype: torch.dtype
    norms: tuple[slice, ...]
    """Norms of each tensor."""
    words: tuple[slice, ...]
    """Words of each tensor."""

    @property
    def num_norms(self) -> int:
        """Norms of all tensors."""
        return int(self.norms[-1].stop)

    @property
    def num_words(self) -> int:
        """Words of all tensors."""
        return int(self.words[-1].stop)

    @property
    def word_dtype(self) -> torch.dtype:
        """See the function ``word_dtype``."""
        return word_dtype(self.bits)

    @property
    def means_dtype(self) -> torch.dtype:
        """See the function ``means_dtype``."""
        return means_dtype(self.bits, self.norm_dtype)

    def segments(self, ranks: int) -> Segments:
        """The division among ``ranks`` ranks.

        The tiles of a bucket, counted through all of its tensors, are dealt out in runs that
        differ by one tile at most. With fewer tiles than ranks some ranks get none.
        """
        return _segments(self.tensors, self.bits, self.norm_dtype, ranks)


@functools.lru_cache(maxsize=256)  # the same buckets come step after step
def lay_out(tensors: tuple[tuple[int, int], ...], bits: int, norm_dtype: torch.dtype) -> Layout:
    """The layout of tensors with so many elements, and elements of a block."""
    norms = _slices(-(-numel // block) for numel, block in tensors)
    words = _slices(words_for(numel, block, bits) for numel, block in tensors)
    return Layout(tensors, bits, norm_dtype, norms, words)


def _slices(lengths: Iterable[int]) -> tuple[slice, ...]:
    ends = list(itertools.accumulate(lengths, initial=0))
    return tuple(slice(begin, end) for begin, end in itertools.pairwise(ends))


@functools.lru_cache(maxsize=256)
def _segments(
    tensors: tuple[tuple[int, int], ...], bits: int, norm_dtype: torch.dtype, ranks: int
) -> Segments:
    tiles = [tiles_for(numel, block) for numel, block in tensors]
    left = [(tensor, 0) for tensor, count in enumerate(tiles) if count][::-1]
    words, means = [], [0]
    of_rank: list[tuple[Part, ...]] = []
    of_tensor: list[list[Part]] = [[] for _ in tiles]
    for rank in range(ranks):
        wanted = sum(tiles) * (rank + 1) // ranks - sum(tiles) * rank // ranks
        parts, word, mean = [], 0, means[-1] + FLAG
        while wanted:
            tensor, first = left.pop()
            last = min(first + wanted, tiles[tensor])
            if last < tiles[tensor]:
                left.append((tensor, last))
            wanted -= last - first
            num_words, num_means = _lengths(*tensors[tensor], bits, norm_dtype, first, last)
            part = Part(
                tensor, (first, last),
                slice(word, word + num_words), slice(mean, mean + num_means),
            )  # fmt: skip
            parts.append(part)
            of_tensor[tensor].append(part)
            word, mean = part.words.stop, part.means.stop
        words.append(word)
        means.append(mean)
        of_rank.append(tuple(parts))
    return Segments(tuple(words), tuple(means), tuple(of_rank), tuple(map(tuple, of_tensor)))


def _lengths(
    numel: int, block: int, bits: int, norm_dtype: torch.dtype, first: int, last: int
) -> tuple[int, int]:
    """Words, and elements of means, of a run of tiles."""
    words = [words_before(tile, numel, block, bits) for tile in (first, last)]
    means = [means_before(tile, numel, block, bits, norm_dtype) for tile in (first, last)]
    return words[1] - words[0], means[1] - means[0]


# --- widths per block: every block a tile, and segments of so many words whatever the widths are --


Run = tuple[int, int, int, int]
"""Tensor, first block, the one after the last, and the rank that averages them."""


class BlockSegments(NamedTuple):
    """The division of a bucket of blocks of different widths among the ranks."""

    blocks: tuple[int, ...]
    """First block of each rank, counted through the bucket, and their number."""
    words: tuple[int, ...]
    """Offset of the words of each rank, and at last their end."""
    means: tuple[int, ...]
    """Offset of the flag, norms and words of each rank's means, and at last their end."""
    of_rank: tuple[tuple[Run, ...], ...]
    of_tensor: tuple[tuple[Run, ...], ...]


@functools.lru_cache(maxsize=256)
def block_segments(
    tensors: tuple[tuple[int, int], ...],
    words_for: Callable[[Sequence[int], int], int],
    norm_dtype: torch.dtype,
    ranks: int,
    summands: int = 1,
) -> BlockSegments:
    """The division among ``ranks`` ranks, in runs of blocks that differ by one block at most.

    Args:
        tensors: elements, and elements of a block, of each tensor.
        words_for: the 32-bit words for blocks of so many columns of 32 elements each, given the
            summands too.
        norm_dtype: of the norms, which words are padded to.
        ranks: the number of ranks.
        summands: codes whose sum a lane must hold.
    """
    columns = list(_columns(tensors))
    total, unit = len(columns), norm_dtype.itemsize // 4
    blocks = [total * rank // ranks for rank in range(ranks + 1)]
    words, means = [0], [0]
    for first, last in itertools.pairwise(blocks):
        units = -(-words_for(columns[first:last], summands) // unit)
        words.append(words[-1] + units * unit)
        means.append(means[-1] + FLAG + last - first + units)
    of_rank: list[list[Run]] = [[] for _ in range(ranks)]
    of_tensor: list[list[Run]] = [[] for _ in tensors]
    for run in _runs_of_blocks(tensors, blocks):
        of_rank[run[3]].append(run)
        of_tensor[run[0]].append(run)
    return BlockSegments(
        tuple(blocks), tuple(words), tuple(means),
        tuple(map(tuple, of_rank)), tuple(map(tuple, of_tensor)),
    )  # fmt: skip


def _runs_of_blocks(tensors: tuple[tuple[int, int], ...], blocks: Sequence[int]) -> Iterable[Run]:
    """The runs of a bucket's blocks, given the first block of each rank, and their number."""
    begin = rank = 0
    for tensor, (numel, block) in enumerate(tensors):
        end, at = begin + -(-numel // block), begin
        while at < end:
            while blocks[rank + 1] <= at:
                rank += 1
            last = min(end, blocks[rank + 1])
            yield tensor, at - begin, last - begin, rank
            at = last
        begin = end


def part_identity(identity: int, first: int, block_size: int | None) -> int:
    """The number of a part of a tensor for the dither, which is that of the whole tensor there.

    Args:
        identity: of the tensor, 31 bits.
        first: first element of the part, at the beginning of a block.
        block_size: elements of a block; None: the tensor is one, and has no other part.
    """
    tiles = first // block_size * -(-block_size // TILE) if block_size else 0
    return identity | tiles << _FIRST_TILE_SHIFT


class Shard(NamedTuple):
    """The part of a bucket that one rank of each node owns."""

    parts: tuple[tuple[int, int, int], ...]
    """Tensor, first element and the one after the last, of runs of whole blocks."""
    norms: slice
    """In the norms of the bucket."""

    @property
    def numel(self) -> int:
        """Elements of the shard."""
        return sum(last - first for _, first, last in self.parts)


@functools.lru_cache(maxsize=256)
def shards(tensors: tuple[tuple[int, int], ...], count: int) -> tuple[Shard, ...]:
    """The division of a bucket in ``count`` shards that differ by one block at most."""
    total = sum(-(-numel // block) for numel, block in tensors)
    blocks = [total * shard // count for shard in range(count + 1)]
    parts: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
    for tensor, first, last, shard in _runs_of_blocks(tensors, blocks):
        numel, block = tensors[tensor]
        parts[shard].append((tensor, first * block, min(last * block, numel)))
    return tuple(
        Shard(tuple(each), slice(*ends))
        for each, ends in zip(parts, itertools.pairwise(blocks), strict=True)
    )


@functools.lru_cache(maxsize=256)
def columns_of_blocks(tensors: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """The columns of 32 elements that each block has, padded: ``uint8``."""
    return torch.tensor(list(_columns(tensors)), dtype=torch.uint8, device=device)


def _columns(tensors: tuple[tuple[int, int], ...]) -> Iterable[int]:
    for numel, block in tensors:
        yield from itertools.repeat(-(-block // 32), numel // block)
        if numel % block:
            yield -(-(numel % block) // 32)
