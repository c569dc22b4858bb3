"""The sum of the ranks that remain once one has left by ``hvd.join()``.

Horovod lets a rank that has left take part in an Allreduce, with zeros, and in no other collective.
So the codes of a bucket that is to go another way are summed, in lanes wide enough that they have
the levels of that way.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from hvd_gqsgd.bucket import Bucket
from hvd_gqsgd.codecs.bit_schedule import MAX_BITS
from hvd_gqsgd.exchanges.allreduce import AllreduceExchange
from hvd_gqsgd.exchanges.base import Running, Setup, Terms

__all__ = ["RemainingSum"]


class RemainingSum(AllreduceExchange):
    """Linear codes in wide lanes, whatever the options say.

    Args:
        setup: that of the other exchange.
        levels: the levels a side that the lanes are to hold, as far as there are such lanes.
    """

    def __init__(self, setup: Setup, levels: int) -> None:
        summed = levels * setup.transport.size
        self._width = min((2 * summed).bit_length(), MAX_BITS)
        options = dataclasses.replace(
            setup.options, bits=self._width, dither="linear", exchange="allreduce"
        )
        super().__init__(setup._replace(options=options))

    def sum(self, bucket: Bucket, terms: Terms, norms: Tensor, name: str) -> Running:
        """Sums a bucket in one message of this name, after its norms."""
        wide = dataclasses.replace(terms, bits=self._width)
        return (yield from self._sum(bucket, wide, norms, name))
