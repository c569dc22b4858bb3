"""Parcels: the parts of an Alltoall among some ranks, of different lengths and types.

A flag before each parcel tells whether its sender took part in the step. The message is made of
32-bit words, so that any type travels over any transport.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd.errors import GAVE_UP, AgreementError
from hvd_gqsgd.exchanges.base import Setup, Terms
from hvd_gqsgd.exchanges.collectives import Alltoall, Collective

__all__ = ["Parcel", "exchange_parcels"]

_UNIT = 16  # words; parcels begin on a cache line, after a unit for the flag


class Parcel(NamedTuple):
    """The length and the type of a parcel."""

    numel: int
    dtype: torch.dtype

    @property
    def words(self) -> int:
        """Words of the parcel and its flag."""
        return _UNIT + -(-self.numel * self.dtype.itemsize // (4 * _UNIT)) * _UNIT

    def within(self, words: Tensor) -> Tensor:
        """The contents, in ``self.words`` words."""
        return words[_UNIT:].view(self.dtype)[: self.numel]


def exchange_parcels(
    setup: Setup,
    terms: Terms,
    name: str,
    device: torch.device,
    to: Mapping[int, Parcel],
    of: Mapping[int, Parcel],
    write: Callable[[dict[int, Tensor]], None],
) -> Generator[Collective, Tensor, dict[int, Tensor] | None]:
    """Sends a parcel to some ranks of this node, and returns those of some ranks.

    Args:
        setup: of the exchange.
        terms: of the bucket.
        name: of the message.
        device: of the bucket.
        to: by the rank that they are for.
        of: by the rank that they come from.
        write: fills the parcels to send, by rank; called if this rank takes part.

    Returns:
        The parcels received, by rank; None if this rank does not take part, also as another one
        of this node does not.
    """
    ranks = range(setup.transport.size)
    splits = [to[rank].words if rank in to else 0 for rank in ranks]
    counts = [of[rank].words if rank in of else 0 for rank in ranks]
    ends = [*itertools.accumulate(counts)]
    message = setup.take(sum(splits), torch.int32, device)
    sent = {rank: words for rank, words in enumerate(message.split(splits)) if rank in to}
    for words in sent.values():
        words[0] = 0
    with terms.attempt():
        if terms.takes_part:
            write({rank: to[rank].within(words) for rank, words in sent.items()})
            for words in sent.values():
                words[0] = 1
    received = yield Alltoall(name, message, splits, counts, inside=True)
    if not terms.takes_part:
        return None
    # Horovod allows any splits. Over NCCL no rank gives up, and the host need not read the flags.
    flags = [end - count for end, count in zip(ends, counts, strict=True) if count]
    if received.numel() != ends[-1] or (
        setup.may_give_up and not bool((received[flags] == 1).all())
    ):
        terms.failure = AgreementError(GAVE_UP)
        return None
    parts = received.split(counts)
    return {rank: parcel.within(parts[rank]) for rank, parcel in of.items()}
