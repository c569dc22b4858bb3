"""The exchange of a part of every gradient, chosen by ``hvd_gqsgd.selections``.

A first message settles the step, which the choice depends on; where a rank leads, it tells the
others its choice in a second one. The chosen elements of a tensor then are a small tensor, which
any other exchange takes over. Its mean is spread over the result, which is 0 elsewhere, or added to
the estimate of the mean.

With error feedback the elements are those of the tensor that it gives. Where the result is an
estimate, the first message tells whether the estimates of all ranks have the same history. If not
(a rank is new, has come back from ``hvd.join()``, or has not taken over a step), all ranks begin
with estimates of zero.

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
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.exchanges.base import (
    Exchange,
    OwnResult,
    Result,
    Running,
    Setup,
    Take,
    Terms,
    WrappingExchange,
    first_message,
)
from hvd_gqsgd.exchanges.collectives import Collective, Max, Sum
from hvd_gqsgd.exchanges.contribution import Contribution
from hvd_gqsgd.exchanges.parts import Parts
from hvd_gqsgd.levels import LEAST_LEVELS, levels_of
from hvd_gqsgd.selections import (
    Chosen,
    Estimates,
    RandomSelection,
    feedback_of,
    selection_of,
)

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
        self.feedback = feedback_of(self.options, setup.memory)
        self._check_levels()
        self._inner = make(setup._replace(header=0, keeps_own=self.options.feeds_rounding))
        self.selection = selection_of(self.options, self.rank, self.size)
        # In one phase a tensor is a shard for each rank.
        self.parts = self.size if self.options.exchange == "one_phase" else 1
        self.counted = self._inner.counted
        chosen = ("chosen",) if self.selection.led else ()
        self._first = first_message(setup, "step")
        self.messages = (self._first, *chosen, *self._inner.messages)

    def _check_levels(self) -> None:
        """Checks that rounding brings estimates nearer, and not away.

        Raises:
            ValueError: the lanes have too few levels.
        """
        options = self.options
        if not options.estimates or options.rounding == "nearest":
            return
        summands = self.size if options.exchange_for(self.size) == "allreduce" else 1
        blocks = options.bits if isinstance(options.bits, BlockBits) else None
        bits = options.least_bits if blocks is None else blocks.rule(self.size)[1]
        levels = levels_of(bits, summands)
        if levels >= LEAST_LEVELS:
            return
        name = "bits"
        if not isinstance(options.bits, int):
            name = f"min_bits of {type(options.bits).__name__}"
        least = (2 * summands * LEAST_LEVELS).bit_length()
        remedies = [f"pass {least} or more as {name}"]
        marina = options.error_feedback == "marina"
        asked = options.exchange == "allreduce" and not (marina or blocks)
        if asked and levels_of(bits, 1) >= LEAST_LEVELS:
            remedies.insert(0, "leave exchange out")
        if levels and not marina:
            remedies.append("pass rounding='nearest'")
        raise ValueError(
            f"error_feedback={options.error_feedback!r} needs {LEAST_LEVELS} levels a side or "
            f"more, and lanes of {bits} bits have {levels} for {self.size} ranks: "
            f"{', or '.join(remedies)}"
        )

    @property
    def _settled(self) -> Exchange:
        return self._inner

    def describe(self) -> str:
        """See :class:`Exchange`."""
        part = f", 1 of {self.selection.size} elements" if self.options.keep < 1 else ""
        return f"{self._inner.describe()}{part}"

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
        return self._inner.to_rehearse(self._small(bucket, _sizes_alone))

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        numbers = yield from self._begin(bucket, terms)
        return (yield from self.exchange(bucket, terms, numbers))

    def exchange(self, bucket: Bucket, terms: Terms, numbers: Sequence[int]) -> Running:
        """Exchanges a bucket after the first message.

        Args:
            bucket, terms: as for ``run``.
            numbers: that the choice depends on, of each gradient.
        """
        pieces: list[Tensor] = []
        with terms.attempt():
            if terms.takes_part:
                pieces = self._pieces(bucket)
        chosen = yield from self._choose(bucket, pieces, terms, numbers)
        small = self._small(bucket, self._setup.take)
        with terms.attempt():
            if terms.takes_part:
                self._fill(small, pieces, chosen)
                self._owed(small, pieces, chosen)
        result = yield from self._inner.run(small, terms)
        if isinstance(result, Parts):
            of_ranks = [self._runs(bucket, numbers, rank) for rank in range(self.size)]
            return _Gathered(self, small, result, pieces, of_ranks)
        return _Spread(self, small, result, pieces, chosen)

    def _begin(self, bucket: Bucket, terms: Terms) -> Generator[Collective, Tensor, list[int]]:
        """Exchanges the first message; returns the number for each gradient that its choice depends
        on: that of the step or, with error feedback, of its exchanges before."""
        memory, ids = self._setup.memory, bucket.identities
        own: list[int] = []
        if self.feedback is not None:
            memory.begin(self.rank, self.size)
            if not self._inner.owes:
                with terms.attempt():
                    memory.forget_owed()
            own = [memory.turn(identity) for identity in ids]
        if isinstance(self.feedback, Estimates):
            # Estimates that have lost their history may differ between ranks.
            memory.forget_estimates({*ids} - memory.with_history(ids))
            # The largest number and the smallest one are the same if all are.
            history = memory.history(ids)
            own += [history, -history]
        told = yield from self._largest(own)
        if self.feedback is None or terms.given_up:
            return [terms.step] * len(ids)
        numbers: list[int] = told.tolist()
        turns, ends = numbers[: len(ids)], numbers[len(ids) :]
        for identity, turn in zip(ids, turns, strict=True):
            memory.begin_turn(identity, turn)
        if ends and (ends[0] != -ends[1] or ends[0] == 0):
            memory.forget_estimates(ids)
        return turns

    def _largest(self, own: Sequence[int]) -> Generator[Collective, Tensor, Tensor]:
        """The largest of all ranks' numbers, by the first message."""
        header = max(self._setup.header, 1)
        message = torch.zeros(header + len(own), dtype=torch.int64, device="cpu")
        message[header:] = torch.tensor(own, dtype=torch.int64, device="cpu")
        told = yield Max(self._first, message)
        return told[header:]

    def _pieces(self, bucket: Bucket) -> list[Tensor]:
        """The tensors to choose from: the gradients, their shards, or those of the feedback."""
        if self.feedback is not None:
            take = self._setup.take
            return [self.feedback.given(item.identity, item.x, take) for item in bucket.items]
        return [x for item in bucket.items for x in item.x.view(-1).chunk(self.parts)]

    def _numels(self, bucket: Bucket) -> list[int]:
        """Elements of each piece."""
        return [item.numel // self.parts for item in bucket.items for _ in range(self.parts)]

    def _choose(
        self,
        bucket: Bucket,
        pieces: Sequence[Tensor],
        terms: Terms,
        numbers: Sequence[int],
    ) -> Generator[Collective, Tensor, list[Chosen]]:
        """The choice for each piece, the same on all ranks but for a permutation."""
        selection, numels = self.selection, self._numels(bucket)
        if isinstance(selection, RandomSelection):
            own = self._runs(bucket, numbers, self.rank if self._disjoint(terms) else 0)
            return [choice for choice in own for _ in range(self.parts)]
        words = selection.words(numels)
        message = self._setup.take(words, torch.int32, bucket.device).zero_()
        with terms.attempt():
            if terms.takes_part and selection.leads(min(numbers, default=0)):
                selection.write(pieces, message)
        told = yield Sum("chosen", message)
        return [] if terms.given_up else selection.read(told, numels)

    def learn(
        self, learned: set[int], item: Item, pieces: Sequence[Tensor], choice: Chosen,
        own: Tensor | None, mean: Tensor, owing: Tensor | None = None,
    ) -> bool:  # fmt: skip
        """Lets error feedback take over the result of a gradient, once.

        A result of NaN is skipped on all ranks, and its gradient would stay in the memory; memory
        that made it NaN is dropped.

        Returns:
            Whether the result is finite; True without error feedback.
        """
        if self.feedback is None:
            return True
        finite = bool(mean.isfinite().all())
        if not finite:
            self.feedback.memory.drop_non_finite(item.identity)
        if finite and item.place not in learned:
            learned.add(item.place)
            with torch.inference_mode(False), torch.no_grad():
                self.feedback.learn(item.identity, pieces[item.place], choice, own, mean)
                if owing is not None:
                    self.feedback.owe(item.identity, pieces[item.place], choice, owing)
        return finite

    def _disjoint(self, terms: Terms) -> bool:
        return self.options.disjoint and terms.all_here

    def _runs(self, bucket: Bucket, numbers: Sequence[int], rank: int) -> list[Chosen]:
        """The runs of each tensor that a rank sends."""
        assert isinstance(self.selection, RandomSelection)
        numels = [item.numel // self.parts for item in bucket.items]
        return self.selection.choose(numels, numbers, bucket.identities, bucket.device, rank)

    def _small(self, bucket: Bucket, take: Take) -> Bucket:
        """A tensor for the chosen elements of each tensor."""
        small = Bucket(bucket.name, (bucket.norm_dtype, bucket.device), bucket.stream)
        for item in bucket.items:
            kept = self.parts * self.selection.groups(item.numel // self.parts).kept
            x = take(kept, self.selection.dtype(item.dtype), bucket.device)
            small.add(Item(x, item.position, item.identity))
        small.close()
        return small

    def _fill(self, small: Bucket, pieces: Sequence[Tensor], chosen: Sequence[Chosen]) -> None:
        """Copies the chosen elements of all pieces; NaN for them if there is one in a piece."""
        targets = (x for item in small.items for x in item.x.chunk(self.parts))
        # A tensor without elements has no norm.
        filled = [each for each in zip(pieces, chosen, targets, strict=True) if each[0].numel()]
        largest = self._setup.take(len(filled), small.norm_dtype, small.device)
        ops.block_max_each([piece for piece, _, _ in filled], None, largest)
        floats = torch.float64 if small.norm_dtype == torch.int64 else torch.float32
        zero_or_nan = largest.view(floats) * 0
        for (piece, choice, out), poison in zip(filled, zero_or_nan, strict=True):
            choice.take(piece, out)
            out.add_(poison)

    def _owed(self, small: Bucket, pieces: Sequence[Tensor], chosen: Sequence[Chosen]) -> None:
        """Gives the chosen elements what this rank owes of them."""
        if self._inner.owes:
            memory = self._setup.memory
            for item, piece, choice in zip(small.items, pieces, chosen, strict=True):
                owed = memory.get("owed", item.identity, piece)
                if owed is not None:
                    item.owed = self._setup.take(item.numel, item.dtype, item.device)
                    choice.take(owed, item.owed)


def _sizes_alone(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without memory."""
    return torch.empty(numel, dtype=dtype, device="meta")


@dataclass(frozen=True)
class _Spread:
    exchange: SelectedExchange
    small: Bucket
    result: Result
    pieces: Sequence[Tensor]
    chosen: Sequence[Chosen]
    learned: set[int] = field(default_factory=set)
    """Places of the tensors that error feedback has taken over."""

    @property
    def contribution(self) -> Contribution:
        return self.result.contribution

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        exchange = self.exchange
        estimates = exchange.feedback if isinstance(exchange.feedback, Estimates) else None
        means = self._empty(items)
        small = [self.small.items[item.place] for item in items]
        self.result.decode(small, means, 1 / self.contribution.count if estimates else scale)
        owns: Sequence[Tensor | None] = [None] * len(items)
        owing: Sequence[Tensor | None] = owns
        if exchange.options.feeds_rounding:
            assert isinstance(self.result, OwnResult)
            owns = parts = self._empty(items)
            self.result.decode_own(small, parts)
            owing = [self.result.owing(item) for item in small]
        for item, mean, own, owed, out in zip(items, means, owns, owing, outs, strict=True):
            place = item.place * exchange.parts + (exchange.rank if exchange.parts > 1 else 0)
            choice = self.chosen[place]
            mean = exchange.selection.scaled(choice, mean)
            own = None if own is None else exchange.selection.scaled(choice, own)
            learned = exchange.learn(self.learned, item, self.pieces, choice, own, mean, owed)
            if estimates and learned:
                estimate = estimates.result(item.identity, self.pieces[place])
                torch.mul(estimate, self.contribution.of_mean(scale), out=out.view(-1))
            else:
                choice.spread(mean, out)

    def _empty(self, items: Sequence[Item]) -> list[Tensor]:
        """A tensor for the chosen elements of each item, or of this rank's shard."""
        small = (self.small.items[item.place] for item in items)
        return [
            torch.empty(item.numel // self.exchange.parts, dtype=item.dtype, device=item.device)
            for item in small
        ]


@dataclass(frozen=True)
class _Gathered:
    exchange: SelectedExchange
    small: Bucket
    result: Parts
    pieces: Sequence[Tensor]
    chosen: Sequence[Sequence[Chosen]]
    """Of each rank."""
    learned: set[int] = field(default_factory=set)

    @property
    def contribution(self) -> Contribution:
        return self.result.contribution

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        exchange = self.exchange
        estimates = exchange.feedback if isinstance(exchange.feedback, Estimates) else None
        for item, out in zip(items, outs, strict=True):
            small = self.small.items[item.place]
            part, total = (
                torch.empty(numel, dtype=small.dtype, device=small.device)
                for numel in (small.numel, item.numel)
            )
            total.zero_()
            own: Tensor | None = None
            for rank, chosen in enumerate(self.chosen):
                choice = chosen[item.place]
                self.result.decode_of(rank, [small], [part])
                choice.add(exchange.selection.scaled(choice, part), total)
                if rank == exchange.rank and exchange.options.feeds_rounding:
                    own = part.clone()
            choice = self.chosen[exchange.rank][item.place]
            mean = total / self.contribution.count if estimates else total
            learned = exchange.learn(self.learned, item, self.pieces, choice, own, mean)
            if estimates and learned:
                estimate = estimates.result(item.identity, total)
                torch.mul(estimate, self.contribution.of_mean(scale), out=out.view(-1))
            else:
                torch.mul(total, scale, out=out.view(-1))
