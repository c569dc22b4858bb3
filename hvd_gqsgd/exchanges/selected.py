"""The exchange of a part of every gradient, chosen by ``hvd_gqsgd.selections``.

A first message settles the step, which the choice depends on; where a rank leads, it tells the
others its choice in a second one. The chosen elements of a tensor then are a small tensor, which
any other exchange takes over. Its mean is spread over the result, which is 0 elsewhere.

NaN and infinity in elements that are not chosen make the chosen ones NaN, so that no gradient is
used that would have been skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvd_gqsgd._native import ops
from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.exchanges.base import (
    Exchange,
    Result,
    Running,
    Setup,
    Terms,
    WrappingExchange,
    first_message,
)
from hvd_gqsgd.exchanges.collectives import Collective, Max, Sum
from hvd_gqsgd.exchanges.contribution import Contribution
from hvd_gqsgd.selections import Chosen, RandomSelection, selection_of

__all__ = ["SelectedExchange"]


class SelectedExchange(WrappingExchange):
    """A selection in front of another exchange.

    Args:
        setup: of all ranks.
        make: makes the other exchange.
    """

    def __init__(self, setup: Setup, make: Callable[[Setup], Exchange]) -> None:
        self.options = setup.options
        self.rank, self.size = setup.transport.rank, setup.transport.size
        self._setup = setup
        self._inner = make(setup._replace(header=0))
        self.selection = selection_of(self.options, self.rank, self.size)
        self.residuals = setup.residuals if self.selection.led else None
        # In one phase a tensor is a shard for each rank.
        self.parts = self.size if self.options.exchange == "one_phase" else 1
        self.counted = self._inner.counted
        chosen = ("chosen",) if self.selection.led else ()
        self._first = first_message(setup, "step")
        self.messages = (self._first, *chosen, *self._inner.messages)

    @property
    def _settled(self) -> Exchange:
        return self._inner

    def describe(self) -> str:
        """See :class:`Exchange`."""
        return f"{self._inner.describe()}, 1 of {self.selection.size} elements"

    @property
    def count_of_remaining(self) -> int:
        """See :class:`Exchange`."""
        return len(self.messages) - len(self._inner.messages) + self._inner.count_of_remaining

    @property
    def branches(self) -> bool:
        """See :class:`Exchange`."""
        return self._inner.branches

    def to_rehearse(self, bucket: Bucket) -> bool:
        """See :class:`Exchange`."""
        return self._inner.to_rehearse(self._small(bucket))

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        header = max(self._setup.header, 1)
        yield Max(self._first, torch.zeros(header, dtype=torch.int64, device="cpu"))
        pieces: list[Tensor] = []
        with terms.attempt():
            if terms.takes_part:
                pieces = self._pieces(bucket)
        chosen = yield from self._choose(bucket, pieces, terms)
        small = self._small(bucket)
        with terms.attempt():
            if terms.takes_part:
                self._fill(small, pieces, chosen)
        result = yield from self._inner.run(small, terms)
        return _Spread(self, small, result, pieces, chosen)

    def _pieces(self, bucket: Bucket) -> list[Tensor]:
        """The gradients to choose from, or their shards, with their residuals."""
        if self.residuals is not None:
            return [
                self.residuals.added(item.identity, item.x, self.rank, self._setup.take)
                for item in bucket.items
            ]
        return [x for item in bucket.items for x in item.x.view(-1).chunk(self.parts)]

    def _numels(self, bucket: Bucket) -> list[int]:
        """Elements of each piece."""
        return [item.numel // self.parts for item in bucket.items for _ in range(self.parts)]

    def _choose(
        self, bucket: Bucket, pieces: Sequence[Tensor], terms: Terms
    ) -> Generator[Collective, Tensor, list[Chosen]]:
        """The choice for each piece, the same on all ranks."""
        selection, numels = self.selection, self._numels(bucket)
        if isinstance(selection, RandomSelection):
            own = selection.choose(
                numels[:: self.parts], terms.step, bucket.identities, bucket.device
            )
            return [choice for choice in own for _ in range(self.parts)]
        words = selection.words(numels)
        message = self._setup.take(words, torch.int32, bucket.device).zero_()
        with terms.attempt():
            if terms.takes_part and selection.leads(terms.step):
                selection.write(pieces, message)
        told = yield Sum("chosen", message)
        return [] if terms.given_up else selection.read(told, numels)

    def _small(self, bucket: Bucket) -> Bucket:
        """A tensor for the chosen elements of each tensor."""
        small = Bucket(bucket.name, (bucket.norm_dtype, bucket.device), bucket.stream)
        for item in bucket.items:
            kept = self.parts * self.selection.groups(item.numel // self.parts).kept
            x = self._setup.take(kept, self.selection.dtype(item.dtype), bucket.device)
            small.add(Item(x, item.position, item.identity))
        small.close()
        return small

    def _fill(self, small: Bucket, pieces: Sequence[Tensor], chosen: Sequence[Chosen]) -> None:
        """Copies the chosen elements of all pieces; NaN for them if there is one in a piece."""
        largest = self._setup.take(len(pieces), small.norm_dtype, small.device)
        ops.block_max_each(pieces, None, largest)
        floats = torch.float64 if small.norm_dtype == torch.int64 else torch.float32
        zero_or_nan = largest.view(floats) * 0
        targets = (x for item in small.items for x in item.x.chunk(self.parts))
        for piece, choice, out, poison in zip(pieces, chosen, targets, zero_or_nan, strict=True):
            choice.take(piece, out)
            out.add_(poison)


@dataclass(frozen=True)
class _Spread:
    exchange: SelectedExchange
    small: Bucket
    result: Result
    pieces: Sequence[Tensor]
    chosen: Sequence[Chosen]
    decoded: set[int] = field(default_factory=set)

    @property
    def contribution(self) -> Contribution:
        return self.result.contribution

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        exchange, parts = self.exchange, self.exchange.parts
        small = [self.small.items[item.place] for item in items]
        means = [
            torch.empty(item.numel // parts, dtype=item.dtype, device=item.device) for item in small
        ]
        self.result.decode(small, means, scale)
        for item, mean, out in zip(items, means, outs, strict=True):
            place = item.place * parts + (exchange.rank if parts > 1 else 0)
            choice = self.chosen[place]
            choice.spread(exchange.selection.scaled(choice, mean), out)
            # A result of NaN is skipped on all ranks, and its gradient would stay in the residual.
            residuals = None if item.place in self.decoded else exchange.residuals
            if residuals is not None and mean.isfinite().all():
                self.decoded.add(item.place)
                unsent = choice.left(self.pieces[place])
                residuals.keep(item.identity, unsent, exchange.options.low_pass)
