"""The sum of the ranks that remain once one has left by ``hvd.join()``.

Horovod lets a rank that has left take part in an Allreduce, with zeros, and in no other collective.
So the codes of a bucket that is to go another way are summed, in lanes wide enough that they have
the levels of that way.

Horovod 0.28.1 negotiates a message that it does not remember from all ranks. If lower ranks have
left, its coordinator then writes beyond the end of an array that has an element for each rank that
remains (``devices`` in ``ConstructResponse`` of ``controller.cc``), which ends the process. So all
messages after the norms are ones that Horovod remembers: the sum is rehearsed while all are here.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable, Generator

from torch import Tensor

from hvd_gqsgd.bucket import Bucket
from hvd_gqsgd.codecs import levels_for
from hvd_gqsgd.codecs.bit_schedule import MAX_BITS
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.exchanges.allreduce import AllreduceExchange
from hvd_gqsgd.exchanges.base import CodedExchange, Running, Setup, Terms
from hvd_gqsgd.exchanges.collectives import Collective, Sum
from hvd_gqsgd.exchanges.widths import Widths

__all__ = ["MOST_REHEARSED", "SAFE_RANKS", "AllRanksExchange", "RemainingSum"]

# The smallest piece of memory from malloc has room for the 4 bytes of each of so many ranks.
SAFE_RANKS = 6

# Horovod remembers 1024 messages, of all that its users send.
MOST_REHEARSED = 256


class RemainingSum(AllreduceExchange):
    """Linear codes in wide lanes, whatever the options say.

    Args:
        setup: that of the other exchange.
        levels: the levels a side that the lanes are to hold, as far as there are such lanes.
        room: the bytes that the message of a bucket must have room for, the same in all steps.
    """

    def __init__(
        self, setup: Setup, levels: int, room: Callable[[Bucket], int] = lambda bucket: 0
    ) -> None:
        summed = levels * setup.transport.size
        self._width = min((2 * summed).bit_length(), MAX_BITS)
        options = dataclasses.replace(
            setup.options, bits=self._width, dither="linear", exchange="allreduce",
            select="random" if setup.options.disjoint else setup.options.select,
        )  # fmt: skip
        super().__init__(setup._replace(options=options))
        self._room = room
        self.at_risk = self.size > SAFE_RANKS and setup.transport.ranks_may_leave
        """Whether Horovod must remember the sum of a bucket before a rank leaves."""
        self._rehearsed: set[str] = set()

    @classmethod
    def of_wide_lanes(
        cls, setup: Setup, room: Callable[[Bucket], int] = lambda bucket: 0
    ) -> RemainingSum:
        """With the levels of lanes that hold the code of one rank."""
        bits = setup.options.bits
        most = bits.max_bits if isinstance(bits, BlockBits) else setup.options.most_bits
        return cls(setup, levels_for(most, 1), room)

    def all(self, bucket: Bucket, terms: Terms) -> Running:
        """Exchanges a bucket, from its norms on."""
        norms = yield from self._norms(bucket, terms)
        return (yield from self._total(bucket, terms, norms))

    def rehearse_alone(self, bucket: Bucket) -> Generator[Collective, Tensor, None]:
        """Rehearses the sum of a bucket with zeros."""
        message = self._message(bucket, self._widths(bucket, self._width))
        yield Sum(self._name(bucket), message.zero_())
        self._rehearsed.add(self._full_name(bucket))

    def sum(self, bucket: Bucket, terms: Terms, norms: Tensor) -> Running:
        """Sums a bucket, given its norms."""
        return (yield from self._total(bucket, terms, norms))

    def to_rehearse(self, bucket: Bucket) -> bool:
        """Whether Horovod does not remember the sum of a bucket, and has to."""
        if not self.at_risk or len(self._rehearsed) >= MOST_REHEARSED:
            return False
        return self._full_name(bucket) not in self._rehearsed

    def rehearse(
        self, bucket: Bucket, own: Tensor, begin: int, end: int
    ) -> Generator[Collective, Tensor, Tensor]:
        """Concatenates tensors of all ranks, as an Allgather does, by a message like that of
        :meth:`sum`: each rank adds zeros to those of the others.

        Args:
            bucket: of the message.
            own: the tensor of this rank.
            begin, end: its place, and the elements of all ranks.
        """
        message = self._message(bucket, self._widths(bucket, self._width)).zero_()
        per = max(own.element_size() // message.element_size(), 1)
        all_of_them = message[: message.numel() // per * per].view(own.dtype)
        all_of_them[begin : begin + own.numel()] = own
        yield Sum(self._name(bucket), message)  # in place
        self._rehearsed.add(self._full_name(bucket))
        return all_of_them[:end]

    def _total(self, bucket: Bucket, terms: Terms, norms: Tensor) -> Running:
        """The sum of codes, in the wide lanes."""
        terms.bits = self._width
        return (yield from self._sum(bucket, terms, norms, self._name(bucket)))

    def _message(self, bucket: Bucket, widths: Widths) -> Tensor:
        itemsize = widths.word_dtype.itemsize
        room = -(-self._room(bucket) // 8) * (8 // itemsize)
        length = max(self._marks + widths.num_words, room)
        return self._take(length, widths.word_dtype, bucket.device)

    def _name(self, bucket: Bucket) -> str:
        """Of the sum, by its size too: Horovod remembers one size of a name."""
        layout = bucket.layout(self.options.block_size, self._width)
        return f"remaining.{layout.num_words}"

    def _full_name(self, bucket: Bucket) -> str:
        return f"{bucket.name}.{self._name(bucket)}"


class AllRanksExchange(CodedExchange):
    """An exchange that needs all ranks: once one has left, the codes of the others are summed."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._setup = setup

    @abstractmethod
    def _room(self, bucket: Bucket) -> int:
        """Bytes of the last message, from all ranks, that the sum is to have room for."""

    @property
    def branches(self) -> bool:
        """See :class:`Exchange`."""
        return self._setup.transport.ranks_may_leave

    def to_rehearse(self, bucket: Bucket) -> bool:
        """See :class:`Exchange`."""
        return self._remaining.to_rehearse(bucket)

    @functools.cached_property
    def _remaining(self) -> RemainingSum:
        return RemainingSum.of_wide_lanes(self._setup, self._room)
