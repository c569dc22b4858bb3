"""A reduce-scatter of codes: every rank gets the sum over the ranks of its own shard.

It is the first phase of two. An Alltoall brings the codes of each shard to the rank that owns it,
which decodes them and adds them up. Nothing is rounded a second time. The bytes are those of a
reduce-scatter of as many, and the number of levels does not fall with the number of ranks.

A tensor is the concatenation of the shards of all ranks, of equal length. Each has blocks,
norms and a dither of its own, as if it were a tensor.

Where ranks can see it, a flag before the codes of each rank tells whether it took part.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.errors import GAVE_UP, AgreementError
from hvd_gqsgd.exchanges.base import CodedExchange, Running, Terms
from hvd_gqsgd.exchanges.collectives import Alltoall
from hvd_gqsgd.exchanges.contribution import Contribution, everyone
from hvd_gqsgd.exchanges.widths import Widths, widths_of
from hvd_gqsgd.layout import FLAG
from hvd_gqsgd.options import digest

__all__ = ["OnePhaseExchange"]


class OnePhaseExchange(CodedExchange):
    """Max of norms, then Alltoall of codes; for all codes and widths per block."""

    code_messages = ("codes",)
    counted = 2

    @property
    def summands(self) -> int:
        """A lane holds one rank's code."""
        return 1

    def check(self, numel: int) -> None:
        """See :class:`Exchange`."""
        super().check(numel)
        if numel % self.size:
            raise ValueError(
                f"a tensor must hold shards of one length for {self.size} ranks, got {numel} "
                "elements: pad it"
            )

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        shards = self._shards(bucket)
        norms = yield from self._norms(shards, terms)
        codec, layout = self.codec(terms.bits), shards.layout(self.options.block_size, terms.bits)
        widths = widths_of(self.options, codec, layout, self._take, bucket.device)
        # Over NCCL none gives up, and the host need not look.
        flag, length = FLAG if self._may_give_up else 0, widths.words[self.rank]
        message = self._take(self.size * (flag + length), widths.word_dtype, bucket.device)
        rows = message.view(self.size, flag + length)
        rows[:, :flag] = 0
        with terms.attempt():
            if terms.takes_part:
                words = message
                if flag:
                    words = self._take(self.size * length, widths.word_dtype, bucket.device)
                widths.encode(shards, norms, words, terms.step)
                if flag:
                    rows[:, flag:] = words.view(self.size, length)
                    rows[:, :flag] = 1
        received = yield Alltoall("codes", message, [flag + length] * self.size)
        terms.raise_failure()
        got = received.view(self.size, flag + length)
        if flag and not bool((got[:, 0] == 1).all()):
            raise AgreementError(GAVE_UP)
        own = self.rank * len(bucket.items)
        return _Received(everyone(self.size), widths, norms, got[:, flag:], own)

    def _shards(self, bucket: Bucket) -> Bucket:
        """The shards of all tensors, in the order of the ranks that own them."""
        shards = Bucket(bucket.name, (bucket.norm_dtype, bucket.device), bucket.stream)
        for rank in range(self.size):
            for item in bucket.items:
                length = item.numel // self.size
                x = item.x.view(-1)[rank * length : (rank + 1) * length]
                shards.add(Item(x, len(shards.items), _identity(item.identity, rank)))
        shards.close()
        return shards


@functools.lru_cache(maxsize=2**15)  # the same tensors come step after step
def _identity(tensor: int, rank: int) -> int:
    """That of a tensor's shard."""
    return digest(("shard", tensor, rank))


@dataclass(frozen=True)
class _Received:
    contribution: Contribution
    widths: Widths
    norms: Tensor
    words: Tensor
    first: int
    """Place of this rank's first shard."""

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        for item, out in zip(items, outs, strict=True):
            self.widths.sum(self.words, self.norms, self.first + item.place, out, scale)
