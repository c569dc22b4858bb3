"""Codecs in plain torch, for research: a subclass has two functions of an element.

This module implements tiles, words, norms and dither. Encoding takes about 60 ns per element, 200
times as long as native code. ``hvd_gqsgd/docs/RESEARCH.md`` adds such a codec.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hvd_gqsgd import layout
from hvd_gqsgd.codecs.base import Codec

__all__ = ["PlainCodec"]

_REQUANTIZE = 2**63  # the stream of the second rounding; streams of ranks are smaller


class PlainCodec(Codec):
    """Codes from 0 to ``2**bits - 1``, in lanes that cannot be added.

    An element is a *share* of the norm of its block, from -1 to 1.
    """

    widths = (2, 4, 8, 16)
    added = False

    @abstractmethod
    def round(self, shares: Tensor, dither: Tensor) -> Tensor:
        """Returns the codes of shares, as int64; ``dither`` is uniform on [0, 1)."""

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """Returns the shares that codes represent; the same on all ranks."""

    @classmethod
    def levels_for(cls, bits: int, summands: int) -> int:
        """Levels on each side of zero, for any number of summands, as codes are not added."""
        return (1 << bits - 1) - 1

    def encode(
        self, xs: Sequence[Tensor], norms: Tensor, words: Tensor, step: int,
        tensor_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """See :class:`Codec`."""
        at = norm_at = 0
        for x, tensor_id in zip(xs, tensor_ids, strict=True):
            tiles = self._tiles(x.numel(), norms)
            stream = 0 if self.correlated else 1 + self.rank
            dither = _dither(tiles, self.seed, step, tensor_id, stream)
            if self.correlated:
                dither = (dither + self.rank / self.world_size) % 1
            norm = _floats(norms[norm_at + tiles.norms])
            codes = self.round(_shares(_spread(x.view(-1).to(norm), tiles.elements), norm), dither)
            words[at : at + tiles.num_words] = self._pack(codes).masked_select(tiles.words)
            at += tiles.num_words
            norm_at += self.num_norms(x.numel())

    def decode(
        self, words: Tensor, norms: Tensor, outs: Sequence[Tensor], word_starts: Sequence[int],
        norm_starts: Sequence[int], contributors: int, scale: float,
    ) -> None:  # fmt: skip
        """See :class:`Codec`."""
        raise ValueError(f"codes of {type(self).__name__} cannot be added")

    def sum(self, received: Tensor, norms: Tensor, out: Tensor, scale: float) -> None:
        """See :class:`Codec`."""
        tiles = self._tiles(out.numel(), norms)
        sums = self._sum(received[:, : tiles.num_words], _floats(norms[tiles.norms]), tiles)
        out.view(-1).copy_(sums.masked_select(tiles.elements).mul_(scale))

    def requantize(
        self, received: Tensor, norms: Tensor, means: Tensor, numels: Sequence[int],
        norm_starts: Sequence[int], runs: Sequence[int], begin: int, step: int,
        tensor_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """See :class:`Codec`."""
        at = 0
        for tensor, first, last, start in _runs(runs):
            tiles = self._tiles(numels[tensor], norms, first, last)
            norm = _floats(norms[norm_starts[tensor] + tiles.norms])
            rows = received[:, at : at + tiles.num_words]
            at += tiles.num_words
            mean = self._sum(rows, norm, tiles) / len(rows)
            own = mean.abs().amax(1, keepdim=True)
            dither = _dither(tiles, self.seed, step, tensor_ids[tensor], _REQUANTIZE, first)
            words = self._pack(self.round(_shares(mean, own), dither))
            odd = words.shape[1] * words.itemsize % means.itemsize  # half a unit, or nothing
            units = pad(words, (0, 1 if odd else 0)).view(means.dtype)
            message = torch.cat([own.view(norms.dtype).to(means.dtype), units], dim=1)
            means[start - begin : start - begin + tiles.num_means] = message.masked_select(
                tiles.means
            )

    def decode_means(
        self, means: Tensor, norms: Tensor, outs: Sequence[Tensor], norm_starts: Sequence[int],
        runs: Sequence[int], scale: float,
    ) -> None:  # fmt: skip
        """See :class:`Codec`."""
        for tensor, first, last, start in _runs(runs):
            out = outs[tensor].view(-1)
            tiles = self._tiles(out.numel(), norms, first, last)
            message = _spread(means[start : start + tiles.num_means], tiles.means)
            own = _floats(message[:, :1].to(norms.dtype))
            words = message[:, 1:].contiguous().view(self.word_dtype)[:, : tiles.words.shape[1]]
            mean = _decoded(self.values(self._unpack(words)), own) * scale
            out[tiles.begin : tiles.end] = mean.masked_select(tiles.elements).to(out.dtype)

    def _tiles(self, numel: int, norms: Tensor, first: int = 0, last: int | None = None) -> _Tiles:
        """Tiles ``first`` to ``last`` (excluded) of a tensor; all of them by default."""
        return _tiles(numel, self.block(numel), self.bits, norms.dtype, norms.device, first, last)

    def _sum(self, rows: Tensor, norm: Tensor, tiles: _Tiles) -> Tensor:
        """The sum of the tiles of all ranks; each row has the words of a rank."""
        shares = [self.values(self._unpack(_spread(row, tiles.words))) for row in rows]
        return _decoded(torch.stack(shares).sum(0), norm).masked_fill_(~tiles.elements, 0)

    @property
    def _lanes(self) -> int:
        return 8 * self.word_dtype.itemsize // self.bits

    def _pack(self, codes: Tensor) -> Tensor:
        lanes: Tensor = codes.unflatten(1, (-1, self._lanes))
        return (lanes << self._shifts(codes)).sum(-1).to(self.word_dtype)

    def _unpack(self, words: Tensor) -> Tensor:
        lanes = words.long()[..., None] >> self._shifts(words) & (1 << self.bits) - 1
        return lanes.flatten(1)

    def _shifts(self, like: Tensor) -> Tensor:
        return self.bits * torch.arange(self._lanes, dtype=torch.int64, device=like.device)


class _Tiles(NamedTuple):
    """A run of tiles of a tensor: masks of matrices with a row per tile."""

    begin: int
    """First element."""
    end: int
    """Element after the last one."""
    num_words: int
    num_means: int
    norms: Tensor
    """Number of the norm of each tile, in a column."""
    elements: Tensor
    words: Tensor
    means: Tensor
    """A norm and the words, in elements of the type of means."""


@functools.lru_cache(maxsize=256)  # the same tensors are exchanged in each step
def _tiles(
    numel: int, block: int, bits: int, norm_dtype: torch.dtype, device: torch.device,
    first: int, last: int | None,
) -> _Tiles:  # fmt: skip
    word, unit = layout.word_dtype(bits).itemsize, layout.means_dtype(bits, norm_dtype).itemsize
    lanes, per_block = 8 * word // bits, -(-block // layout.TILE)
    number = torch.arange(layout.tiles_for(numel, block), dtype=torch.int64, device="cpu")[
        first:last
    ]
    begin = number // per_block * block + number % per_block * layout.TILE
    end = (begin + layout.TILE).clamp(max=(number // per_block + 1) * block).clamp(max=numel)
    words = -((begin - end) // lanes)
    means = 1 - (-words * word // unit)
    most = -(-min(layout.TILE, block) // lanes)

    def mask(lengths: Tensor, columns: int) -> Tensor:
        return (torch.arange(columns, dtype=torch.int64, device="cpu") < lengths[:, None]).to(
            device
        )

    return _Tiles(
        int(begin[0]) if len(begin) else 0, int(end[-1]) if len(end) else 0,
        int(words.sum()), int(means.sum()), (number // per_block)[:, None].to(device),
        mask(end - begin, most * lanes), mask(words, most), mask(means, 1 - (-most * word // unit)),
    )  # fmt: skip


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """The runs of ``layout.runs``."""
    return zip(*[iter(numbers)] * 4, strict=True)


def _spread(flat: Tensor, mask: Tensor) -> Tensor:
    """A matrix with the elements where the mask is True, and 0 elsewhere."""
    return flat.new_zeros(mask.shape).masked_scatter_(mask, flat)


def _floats(norms: Tensor) -> Tensor:
    return norms.view(torch.float64 if norms.dtype == torch.int64 else torch.float32)


def _shares(rows: Tensor, norm: Tensor) -> Tensor:
    """Elements as shares of their norm; 0 where the norm is 0 or not finite."""
    usable = norm.isfinite() & (norm > 0)
    return torch.where(usable, (rows / torch.where(usable, norm, 1)).clamp(-1, 1), 0)


def _decoded(shares: Tensor, norm: Tensor) -> Tensor:
    """Elements of shares; NaN where the norm is not finite."""
    return torch.where(norm.isfinite(), shares * norm, torch.nan)


def _dither(
    tiles: _Tiles, seed: int, step: int, tensor_id: int, stream: int, first: int = 0
) -> Tensor:
    """Uniform numbers from [0, 1) for each tile, independent of the other tiles of the call.

    ``tensor_id`` is the tensor's number, and above 31 bits its first tile; see
    ``hvd_gqsgd.layout.part_identity``.
    """
    before, number = divmod(tensor_id, 2**31)
    rows, columns = tiles.elements.shape
    numbers = np.empty((rows, columns), np.float32)
    for row in range(rows):
        key = [seed % 2**64, step, number, stream, before + first + row]
        numbers[row] = np.random.default_rng(key).random(columns, dtype=np.float32)
    return torch.from_numpy(numbers).to(tiles.elements.device)
