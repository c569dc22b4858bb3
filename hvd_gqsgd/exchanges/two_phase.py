"""Codes that are not added on the way: every rank averages a part of the bucket for all.

An Alltoall brings the codes of each tile to the rank that owns it. The owner decodes and averages
them, rounds the means once more, on a norm of the tile's own, and an Allgather brings these to all
ranks. The bytes are those of a ring Allreduce of as many; lanes need not hold a sum, so the number
of levels does not fall with the number of ranks; and all ranks decode the same.

Before its means a rank tells by a flag that it took part. One that has given up the step, and only
keeps the others from waiting, has sent codes and means that mean nothing.

Alltoall and Allgather need all ranks: once one has left by ``hvd.join()`` the others raise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd.engine.buckets import Bucket, Item, everyone
from hvd_gqsgd.errors import GAVE_UP, AgreementError
from hvd_gqsgd.exchanges.base import Exchange, Stage
from hvd_gqsgd.exchanges.segments import FLAG, Geometry, Segments
from hvd_gqsgd.transports.base import Handle

__all__ = ["TwoPhaseExchange"]


class TwoPhaseExchange(Exchange):
    """Max of norms, Alltoall of codes, Allgather of means; for both ditherings."""

    # Horovod would raise an error of its own, but only for names that it has not seen before.
    needs_all_ranks = True

    @property
    def summands(self) -> int:
        """A lane holds one rank's code."""
        return 1

    def code_stages(self) -> Sequence[Stage]:
        """One Alltoall, one Allgather."""
        return [
            Stage("codes", self._fill_codes, self._scatter_codes, self._read_codes),
            Stage("means", self._fill_means, self._gather_means, self._read_means),
        ]

    def decode(self, bucket: Bucket, item: Item, out: Tensor, scale: float) -> None:
        """See :class:`Exchange`."""
        assert bucket.codec is not None and bucket.means is not None and bucket.norms is not None
        # What travelled is the mean. A share of 1/n, times n, may not be one again.
        factor = 1.0 if scale == 1 / self.size else scale * self.size
        for part in self._segments(bucket).of_tensor[item.place]:
            bucket.codec.decode_means(
                bucket.means[part.means], bucket.norms[item.norms], out, part.tiles, factor
            )

    def _scatter_codes(self, bucket: Bucket, name: str) -> Handle:
        words = self._words(bucket)
        # Half of what an Allreduce of as many bytes takes; the Allgather is the other half.
        self._count(words.nbytes // 2)
        return self._transport.alltoall_async(words, self._segments(bucket).words, name)

    def _read_codes(self, bucket: Bucket, result: Tensor) -> None:
        # Of all ranks, for the tiles that this rank owns. Horovod lets ranks send what they like.
        numel = self.size * self._segments(bucket).words[self.rank]
        if self._ahead:
            _check(bucket, result, numel)
        # Another rank may have been sent what it should: all come to know by this one's flag.
        bucket.words = result if result.numel() == numel else None

    def _fill_means(self, bucket: Bucket) -> None:
        assert bucket.codec is not None and bucket.norms is not None
        assert bucket.agreement is not None
        if bucket.words is None:
            self._own_means(bucket)
            return
        received = bucket.words.view(self.size, -1) if bucket.words.numel() else bucket.words
        segments, own = self._segments(bucket), self._own_means(bucket)
        own[:FLAG] = 1
        begin = segments.means[self.rank]
        for part in segments.of_rank[self.rank]:
            item = bucket.items[part.tensor]
            bucket.codec.requantize(
                received[:, part.words], bucket.norms[item.norms],
                own[part.means.start - begin : part.means.stop - begin],
                item.numel, part.tiles, bucket.agreement.step, item.identity,
            )  # fmt: skip
        bucket.words = None

    def _gather_means(self, bucket: Bucket, name: str) -> Handle:
        own = self._own_means(bucket)
        self._count(self._segments(bucket).means[-1] * own.element_size() // 2)
        ends = self._segments(bucket).means
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        return self._transport.allgather_async(own, lengths, name)

    def _read_means(self, bucket: Bucket, result: Tensor) -> None:
        segments = self._segments(bucket)
        _check(bucket, result, segments.means[-1])
        # Not where all have agreed beforehand: then none gives up, and the host need not look.
        if not self._ahead and not bool((result[list(segments.means[:-1])] == 1).all()):
            raise AgreementError(GAVE_UP)
        bucket.means = result
        bucket.contribution = everyone(self.size)

    def _own_means(self, bucket: Bucket) -> Tensor:
        assert bucket.codec is not None
        if bucket.means is None:
            dtype = layout.means_dtype(bucket.codec.bits, bucket.kind[0])
            begin, end = self._segments(bucket).means[self.rank : self.rank + 2]
            bucket.means = self._take(bucket, end - begin, dtype)
            bucket.means[:FLAG] = 0
        return bucket.means

    def _geometry(self, bucket: Bucket) -> Geometry:
        assert bucket.codec is not None
        tensors = tuple((item.numel, bucket.codec.block(item.numel)) for item in bucket.items)
        return Geometry(tensors, bucket.codec.bits, bucket.kind[0])

    def _segments(self, bucket: Bucket) -> Segments:
        if bucket.segments is None:
            bucket.segments = Segments.of(self._geometry(bucket), self.size)
        return bucket.segments


def _check(bucket: Bucket, result: Tensor, numel: int) -> None:
    """That all ranks have sent as much as they should; else one has given up the step."""
    if result.numel() != numel:
        raise AgreementError(GAVE_UP)
