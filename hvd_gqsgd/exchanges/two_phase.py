"""Codes that are not added on the way: every rank averages a part of the bucket for all.

An Alltoall brings the codes of each tile to the rank that owns it. The owner decodes and averages
them, rounds the means once more, on a norm of the tile's own, and an Allgather brings these to all
ranks. The bytes are those of a ring Allreduce of as many; lanes need not hold a sum, so the number
of levels does not fall with the number of ranks; and all ranks decode the same.

A flag before a rank's means tells whether the rank took part. A rank that has given up the step
sends codes and means that mean nothing, so that the other ranks do not wait.

Alltoall and Allgather need all ranks: once one has left by ``hvd.join()``, codes are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.errors import GAVE_UP, AgreementError
from hvd_gqsgd.exchanges.base import LastMessage, Result, Running, Terms
from hvd_gqsgd.exchanges.collectives import Allgather, Alltoall
from hvd_gqsgd.exchanges.contribution import Contribution, everyone
from hvd_gqsgd.exchanges.remaining import AllRanksExchange
from hvd_gqsgd.exchanges.widths import Widths, widths_of
from hvd_gqsgd.layout import FLAG

__all__ = ["Averaged", "TwoPhaseExchange"]


@dataclass(frozen=True)
class Averaged:
    """The means that all owners have told."""

    contribution: Contribution
    widths: Widths
    norms: Tensor
    means: Tensor

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        """See :class:`Result`."""
        factor = self.contribution.of_mean(scale)  # the mean travelled
        self.widths.decode(self.means, self.norms, items, outs, factor)


class TwoPhaseExchange(AllRanksExchange):
    """Max of norms, Alltoall of codes, Allgather of means; for all codes and widths per block."""

    code_messages = ("codes", "means")
    averaged: type[Averaged] = Averaged
    """Class of the results."""

    @property
    def summands(self) -> int:
        """A lane holds one rank's code."""
        return 1

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        norms = yield from self._norms(bucket, terms)
        if not terms.all_here:
            return (yield from self._remaining.sum(bucket, terms, norms))
        widths = self._widths(bucket, terms.bits)
        words = self._take(widths.num_words, widths.word_dtype, bucket.device)
        with terms.attempt():
            if terms.takes_part:
                widths.encode(bucket, norms, words, terms.step)
        received = yield Alltoall("codes", words, widths.words)

        lengths = widths.means_of_ranks
        own = self._take(lengths[self.rank], widths.means_dtype, bucket.device)
        own[:FLAG] = 0
        if terms.takes_part:
            # Horovod allows any splits. Another rank may have received the right number of words:
            # the flag of this rank tells all others.
            fits = received.numel() == self.size * widths.words[self.rank]
            if not (fits or self._may_give_up):
                raise AgreementError(GAVE_UP)
            if fits:
                with terms.attempt():
                    widths.average(bucket, norms, received, own, terms.step)
                    own[:FLAG] = 1
        del words, received  # their memory is free for the next bucket
        # Among the owners of a shard, another message of the bucket is rehearsed.
        if terms.rehearses and self._setup.transport.ranks_may_leave:
            begin, end = widths.means[self.rank], widths.means[-1]
            means = yield from self._remaining.rehearse(bucket, own, begin, end)
        else:
            means = yield Allgather("means", own, lengths)
        terms.raise_failure()
        return self._averaged(widths, norms, means)

    def last_message(self, bucket: Bucket, bits: int) -> LastMessage:
        """See :class:`CodedExchange`."""
        widths = self._widths(bucket, bits)

        def read(norms: Tensor, means: Tensor) -> Result:
            widths.settle(norms)
            return self._averaged(widths, norms, means)

        return LastMessage(widths.means[-1], widths.means_dtype, read)

    def _widths(self, bucket: Bucket, bits: int) -> Widths:
        layout = bucket.layout(self.options.block_size, bits)
        return widths_of(self.options, self.codec(bits), layout, self._take, bucket.device)

    def _averaged(self, widths: Widths, norms: Tensor, means: Tensor) -> Result:
        # Where ranks agree ahead none gives up, and the host need not look.
        if means.numel() != widths.means[-1] or (
            self._may_give_up and not bool((means[list(widths.means[:-1])] == 1).all())
        ):
            raise AgreementError(GAVE_UP)
        return self.averaged(everyone(self.size), widths, norms, means)

    @property
    def count_of_remaining(self) -> int:
        """See :class:`Exchange`."""
        return len(self.messages) - 1  # a sum instead of two phases

    def _room(self, bucket: Bucket) -> int:
        widths = self._widths(bucket, self.options.most_bits)
        return widths.means[-1] * widths.means_dtype.itemsize
