"""An all-gather of codes: every rank gets the tensors of all ranks, each rounded once by its owner.

Nothing is added up, so norms are those of the owner's own tensor, and travel with its codes: one
message. All ranks decode the same bytes, the owner too, so all have the same bits.

Tensors of integers are not rounded. To gather floats unrounded, view them as integers.

A rank encodes before the first collective, so that an agreement ahead of it tells of an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd.bucket import Bucket, Item, kind_of
from hvd_gqsgd.codecs import Codec, is_compressible
from hvd_gqsgd.exchanges.base import Exchange, Running, Terms
from hvd_gqsgd.exchanges.collectives import Allgather
from hvd_gqsgd.exchanges.contribution import Contribution, everyone

__all__ = ["GatherExchange"]

_UNIT = torch.int64
"""Type of a message, all parts of which begin at a multiple of 8 bytes."""


class GatherExchange(Exchange):
    """An Allgather of norms, codes, and tensors that are not rounded.

    A tensor is decoded to memory of shape (ranks, elements), with contiguous rows.
    """

    messages = ("shards",)
    counted = 2

    @property
    def summands(self) -> int:
        """A lane holds one rank's code."""
        return 1

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        codec = self.codec(terms.bits)
        place = _Places(bucket, codec)
        message = self._take(place.length, _UNIT, bucket.device)
        with terms.attempt():
            place.encode(message, terms.step)
        received = yield Allgather("shards", message, [place.length] * self.size)
        terms.raise_failure()
        return _Gathered(everyone(self.size), place, received)


class _Places:
    """A message of one rank: where everything lies in it, in elements of ``_UNIT``."""

    def __init__(self, bucket: Bucket, codec: Codec) -> None:
        self._codec = codec
        self._coded = [item for item in bucket.items if is_compressible(item.dtype)]
        self._layout: layout.Layout | None = None
        self._words = self.length = 0
        if self._coded:
            norm_dtype, _ = kind_of(self._coded[0].dtype, bucket.device)
            blocks = tuple((item.numel, codec.block(item.numel)) for item in self._coded)
            self._layout = layout.lay_out(blocks, codec.bits, norm_dtype)
            self._words = _units(self._layout.num_norms, norm_dtype)
            self.length = self._words + _units(self._layout.num_words, codec.word_dtype)
        self._numbers = {item.place: number for number, item in enumerate(self._coded)}
        self._kept: dict[int, int] = {}
        for item in bucket.items:
            if item.place not in self._numbers:
                self._kept[item.place] = self.length
                self.length += _units(item.numel, item.dtype)
        self._items = bucket.items

    def encode(self, message: Tensor, step: int) -> None:
        """Writes this rank's message."""
        if self._layout is not None:
            norms = message.view(self._layout.norm_dtype)[: self._layout.num_norms]
            words = message[self._words :].view(self._codec.word_dtype)[: self._layout.num_words]
            tensors = [item.x for item in self._coded]
            self._codec.norms(tensors, norms)
            ids = [item.identity for item in self._coded]
            self._codec.encode(tensors, norms, words, step, ids)
        for item in self._items:
            if item.place in self._kept:
                message[self._kept[item.place] :].view(item.dtype)[: item.numel] = item.x

    def decode(self, received: Tensor, item: Item, out: Tensor) -> None:
        """Writes a tensor's row of each rank to ``out``, given the messages of all ranks."""
        if item.place in self._kept:
            rows = received.view(len(out), self.length)[:, self._kept[item.place] :]
            out.copy_(rows.view(item.dtype)[:, : item.numel])
            return
        assert self._layout is not None
        number, ranks = self._numbers[item.place], len(out)
        norms, words = received.view(self._layout.norm_dtype), received.view(self._codec.word_dtype)
        self._codec.decode(
            words, norms, list(out),
            [*self._starts(words.dtype, self._words, self._layout.words[number].start, ranks)],
            [*self._starts(norms.dtype, 0, self._layout.norms[number].start, ranks)],
            contributors=1, scale=1.0,
        )  # fmt: skip

    def _starts(self, dtype: torch.dtype, begin: int, start: int, ranks: int) -> Iterator[int]:
        """Of an element in the messages of all ranks, in elements of its type."""
        per_unit = _UNIT.itemsize // dtype.itemsize
        return ((rank * self.length + begin) * per_unit + start for rank in range(ranks))


def _units(numel: int, dtype: torch.dtype) -> int:
    return -(-numel * dtype.itemsize // _UNIT.itemsize)


@dataclass(frozen=True)
class _Gathered:
    contribution: Contribution
    place: _Places
    received: Tensor

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        """The scale is 1: nothing is added up."""
        for item, out in zip(items, outs, strict=True):
            self.place.decode(self.received, item, out)
