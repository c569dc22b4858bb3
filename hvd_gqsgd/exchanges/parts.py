"""An Allgather of codes: every rank gets the tensors of all ranks, which are of different elements.

Nothing is added up, so lanes hold one code, and each element is rounded once. Norms are those of
all ranks at the same place of their tensors, as in other exchanges.

A flag before a rank's codes tells whether the rank took part. An Allgather needs all ranks: once
one has left by ``hvd.join()``, the others send the same elements, and codes are summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.codecs import Codec, make_codec
from hvd_gqsgd.errors import GAVE_UP, AgreementError
from hvd_gqsgd.exchanges.base import Running, Terms
from hvd_gqsgd.exchanges.collectives import Allgather
from hvd_gqsgd.exchanges.contribution import Contribution, everyone
from hvd_gqsgd.exchanges.remaining import AllRanksExchange
from hvd_gqsgd.exchanges.widths import Widths, widths_of
from hvd_gqsgd.layout import FLAG
from hvd_gqsgd.options import digest

__all__ = ["Parts", "PartsExchange"]


class PartsExchange(AllRanksExchange):
    """Max of norms, then Allgather of codes; for all codes and widths per block."""

    code_messages = ("parts",)

    @property
    def summands(self) -> int:
        """A lane holds one rank's code."""
        return 1

    def codec(self, bits: int) -> Codec:
        """The codec of one rank's tensors alone, with a dither of this rank's own."""
        if bits not in self._codecs:
            own = digest(("part", self.options.seed, self.rank))
            options = dataclasses.replace(self.options, seed=own)
            self._codecs[bits] = make_codec(options, bits, summands=1, rank=0, world_size=1)
        return self._codecs[bits]

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        norms = yield from self._norms(bucket, terms)
        if not terms.all_here:
            return (yield from self._remaining.sum(bucket, terms, norms))
        widths = self._widths(bucket, terms.bits)
        length = FLAG + widths.num_words
        own = self._take(length, widths.word_dtype, bucket.device)
        own[:FLAG] = 0
        with terms.attempt():
            if terms.takes_part:
                widths.encode(bucket, norms, own[FLAG:], terms.step)
                own[:FLAG] = 1
        if terms.rehearses and self._setup.transport.ranks_may_leave:
            begin = self.rank * length
            parts = yield from self._remaining.rehearse(bucket, own, begin, self.size * length)
        else:
            parts = yield Allgather("parts", own, [length] * self.size)
        terms.raise_failure()
        # Where ranks agree ahead none gives up, and the host need not look.
        if parts.numel() != self.size * length or (
            self._may_give_up and not bool((parts[::length] == 1).all())
        ):
            raise AgreementError(GAVE_UP)
        return Parts(everyone(self.size), widths, norms, parts.view(self.size, length)[:, FLAG:])

    def _widths(self, bucket: Bucket, bits: int) -> Widths:
        layout = bucket.layout(self.options.block_size, bits)
        return widths_of(self.options, self.codec(bits), layout, self._take, bucket.device)

    def _room(self, bucket: Bucket) -> int:
        widths = self._widths(bucket, self.options.most_bits)
        return self.size * (FLAG + widths.num_words) * widths.word_dtype.itemsize


@dataclass(frozen=True)
class Parts:
    """The tensors of all ranks."""

    contribution: Contribution
    widths: Widths
    norms: Tensor
    words: Tensor

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        """Has no meaning: the tensors are of different elements."""
        raise NotImplementedError("the parts of ranks are decoded one by one")

    def decode_of(self, rank: int, items: Sequence[Item], outs: Sequence[Tensor]) -> None:
        """Writes the tensors of a rank to ``outs``, for some tensors."""
        for item, out in zip(items, outs, strict=True):
            self.widths.sum(self.words[rank : rank + 1], self.norms, item.place, out, 1.0)
