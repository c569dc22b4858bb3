"""Codes summed as integers by an ordinary Allreduce.

The lanes must be wide enough for the sum of all ranks' codes, so the number of levels falls with
the number of ranks. The header of the code message counts who took part.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvd_gqsgd.codecs import LinearCodec
from hvd_gqsgd.engine.buckets import CODE_HEADER, Bucket, Item, everyone
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.exchanges.base import Exchange, Stage
from hvd_gqsgd.transports.base import Handle

__all__ = ["AllreduceExchange"]


class AllreduceExchange(Exchange):
    """Max of norms, then Sum of codes; for linear dithering."""

    @property
    def code_header(self) -> int:
        """None where all have agreed beforehand and none may leave: then all take part."""
        return CODE_HEADER if self._transport.ranks_may_leave or not self._ahead else 0

    @property
    def summands(self) -> int:
        """All ranks."""
        return self.size

    def code_stages(self) -> Sequence[Stage]:
        """One Sum."""
        return [Stage("codes", self._fill_codes, self._sum_codes, self._read_codes)]

    def decode(self, bucket: Bucket, item: Item, out: Tensor, scale: float) -> None:
        """See :class:`Exchange`."""
        assert isinstance(bucket.codec, LinearCodec) and bucket.contribution is not None
        assert bucket.words is not None and bucket.norms is not None
        bucket.codec.decode(
            bucket.words[item.words], bucket.norms[item.norms], out,
            bucket.contribution.count, scale,
        )  # fmt: skip

    def _fill_codes(self, bucket: Bucket) -> None:
        super()._fill_codes(bucket)
        if self.code_header:
            bucket.write_code_header(self.rank)

    def _sum_codes(self, bucket: Bucket, name: str) -> Handle:
        words = self._words(bucket)
        self._count(words.nbytes)
        return self._transport.sum_async(words, name)

    def _read_codes(self, bucket: Bucket, result: Tensor) -> None:
        bucket.words = result
        contribution = bucket.read_code_header() if self.code_header else everyone(self.size)
        if not 1 <= contribution.count <= self.size:
            raise AgreementError(f"{bucket.name}: a rank sent what no ranks add up to")
        bucket.contribution = contribution
