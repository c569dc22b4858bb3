"""Two phases that lose nothing: owners keep what the second rounding has left out.

The owner of a segment tells all ranks a rounded mean. With error feedback of the rounding, it keeps
the difference, and adds it to the mean of the next exchange, before that is rounded:

    told = C(mean + owed),    owed' = mean + owed - told

With estimates this is bidirectional EF21 (EF21-BC: Fatkhullin, Sokolov, Gorbunov, Li and Richtarik,
arXiv 2110.03294): the owner's C(mean of the ranks' own estimates - estimate that all ranks have).
With residuals it is DoubleSqueeze (Tang, Lian, Yu, Zhang and Liu, arXiv 1905.05957).

Segments depend on the tensors of a bucket, so an element may have another owner than before. The
former owner then adds the amount owed, times the number of ranks, to its own tensor before the
first rounding: the mean gets the amount by the codes of all ranks.

The second rounding is on norms of the owner's own means, which need no norms of all ranks, and
travel with the codes, a norm for each tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.codecs import Codec, make_codec
from hvd_gqsgd.exchanges.base import OwnResult, Running, Setup, Terms
from hvd_gqsgd.exchanges.contribution import Contribution
from hvd_gqsgd.exchanges.two_phase import Averaged, TwoPhaseExchange
from hvd_gqsgd.exchanges.widths import OneWidth, Widths
from hvd_gqsgd.options import digest

__all__ = ["OwingExchange"]

_UNIT = torch.int64
"""Type of a message of means, all parts of which begin at a multiple of 8 bytes."""


class OwingExchange(TwoPhaseExchange):
    """Two phases, with what owners owe as part of the tensors; for codes of one width."""

    owes = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.averaged = _Told
        self._second: dict[int, Codec] = {}

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        strays: list[Tensor | None] = [None] * len(bucket.items)
        with terms.attempt():
            if terms.takes_part:
                strays = self._strays(bucket, terms)
                for item, stray in zip(bucket.items, strays, strict=True):
                    if stray is not None:
                        item.x.add_(stray.mul_(self.size))
        result = yield from super().run(bucket, terms)
        assert isinstance(result, OwnResult)
        return _Paid(result, strays)

    def _strays(self, bucket: Bucket, terms: Terms) -> list[Tensor | None]:
        """The amounts owed of elements that this rank does not own in this exchange."""
        strays = [None if item.owed is None else item.owed.clone() for item in bucket.items]
        if terms.all_here:  # else codes are summed, and none owns anything
            place = bucket.layout(self.options.block_size, terms.bits)
            for piece in _pieces(*_key(place), self.size)[self.rank]:
                stray = strays[piece.tensor]
                if stray is not None:
                    stray[piece.elements] = 0
        return strays

    def _widths(self, bucket: Bucket, bits: int) -> Widths:
        return _OwingWidths(
            self.codec(bits), self._again(bits), bucket.layout(self.options.block_size, bits)
        )

    def _again(self, bits: int) -> Codec:
        """The codec of the second rounding: of an owner's means alone."""
        if bits not in self._second:
            block = min(self.options.block_size or layout.TILE, layout.TILE)
            own = digest(("again", self.options.seed))
            options = dataclasses.replace(self.options, block_size=block, seed=own)
            self._second[bits] = make_codec(options, bits, summands=1, rank=0, world_size=1)
        return self._second[bits]


class _Piece(NamedTuple):
    """Consecutive tiles of one tensor, of whole blocks or within one block, that a rank owns."""

    tensor: int
    first: int
    """Elements of as many whole tiles as come before it, which tells its dither from that of other
    pieces."""
    elements: slice
    norms: slice
    """Global norms, in those of the bucket."""
    block: int
    """Elements that share a global norm."""
    words: slice
    """In the words that each rank sends to this one."""


Tensors = tuple[tuple[int, int], ...]
"""As in ``layout.Layout``."""


@functools.lru_cache(maxsize=256)  # the same buckets come step after step
def _pieces(
    tensors: Tensors, bits: int, norm_dtype: torch.dtype, ranks: int
) -> tuple[tuple[_Piece, ...], ...]:
    """The pieces of each rank."""
    place = layout.lay_out(tensors, bits, norm_dtype)
    segments = place.segments(ranks)
    return tuple(
        tuple(piece for part in parts for piece in _pieces_of(place, part))
        for parts in segments.of_rank
    )


def _key(place: layout.Layout) -> tuple[Tensors, int, torch.dtype]:
    """A layout as the caches take it."""
    return place.tensors, place.bits, place.norm_dtype


def _pieces_of(place: layout.Layout, part: layout.Part) -> Iterator[_Piece]:
    numel, block = place.tensors[part.tensor]
    (first, last), each = part.tiles, -(-block // layout.TILE)
    begin = int(part.words.start) - layout.words_before(first, numel, block, place.bits)

    def element(tile: int) -> int:
        number, before = divmod(tile, each)
        return min(number * block + before * layout.TILE, numel)

    def word(tile: int) -> int:
        return begin + layout.words_before(tile, numel, block, place.bits)

    while first < last:
        # To the end of the block, or all whole blocks, or all that is left. Blocks that do not end
        # with a whole tile are pieces of their own, so that second norms are those of tiles.
        inside, whole = first % each, last - last % each
        if inside or (each > 1 and block % layout.TILE):
            end = min(last, first - inside + each)
        else:
            end = whole if whole > first else last
        elements = slice(element(first), element(end))
        norms = slice(
            place.norms[part.tensor].start + first // each,
            place.norms[part.tensor].start + -(-end // each),
        )
        within = norms.stop - norms.start == 1
        yield _Piece(
            part.tensor, first * layout.TILE, elements, norms,
            elements.stop - elements.start if within else block, slice(word(first), word(end)),
        )  # fmt: skip
        first = end


class _Place(NamedTuple):
    """The means of one rank in the message of all: a flag, norms and words."""

    start: int
    end: int
    own: layout.Layout | None
    """Of the pieces as tensors; None: the rank has none."""
    norms: int
    """Offset of the norms."""
    words: int
    """Offset of the words."""

    def norms_of(self, means: Tensor) -> Tensor:
        """The norms, from a message whose first element is ``start``."""
        assert self.own is not None
        return means[self.norms - self.start :].view(self.own.norm_dtype)[: self.own.num_norms]

    def words_of(self, means: Tensor) -> Tensor:
        """The words, likewise."""
        assert self.own is not None
        return means[self.words - self.start :].view(self.own.word_dtype)[: self.own.num_words]


@functools.lru_cache(maxsize=256)
def _places(
    tensors: Tensors, bits: int, norm_dtype: torch.dtype, ranks: int, block: int
) -> tuple[_Place, ...]:
    """The means of each rank, with a norm for each block of at most ``block`` elements."""
    found, at = [], 0
    for pieces in _pieces(tensors, bits, norm_dtype, ranks):
        start, norms = at, at + layout.FLAG
        own, words = None, norms
        if pieces:
            sizes = tuple((each.elements.stop - each.elements.start, block) for each in pieces)
            own = layout.lay_out(sizes, bits, norm_dtype)
            words = norms + _units(own.num_norms, own.norm_dtype)
        at = words + (_units(own.num_words, own.word_dtype) if own else 0)
        found.append(_Place(start, at, own, norms, words))
    return tuple(found)


def _units(count: int, dtype: torch.dtype) -> int:
    return -(-count * dtype.itemsize // _UNIT.itemsize)


class _OwingWidths(OneWidth):
    """The messages of one exchange.

    Args:
        codec: of the first rounding.
        again: of the second one.
        place: layout of the bucket.
    """

    def __init__(self, codec: Codec, again: Codec, place: layout.Layout) -> None:
        super().__init__(codec, place)
        self._again, self._block = again, again.block(1)
        self._pieces = _pieces(*_key(place), codec.world_size)
        self._places = _places(*_key(place), codec.world_size, self._block)
        self.means_dtype = _UNIT
        self.own: Tensor | None = None
        """The words of this rank."""
        self.owing: dict[int, Tensor] = {}
        """The amounts that this rank owes from now on, by the place of the tensor; known with the
        means."""

    @property
    def means(self) -> Sequence[int]:
        """See :class:`Widths`."""
        return [*(each.start for each in self._places), self._places[-1].end]

    def encode(self, bucket: Bucket, norms: Tensor, words: Tensor, step: int) -> None:
        """See :class:`Widths`."""
        super().encode(bucket, norms, words, step)
        self.own = words.clone()

    def average(
        self, bucket: Bucket, norms: Tensor, received: Tensor, own: Tensor, step: int
    ) -> None:
        """See :class:`Widths`."""
        codec, pieces, place = self._codec, self._pieces[self._codec.rank], self._places
        rows = received.view(codec.world_size, self.words[codec.rank])
        exact: list[Tensor] = []
        for piece in pieces:
            item = bucket.items[piece.tensor]
            total = torch.empty_like(item.x.view(-1)[piece.elements])
            ops.sum_codes(
                rows[:, piece.words], norms[piece.norms], total, piece.block, *codec.code,
                1 / codec.world_size,
            )  # fmt: skip
            if item.owed is not None:
                total += item.owed[piece.elements]
            exact.append(total)
        own[layout.FLAG :] = 0
        mine = place[codec.rank]
        if mine.own is not None:
            ids = [
                layout.part_identity(bucket.items[each.tensor].identity, each.first, layout.TILE)
                for each in pieces
            ]
            self._again.norms(exact, mine.norms_of(own))
            self._again.encode(exact, mine.norms_of(own), mine.words_of(own), step, ids)
        self.owing = {item.place: torch.zeros_like(item.x.view(-1)) for item in bucket.items}
        told = [torch.empty_like(each) for each in exact]
        self._decode_rank(codec.rank, own, range(len(pieces)), told, 1.0)
        for piece, mean, rounded in zip(pieces, exact, told, strict=True):
            self.owing[piece.tensor][piece.elements] = mean.sub_(rounded)

    def decode(
        self, means: Tensor, norms: Tensor, items: Sequence[Item], outs: Sequence[Tensor],
        scale: float,
    ) -> None:  # fmt: skip
        """See :class:`Widths`."""
        flat = {item.place: out.view(-1) for item, out in zip(items, outs, strict=True)}
        for rank, (pieces, place) in enumerate(zip(self._pieces, self._places, strict=True)):
            numbers = [i for i, piece in enumerate(pieces) if piece.tensor in flat]
            parts = [flat[pieces[i].tensor][pieces[i].elements] for i in numbers]
            self._decode_rank(rank, means[place.start : place.end], numbers, parts, scale)

    def _decode_rank(
        self, rank: int, means: Tensor, numbers: Sequence[int], outs: Sequence[Tensor],
        scale: float,
    ) -> None:  # fmt: skip
        """Writes ``scale`` times the means of some pieces of a rank, given its message."""
        place = self._places[rank]
        if place.own is None or not numbers:
            return
        words = [place.own.words[i].start for i in numbers]
        norms = [place.own.norms[i].start for i in numbers]
        self._again.decode(
            place.words_of(means), place.norms_of(means), outs, words, norms, 1, scale
        )


@dataclass(frozen=True)
class _Told(Averaged):
    """Means that owners have told, and what they owe."""

    widths: _OwingWidths

    def decode_own(self, items: Sequence[Item], outs: Sequence[Tensor]) -> None:
        """See :class:`OwnResult`."""
        assert self.widths.own is not None
        self.widths.decode_sum(self.widths.own, self.norms, items, outs, 1, 1.0)

    def owing(self, item: Item) -> Tensor | None:
        """See :class:`OwnResult`."""
        return self.widths.owing[item.place]


@dataclass(frozen=True)
class _Paid:
    """A result to whose tensors this rank has added what it owed and does not own."""

    result: OwnResult
    strays: Sequence[Tensor | None]

    @property
    def contribution(self) -> Contribution:
        return self.result.contribution

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        self.result.decode(items, outs, scale)

    def decode_own(self, items: Sequence[Item], outs: Sequence[Tensor]) -> None:
        """The part of the tensors alone."""
        self.result.decode_own(items, outs)
        for item, out in zip(items, outs, strict=True):
            stray = self.strays[item.place]
            if stray is not None:
                out.sub_(stray)

    def owing(self, item: Item) -> Tensor:
        left = self.result.owing(item)
        if left is None:  # a rank has left: codes were summed, and all was paid
            left = torch.zeros(item.numel, dtype=item.dtype, device=item.device)
        return left
