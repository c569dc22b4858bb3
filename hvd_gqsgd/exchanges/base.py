"""The interface of exchanges: generators of collectives that end in a result to decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.codecs import Codec, make_codec
from hvd_gqsgd.exchanges.collectives import Collective, Max, Sum
from hvd_gqsgd.exchanges.contribution import Contribution
from hvd_gqsgd.options import Options
from hvd_gqsgd.selections.memory import Memory
from hvd_gqsgd.transports.base import Transport

__all__ = [
    "Exchange",
    "LastMessage",
    "OwnResult",
    "Result",
    "Running",
    "Setup",
    "Take",
    "Terms",
    "WrappingExchange",
    "first_message",
]

# Squares are summed in 64 bits, in the units of native/core/l2.h.
MOST_SQUARES = 2**33

Take = Callable[[int, torch.dtype, torch.device], Tensor]
"""Flat memory with so many elements, undefined."""


class Setup(NamedTuple):
    """The surroundings of an exchange."""

    options: Options
    """The same on all ranks."""
    transport: Transport
    """For its rank, its size, and native parts that it may have."""
    take: Take
    """The source of memory for messages."""
    header: int
    """Words that stay free in front of the first message, for an agreement."""
    may_give_up: bool
    """Whether ranks may give up a step between two collectives; then messages must tell whether
    their rank took part."""
    memory: Memory
    """The tensors that this rank keeps for error feedback."""
    keeps_own: bool = False
    """Whether results have the codes of this rank too, and their means nothing that is rounded and
    lost; see ``OwnResult``."""


def first_message(setup: Setup, name: str) -> str:
    """The last part of the name of an exchange's first message.

    One name for all exchanges where the message has the agreement: ranks with different options,
    which may take different exchanges, meet there.

    Args:
        setup: of the exchange.
        name: of a message without the agreement.
    """
    return "first" if setup.header else name


@dataclass
class Terms:
    """The terms of a bucket's exchange.

    The step and the width are proposals of this rank until its first message is back, and those of
    all ranks from then on.
    """

    step: int
    bits: int
    behind: int | None = None
    """Tensors that wait behind the bucket on all ranks; known with the first message."""
    all_here: bool = True
    """Whether no rank has left by ``hvd.join()``; known with the first message too."""
    rehearses: bool = False
    """Whether the ranks use the message that is left to them once one of them has left; a proposal
    like the step."""
    given_up: bool = False
    """Whether this rank has given up the step, and sends only the messages that others wait for."""
    failure: Exception | None = None
    """An error of this rank alone, raised once its messages have told the others."""

    @property
    def takes_part(self) -> bool:
        """Whether this rank's messages mean something."""
        return not self.given_up and self.failure is None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Keeps an error as ``failure``: raised at once, it would leave the others waiting."""
        try:
            yield
        except Exception as error:
            self.failure = error

    def raise_failure(self) -> None:
        """Raises the error that was kept."""
        if self.failure is not None:
            raise self.failure


class Result(Protocol):
    """An exchanged bucket."""

    @property
    def contribution(self) -> Contribution:
        """The ranks that took part."""

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        """Writes ``scale`` times the sum over these ranks to ``outs``, for some tensors."""


@runtime_checkable
class OwnResult(Result, Protocol):
    """A result that has this rank's part of the sum too."""

    def decode_own(self, items: Sequence[Item], outs: Sequence[Tensor]) -> None:
        """Writes this rank's part of the sum, as the others have decoded it, to ``outs``."""

    def owing(self, item: Item) -> Tensor | None:
        """The amount that this rank owes of the mean of a tensor from now on, flat; None: ranks
        owe nothing."""


Running = Generator[Collective, Tensor, Result]
"""An exchange of one bucket: yields each collective, and is sent its result."""


class LastMessage(NamedTuple):
    """The result of an exchange's last collective, from which any rank can decode the bucket."""

    length: int
    dtype: torch.dtype
    read: Callable[[Tensor, Tensor], Result]
    """The exchanged bucket, given the global norms and the message."""


class Exchange(ABC):
    """A way of buckets from local gradients to a result that is the same on all ranks.

    Raises:
        ValueError: the options leave no levels to this many ranks.
    """

    messages: tuple[str, ...]
    """The collectives of a bucket, in their order."""
    alone: ClassVar[bool] = False
    """Whether nothing is sent, as there is one rank."""
    owes: ClassVar[bool] = False
    """Whether ranks keep what they owe of a mean; see ``owing``."""
    counted: int = 1
    """Times that bytes on the wire are counted; see ``Stats``."""

    def __init__(self, setup: Setup) -> None:
        self.options = setup.options
        self.rank, self.size = setup.transport.rank, setup.transport.size
        self._header = setup.header
        self._may_give_up = setup.may_give_up
        self._take = setup.take
        self._codecs: dict[int, Codec] = {}
        self.codec(setup.options.most_bits)

    @property
    @abstractmethod
    def summands(self) -> int:
        """Codes whose sum a lane must hold."""

    @abstractmethod
    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """Exchanges a closed bucket.

        Once ``terms.given_up`` is set, the generator is sent no results: it must not look at them,
        and goes on with messages of the same sizes that tell the other ranks to ignore them. Where
        it ``branches``, another bucket of the step has the result of its first message by then. It
        does so too after a failure of ``terms.attempt``, which it raises after the last message.

        Raises:
            AgreementError: messages do not fit together.
        """

    def codec(self, bits: int) -> Codec:
        """The codec for lanes of this width.

        Raises:
            ValueError: the lanes are too narrow.
        """
        if bits not in self._codecs:
            self._codecs[bits] = make_codec(
                self.options, bits, summands=self.summands, rank=self.rank, world_size=self.size
            )
        return self._codecs[bits]

    def describe(self) -> str:
        """Names the exchange, its ranks and its levels per side."""
        return self.options.describe(self.size)

    @property
    def count_of_remaining(self) -> int:
        """Collectives of a bucket once a rank has left by ``hvd.join()``."""
        return len(self.messages)

    @property
    def branches(self) -> bool:
        """Whether the result of the first message decides which messages follow."""
        return False

    def begin_step(self) -> None:  # noqa: B027
        """Called before the buckets of a step are run."""

    def to_rehearse(self, bucket: Bucket) -> bool:
        """Whether this rank proposes the rehearsal of ``Terms.rehearses``."""
        return False

    def check(self, numel: int) -> None:
        """Checks that a tensor of ``numel`` elements can be exchanged.

        Raises:
            ValueError: it cannot.
        """
        if self.options.norm == "l2":
            squares = min(self.options.block_size or numel, numel) * self.size
            if squares > MOST_SQUARES:
                raise ValueError(
                    f"norm='l2' takes blocks of at most {MOST_SQUARES // self.size} elements on "
                    f"{self.size} ranks, got block_size={self.options.block_size} for {numel} "
                    "elements"
                )


class WrappingExchange(Exchange):
    """An exchange whose codes are those of another one."""

    @property
    @abstractmethod
    def _settled(self) -> Exchange:
        """The exchange whose lanes a step's width is chosen for."""

    @property
    def summands(self) -> int:
        """Those of the other exchange."""
        return self._settled.summands

    def codec(self, bits: int) -> Codec:
        """See :class:`Exchange`."""
        return self._settled.codec(bits)

    def check(self, numel: int) -> None:
        """See :class:`Exchange`."""
        self._settled.check(numel)


class CodedExchange(Exchange):
    """An exchange of messages: global norms, and then codes on their scale."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._first = first_message(setup, "norms")
        squares = ("squares",) if setup.options.norm == "l2" else ()
        self.messages = (self._first, *squares, *self.code_messages)

    code_messages: ClassVar[tuple[str, ...]]
    """The collectives after the norms."""

    def last_message(self, bucket: Bucket, bits: int) -> LastMessage:
        """The last message of a closed bucket; for exchanges whose result is on all ranks."""
        raise NotImplementedError(f"{type(self).__name__} leaves each rank a result of its own")

    def _norms(self, bucket: Bucket, terms: Terms) -> Generator[Collective, Tensor, Tensor]:
        """Exchanges the concatenated block norms of all tensors."""
        codec, header = self.codec(terms.bits), self._header
        layout = bucket.layout(self.options.block_size, terms.bits)
        message = self._take(header + layout.num_norms, bucket.norm_dtype, bucket.device)
        with terms.attempt():
            codec.norms(bucket.tensors, message[header:])
        norms = (yield Max(self._first, message))[header:]
        if self.options.norm == "l2":
            squares = self._take(layout.num_norms, torch.int64, bucket.device)
            with terms.attempt():
                if terms.takes_part:
                    codec.squares(bucket.tensors, norms, squares)
            summed = yield Sum("squares", squares)
            with terms.attempt():
                if terms.takes_part:
                    codec.l2_norms(norms, summed)
        return norms
