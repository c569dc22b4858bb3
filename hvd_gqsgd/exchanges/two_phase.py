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

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.codecs import Codec, levels_for
from hvd_gqsgd.errors import GAVE_UP, AgreementError
from hvd_gqsgd.exchanges.base import CodedExchange, Running, Setup, Terms
from hvd_gqsgd.exchanges.collectives import Allgather, Alltoall, Sum
from hvd_gqsgd.exchanges.contribution import Contribution, everyone
from hvd_gqsgd.exchanges.remaining import RemainingSum
from hvd_gqsgd.layout import FLAG, Layout, Segments, runs

__all__ = ["TwoPhaseExchange"]


class TwoPhaseExchange(CodedExchange):
    """Max of norms, Alltoall of codes, Allgather of means; for both ditherings."""

    code_messages = ("codes", "means")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._setup = setup

    @property
    def summands(self) -> int:
        """A lane holds one rank's code."""
        return 1

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        norms = yield from self._norms(bucket, terms)
        if not terms.all_here:
            # Every exchange has as many messages as it says. The last one may be left out.
            yield Sum("codes", torch.zeros(1, dtype=torch.int32, device=bucket.device))
            return (yield from self._remaining.sum(bucket, terms, norms, "means"))
        layout = bucket.layout(self.options.block_size, terms.bits)
        segments = layout.segments(self.size)
        words = self._take(layout.num_words, layout.word_dtype, bucket.device)
        with terms.attempt():
            if terms.takes_part:
                self._encode(bucket, terms, norms, words)
        received = yield Alltoall("codes", words, segments.words)

        lengths = [end - begin for begin, end in itertools.pairwise(segments.means)]
        own = self._take(lengths[self.rank], layout.means_dtype, bucket.device)
        own[:FLAG] = 0
        if terms.takes_part:
            # Horovod lets ranks send what they like. Another rank may have been sent what it
            # should: all come to know by this one's flag.
            fits = received.numel() == self.size * segments.words[self.rank]
            if not (fits or self._may_give_up):
                raise AgreementError(GAVE_UP)
            if fits:
                with terms.attempt():
                    self._average(bucket, terms, norms, received, own)
        del words, received  # their memory is free for the next bucket
        means = yield Allgather("means", own, lengths)
        terms.raise_failure()
        # Where ranks agree ahead none gives up, and the host need not look.
        if means.numel() != segments.means[-1] or (
            self._may_give_up and not bool((means[list(segments.means[:-1])] == 1).all())
        ):
            raise AgreementError(GAVE_UP)
        return _Averaged(
            everyone(self.size), self.codec(terms.bits), layout, segments, norms, means
        )

    @functools.cached_property
    def _remaining(self) -> RemainingSum:
        most = self.options.most_bits
        return RemainingSum(self._setup, levels_for(most, 1))

    def _average(
        self, bucket: Bucket, terms: Terms, norms: Tensor, received: Tensor, own: Tensor
    ) -> None:
        """Averages the tiles of this rank, from the codes of all ranks."""
        layout = bucket.layout(self.options.block_size, terms.bits)
        segments, codec = layout.segments(self.size), self.codec(terms.bits)
        codec.requantize(
            received.view(self.size, segments.words[self.rank]), norms, own,
            [item.numel for item in bucket.items], [place.start for place in layout.norms],
            runs((part.tensor, part) for part in segments.of_rank[self.rank]),
            segments.means[self.rank], terms.step, [item.identity for item in bucket.items],
        )  # fmt: skip
        own[:FLAG] = 1


@dataclass(frozen=True)
class _Averaged:
    contribution: Contribution
    codec: Codec
    layout: Layout
    segments: Segments
    norms: Tensor
    means: Tensor

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        # The mean travelled. A share of 1/n, times n, may not be one again.
        size = self.contribution.count
        factor = 1.0 if scale == 1 / size else scale * size
        norms = [self.layout.norms[item.place].start for item in items]
        parts = (
            (i, part)
            for i, item in enumerate(items)
            for part in self.segments.of_tensor[item.place]
        )
        self.codec.decode_means(self.means, self.norms, outs, norms, runs(parts), factor)
