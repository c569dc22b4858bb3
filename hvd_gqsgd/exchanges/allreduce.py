"""Codes summed as integers by an ordinary Allreduce.

The lanes must be wide enough for the sum of all ranks' codes, so the number of levels falls with
the number of ranks. Marks before the codes count the ranks that took part.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.exchanges.base import CodedExchange, LastMessage, Result, Running, Setup, Terms
from hvd_gqsgd.exchanges.collectives import Collective, Max, Sum
from hvd_gqsgd.exchanges.contribution import MARKS, Contribution, everyone, mark, read_marks
from hvd_gqsgd.exchanges.widths import Widths, widths_of

__all__ = ["AllreduceExchange", "Summed"]


class AllreduceExchange(CodedExchange):
    """Max of norms, then Sum of codes; for linear codes, of widths per block too."""

    code_messages = ("codes",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._keeps_own = setup.keeps_own
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

    def _widths(self, bucket: Bucket, bits: int) -> Widths:
        layout = bucket.layout(self.options.block_size, bits)
        return widths_of(
            self.options, self.codec(bits), layout, self._take, bucket.device, summands=self.size
        )

    def _message(self, bucket: Bucket, widths: Widths) -> Tensor:
        return self._take(self._marks + widths.num_words, widths.word_dtype, bucket.device)

    def _sum(self, bucket: Bucket, terms: Terms, norms: Tensor, name: str) -> Running:
        """Sums the codes of a bucket, in a last message of this name."""
        widths = self._widths(bucket, terms.bits)
        message = self._message(bucket, widths)
        end = self._marks + widths.num_words
        with terms.attempt():
            if terms.takes_part:
                widths.encode(bucket, norms, message[self._marks : end], terms.step)
        own = message[self._marks : end].clone() if self._keeps_own else None
        if self._marks:
            mark(message, self.rank, terms.takes_part)
        summed = yield Sum(name, message)
        terms.raise_failure()
        return self._summed(bucket, widths, norms, summed, own)

    def rehearse_all(self, bucket: Bucket, bits: int) -> Generator[Collective, Tensor, None]:
        """Sends zeros in messages of the sizes of those of :meth:`run`, for the maximum norm."""
        norms = bucket.layout(self.options.block_size, bits).num_norms
        yield Max(self._first, self._take(norms, bucket.norm_dtype, bucket.device).zero_())
        yield Sum("codes", self._message(bucket, self._widths(bucket, bits)).zero_())

    def last_message(self, bucket: Bucket, bits: int) -> LastMessage:
        """See :class:`CodedExchange`."""
        widths = self._widths(bucket, bits)

        def read(norms: Tensor, summed: Tensor) -> Result:
            widths.settle(norms)
            return self._summed(bucket, widths, norms, summed)

        return LastMessage(self._marks + widths.num_words, widths.word_dtype, read)

    def _summed(
        self, bucket: Bucket, widths: Widths, norms: Tensor, summed: Tensor,
        own: Tensor | None = None,
    ) -> Result:  # fmt: skip
        contribution = read_marks(summed) if self._marks else everyone(self.size)
        if not 1 <= contribution.count <= self.size:
            raise AgreementError(
                f"{bucket.name}: got the codes of {contribution.count} ranks, and there are "
                f"{self.size}: a rank sent an invalid message"
            )
        words = summed[self._marks : self._marks + widths.num_words]
        return Summed(contribution, widths, norms, words, own)


@dataclass(frozen=True)
class Summed:
    """The sum of the codes of some ranks."""

    contribution: Contribution
    widths: Widths
    norms: Tensor
    words: Tensor
    own: Tensor | None
    """The codes of this rank, if they are kept."""

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        """See :class:`Result`."""
        count = self.contribution.count
        self.widths.decode_sum(self.words, self.norms, items, outs, count, scale)

    def decode_own(self, items: Sequence[Item], outs: Sequence[Tensor]) -> None:
        """See :class:`OwnResult`."""
        assert self.own is not None
        self.widths.decode_sum(self.own, self.norms, items, outs, 1, 1.0)

    def owing(self, item: Item) -> Tensor | None:
        """Nothing: see :class:`OwnResult`."""
        return None
