"""Codes summed as integers by an ordinary Allreduce.

The lanes must be wide enough for the sum of all ranks' codes, so the number of levels falls with
the number of ranks. Marks before the codes count the ranks that took part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.codecs import Codec
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.exchanges.base import CodedExchange, Running, Setup, Terms
from hvd_gqsgd.exchanges.collectives import Sum
from hvd_gqsgd.exchanges.contribution import MARKS, Contribution, everyone, mark, read_marks
from hvd_gqsgd.layout import Layout

__all__ = ["AllreduceExchange"]


class AllreduceExchange(CodedExchange):
    """Max of norms, then Sum of codes; for codes that can be added."""

    code_messages = ("codes",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        # Otherwise all ranks take part.
        self._marks = MARKS if setup.may_give_up or setup.transport.ranks_may_leave else 0

    @property
    def summands(self) -> int:
        """All ranks."""
        return self.size

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        norms = yield from self._norms(bucket, terms)
        return (yield from self._sum(bucket, terms, norms, "codes"))

    def _message(self, bucket: Bucket, bits: int) -> Tensor:
        layout = bucket.layout(self.options.block_size, bits)
        return self._take(self._marks + layout.num_words, layout.word_dtype, bucket.device)

    def _sum(self, bucket: Bucket, terms: Terms, norms: Tensor, name: str) -> Running:
        """Sums the codes of a bucket, in a last message of this name."""
        layout = bucket.layout(self.options.block_size, terms.bits)
        message = self._message(bucket, terms.bits)
        message[: self._marks] = 0
        with terms.attempt():
            if terms.takes_part:
                self.codec(terms.bits).encode(
                    bucket.tensors, norms, message[self._marks :], terms.step, bucket.identities
                )
                if self._marks:
                    mark(message, self.rank)
        summed = yield Sum(name, message)
        terms.raise_failure()
        contribution = read_marks(summed) if self._marks else everyone(self.size)
        if not 1 <= contribution.count <= self.size:
            raise AgreementError(
                f"{bucket.name}: got the codes of {contribution.count} ranks, and there are "
                f"{self.size}: a rank sent an invalid message"
            )
        codec = self.codec(terms.bits)
        return _Summed(contribution, codec, layout, norms, summed[self._marks :])


@dataclass(frozen=True)
class _Summed:
    contribution: Contribution
    codec: Codec
    layout: Layout
    norms: Tensor
    words: Tensor

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        words = [self.layout.words[item.place].start for item in items]
        norms = [self.layout.norms[item.place].start for item in items]
        self.codec.decode(
            self.words, self.norms, outs, words, norms, self.contribution.count, scale
        )
