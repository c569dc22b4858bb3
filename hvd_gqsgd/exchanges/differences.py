"""The exchange of ``error_feedback="marina"``: differences in most steps, whole gradients in some.

In most steps a part of the difference between successive gradients is exchanged, as by any other
selection. A step is a whole one if a coin says so, by a hash of the seed and the step, or if a rank
has no estimates that belong to those of the others. All elements of what gradients differ from
their estimates by then go by an Allreduce, as with EF21 and ``keep=1``.

The choice depends on the coin, the ranks that are here, and a history of estimates. Where a rank
may give up a step between two messages, it is the history of all buckets. So such a rank knows the
messages that follow in each bucket, as soon as it has the result of the first message of one. Where
no rank may, it is the history of the bucket: other pipelines of the same memory decode at moments
that differ between ranks.

With ranks that have left by ``hvd.join()`` all steps are whole ones, as an estimate of the mean has
those of all ranks in it. Horovod must remember their messages by then: see ``exchanges.remaining``.
So they are rehearsed, after those of a step of differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hvd_gqsgd.bucket import Bucket
from hvd_gqsgd.exchanges.allreduce import AllreduceExchange
from hvd_gqsgd.exchanges.base import Exchange, Result, Running, Setup, Terms
from hvd_gqsgd.exchanges.collectives import Collective, Max
from hvd_gqsgd.exchanges.remaining import MOST_REHEARSED, SAFE_RANKS
from hvd_gqsgd.exchanges.selected import SelectedExchange
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.selections import WholeDifferences

__all__ = ["DifferencesExchange", "is_whole", "of_whole_steps"]

T = TypeVar("T")

REST = ("rest.0", "rest.1")
"""The messages in place of a rehearsal."""


def is_whole(options: Options, step: int) -> bool:
    """Whether the coin makes a step a whole one, with the probability ``1 / full_every``."""
    assert options.full_every is not None
    return digest(("whole", options.seed, step)) % options.full_every == 0


def of_whole_steps(options: Options) -> Options:
    """The options of the exchange in a whole step."""
    return dataclasses.replace(
        options, keep=1, select="random", error_feedback="ef21", full_every=None,
        exchange="allreduce",
    )  # fmt: skip


@dataclass
class _Step:
    """The history that a choice depends on, and what the first messages have told of it."""

    known: frozenset[int]
    """Gradients with estimates: all of this rank, or those of a bucket."""
    history: int
    """Of these, when the step or the bucket began."""
    whole: bool | None = None
    """Whether it is a whole one for all buckets; None: no first message has told."""


class DifferencesExchange(SelectedExchange):
    """A part of the differences, or all of what gradients differ from their estimates by.

    Args:
        setup: of all ranks.
        make: makes the exchange of either.
    """

    def __init__(self, setup: Setup, make: Callable[[Setup], Exchange]) -> None:
        super().__init__(setup, make)
        self._whole = _WholeExchange(setup._replace(options=of_whole_steps(setup.options)), make)
        self._ends = dict(zip(self._whole.messages, self.messages, strict=True))
        self._at_risk = self.size > SAFE_RANKS and setup.transport.ranks_may_leave
        if self._at_risk:
            self.messages += REST
        self._remembered: set[tuple[str, tuple[int, ...]]] = set()
        self._step = _Step(frozenset(), 0)

    @property
    def _settled(self) -> Exchange:
        """That of whole gradients: its lanes must hold the sum of all ranks."""
        return self._whole._settled

    def describe(self) -> str:
        """See :class:`Exchange`."""
        return (
            f"{super().describe()}; all of them once in {self.options.full_every} steps, by "
            f"{self._whole.describe()}"
        )

    @property
    def count_of_remaining(self) -> int:
        """See :class:`Exchange`."""
        return self._whole.count_of_remaining

    @property
    def branches(self) -> bool:
        """See :class:`Exchange`."""
        return True

    def begin_step(self) -> None:
        """See :class:`Exchange`."""
        if self._setup.header:
            memory = self._setup.memory
            memory.begin(self.rank, self.size)
            known = memory.together()
            self._step = _Step(known, memory.history(known))

    def to_rehearse(self, bucket: Bucket) -> bool:
        """Whether Horovod does not remember the messages of a whole step, and has to: see
        ``exchanges.remaining``."""
        if not self._at_risk or len(self._remembered) >= MOST_REHEARSED:
            return False
        return _key(bucket) not in self._remembered

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        numbers, whole = yield from self._agree(bucket, terms)
        most = self.options.most_bits  # the one width that is rehearsed
        if not terms.all_here:
            terms.bits = most
        rehearses = terms.rehearses and not (whole and terms.bits == most)
        terms.rehearses = False  # for a permutation: its Allgather is used where all are here
        if whole:
            running = self._named(self._whole.exchange(bucket, terms, numbers))
        else:
            running = self.exchange(bucket, terms, numbers)
        if not (self._at_risk and terms.all_here):
            return (yield from running)
        result: Result | None = None
        error: Exception | None = None
        try:
            result = yield from running
        except Exception as kept:  # raised once the others have their messages
            error = kept
        if rehearses:
            yield from self._named(self._whole.rehearse(bucket, most))
        else:
            for name in REST:
                yield Max(name, torch.zeros(1, dtype=torch.int32, device="cpu"))
        self._remembered.add(_key(bucket))
        if result is None:
            assert error is not None
            raise error
        return result

    def _named(self, running: Generator[Collective, Tensor, T]) -> Generator[Collective, Tensor, T]:
        """A whole exchange whose messages have names by their size, as Horovod remembers one size
        of a name. They end as those of differences, whose connections they take."""
        collective = next(running)
        while True:
            end = self._ends[collective.message]
            name = f"whole.{collective.tensor.numel()}.{end}"
            result = yield dataclasses.replace(collective, message=name)
            try:
                collective = running.send(result)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]

    def _agree(
        self, bucket: Bucket, terms: Terms
    ) -> Generator[Collective, Tensor, tuple[Sequence[int], bool]]:
        """Exchanges the first message; returns the numbers of exchanges before of each gradient,
        and whether the step is a whole one for these."""
        memory, ids = self._setup.memory, bucket.identities
        step = self._step_of(ids)
        # Where all have the same history, they are new to all ranks.
        new = not (step.known.issuperset(ids) and memory.has_estimates(ids))
        turns = [memory.turn(identity) for identity in ids]
        told = yield from self._largest([*turns, step.history, -step.history])
        # A rank that gives up gets no results where they have the header: see ``Exchange.run``.
        if terms.given_up and self._setup.header:
            assert step.whole is not None, "another bucket has the result of its first message"
            return turns, step.whole or new
        *turns, most, least = told.tolist()
        differ = most != -least or most == 0
        whole = differ or not terms.all_here or is_whole(self.options, terms.step)
        if not terms.given_up:
            for identity, turn in zip(ids, turns, strict=True):
                memory.begin_turn(identity, turn)
            memory.forget_estimates(ids if differ else set(ids) - step.known)
            # The first bucket to know does so for all, before any of them has new estimates.
            if differ and step.whole is None:
                memory.forget_estimates(step.known & memory.together())
            step.whole = whole
        return turns, whole or new

    def _step_of(self, ids: Sequence[int]) -> _Step:
        """The step of these gradients: that of all buckets where ranks may give up between two
        messages, and otherwise one of their own, which no other pipeline of the memory changes."""
        memory, alone = self._setup.memory, not self._setup.header
        memory.set_apart(ids, alone)
        if not alone:
            return self._step
        memory.begin(self.rank, self.size)
        known = memory.with_history(ids)
        return _Step(known, memory.history(known))


class _WholeExchange(SelectedExchange):
    """The exchange of a whole step, after the first message."""

    def __init__(self, setup: Setup, make: Callable[[Setup], Exchange]) -> None:
        super().__init__(setup, make)
        self.feedback = WholeDifferences(setup.memory, setup.options)

    def rehearse(self, bucket: Bucket, bits: int) -> Generator[Collective, Tensor, None]:
        """Sends zeros in messages of the sizes of this exchange."""
        assert isinstance(self._inner, AllreduceExchange)
        yield from self._inner.rehearse_all(self._small(bucket, self._setup.take), bits)


def _key(bucket: Bucket) -> tuple[str, tuple[int, ...]]:
    """The name and sizes of a bucket, which the messages of a whole step have in their names."""
    return bucket.name, tuple(item.numel for item in bucket.items)
