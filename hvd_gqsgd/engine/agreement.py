"""The agreement of the ranks on each bucket: a header that is written, read, verified and refused.

The header is Max-reduced. A digest k travels as the pair k and 2^31 - 1 - k, whose maxima add up to
2^31 - 1 if and only if all ranks have the same k. All ranks see the same maxima, so all come to the
same verdict. A rank that has joined contributes zeros, which change neither.

There are two ways to send it. ``WithNorms`` puts it in front of the norms, which costs no message
of its own; the transport must tell ranks when their messages differ in length, as Horovod does.
``Ahead`` sends it first, in a message whose length depends on nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hvd_gqsgd.bucket import Bucket
from hvd_gqsgd.codecs.bit_schedule import Schedule
from hvd_gqsgd.errors import REFUSED, AgreementError
from hvd_gqsgd.exchanges import Exchange, Terms
from hvd_gqsgd.exchanges.base import Running
from hvd_gqsgd.exchanges.collectives import Kept, Max
from hvd_gqsgd.exchanges.contribution import everyone
from hvd_gqsgd.nodes import Nodes, host_number, nodes_of_hosts
from hvd_gqsgd.option_differences import apart, digests, mark_words, marked_apart, message
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.transports.base import Transport

__all__ = [
    "HEADER",
    "ORDER",
    "Agreement",
    "AgreementProtocol",
    "Ahead",
    "WithNorms",
    "check",
    "find_nodes",
    "refusal",
    "refuse",
]  # fmt: skip

HEADER = 16
"""Words of a header: more than it holds, so that the rest of the message begins on a cache line."""

ORDER = (
    "without named_parameters tensors are told apart by their order of arrival, so pass "
    "GlobalQSGD(named_parameters=model.named_parameters()) if that may differ between ranks"
)

_FULL = 2**31 - 1


@dataclass(frozen=True)
class Agreement:
    """The step, its width and its schedule: the elementwise maximum of the ranks' proposals."""

    step: int
    bits: int
    schedule: tuple[int, ...]
    """State of the bit width's schedule; see ``Schedule.state``."""
    behind: int = 0
    """How many tensors wait behind the bucket: the least of all ranks'."""
    all_here: bool = True
    """Whether no rank has left by ``hvd.join()``."""


class AgreementProtocol(ABC):
    """A way to send the header of each bucket.

    Args:
        options: of this rank.
        exchange: of this rank.
        transport: which the exchange goes over.
        settle: called with each agreement, before the bucket's next message.
    """

    header_in_norms: ClassVar[int]
    """Words in front of the first message of an exchange that hold the header."""
    messages: ClassVar[tuple[str, ...]]
    """Collectives before those of the exchange."""
    may_give_up: ClassVar[bool]
    """Whether ranks may give up a step between two collectives."""
    advice: ClassVar[str]
    """A remedy, if the ranks hand in different tensors."""

    def __init__(
        self,
        options: Options,
        exchange: Exchange,
        transport: Transport,
        settle: Callable[[Agreement], None],
    ) -> None:
        self._options = options
        self._exchange = exchange
        self._settle = settle
        # By name too, as one host may lack a native part that another one has.
        names = type(exchange).__name__, type(transport).__name__
        self._digest = digest((options.digest(), *names))
        self._marks = mark_words(options)

    @abstractmethod
    def run(self, bucket: Bucket, proposal: Agreement, terms: Terms) -> Running:
        """Exchanges a closed bucket; the ranks agree on the way.

        Raises:
            AgreementError: on all ranks, if they disagree.
        """

    def _write(self, header: Tensor, bucket: Bucket, proposal: Agreement, terms: Terms) -> None:
        items = tuple((item.identity, item.scale, item.device.type) for item in bucket.items)
        _write(
            header,
            [
                *(*_pair(self._digest), *_pair(digest(items))),
                # A rank that has left puts 0 in place of the first one.
                *(-1 - proposal.behind, int(terms.rehearses)),
                *(proposal.step, proposal.bits, *self._marks, *proposal.schedule),
            ],
        )

    def _read(self, header: Tensor, bucket: Bucket, proposal: Agreement, terms: Terms) -> None:
        """Verifies a reduced header, and sets the terms accordingly."""
        numbers = header.tolist()
        layout, no_layout, present, rehearses, step, bits, mark, no_mark, *more = numbers[2:]
        if not _agrees(numbers):
            text = message(self._options, marked_apart(self._options, (mark, no_mark)))
            raise AgreementError(f"{bucket.name}: {text}")
        if layout + no_layout != _FULL:
            raise AgreementError(
                f"{bucket.name}: the ranks handed in different tensors, or in another order; "
                f"{self.advice}"
            )
        schedule = tuple(more[: Schedule.STATE_WORDS])
        agreed = Agreement(step, bits, schedule, max(-1 - present, 0), present < 0)
        # The number of the next step travels in 32 bits too.
        sent = (step, step + 1, *agreed.schedule)
        if min(sent) < 0 or max(sent) >= 2**31:
            raise AgreementError(f"{bucket.name}: a rank sent invalid numbers: {agreed}")
        # The largest of all ranks' is no less than this one's, which is enough for all of them.
        if not proposal.bits <= bits <= max(proposal.bits, self._options.most_bits):
            raise AgreementError(
                f"{bucket.name}: a rank requested lanes of {bits} bits; the options allow "
                f"{self._options.least_bits} to {self._options.most_bits} bits"
            )
        self._exchange.codec(bits)
        terms.step, terms.bits, terms.all_here = step, bits, agreed.all_here
        terms.behind, terms.rehearses = agreed.behind, rehearses > 0
        if not terms.given_up:
            self._settle(agreed)


class WithNorms(AgreementProtocol):
    """The header travels in front of the norms."""

    header_in_norms = HEADER
    messages = ()
    may_give_up = True
    advice = ORDER

    def run(self, bucket: Bucket, proposal: Agreement, terms: Terms) -> Running:
        """See :class:`AgreementProtocol`."""
        exchange = self._exchange.run(bucket, terms)
        norms = next(exchange)
        self._write(norms.tensor[:HEADER], bucket, proposal, terms)
        reduced = yield norms
        if not terms.given_up:
            self._read(reduced[:HEADER], bucket, proposal, terms)
        return (yield from _rest(exchange, reduced))


class Ahead(AgreementProtocol):
    """The header travels in a message of its own, ahead of all others."""

    header_in_norms = 0
    messages = ("header",)
    # All ranks learn at once that one does not take part.
    may_give_up = False
    advice = (
        "shapes, types, and whether the mean or the sum is asked for must be the same on all ranks"
    )

    def run(self, bucket: Bucket, proposal: Agreement, terms: Terms) -> Running:
        """See :class:`AgreementProtocol`."""
        exchange = self._exchange.run(bucket, terms)
        first = next(exchange)
        # On the host, wherever the tensors are: the host reads the reduced header.
        header = torch.empty(HEADER, dtype=torch.int64, device="cpu")
        if terms.failure is None:
            self._write(header, bucket, proposal, terms)
        else:
            header = refusal()
        reduced = yield (Kept if self._exchange.alone else Max)("header", header)
        terms.raise_failure()
        # Also for a bucket that was lost meanwhile: its collectives run if those of all ranks do.
        self._read(reduced, bucket, proposal, terms)
        result = yield from _rest(exchange, (yield first))
        # All were here by the header; a rank that had an error since then sends no codes.
        if terms.all_here and result.contribution != everyone(self._exchange.size):
            raise AgreementError(REFUSED)
        return result


def _rest(exchange: Running, result: Tensor) -> Running:
    """An exchange after its first message, given the result of that."""
    while True:
        try:
            collective = exchange.send(result)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        result = yield collective


def refusal() -> Tensor:
    """A header that tells the other ranks that this one cannot take part."""
    return _header([_FULL, _FULL])  # no number and its complement


def refuse(transport: Transport, name: str) -> None:
    """Sends a refusal to the other ranks, which wait for this one's header of this name."""
    with _plain_tensors():
        _max(transport, refusal(), name)


def check(transport: Transport, options: Options, name: str) -> None:
    """Checks that all ranks have the same options.

    Raises:
        AgreementError: on all ranks, if they have not, or if a rank has refused.
    """
    header = _header(_pair(options.digest()))
    _max(transport, header, name)
    if _agrees(header.tolist()):
        return
    # All ranks have come here, those of other builds too.
    numbers = [_pair(number) for number in digests(options)]
    pairs = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    _max(transport, pairs, name)
    same = [both == _FULL for both in pairs.sum(1).tolist()]
    raise AgreementError(message(options, apart(options, same)))


def find_nodes(transport: Transport, name: str) -> Nodes:
    """The nodes of all ranks, which must call this together."""
    with _plain_tensors():
        hosts = torch.zeros(transport.size, dtype=torch.int64, device="cpu")
        hosts[transport.rank] = host_number()
        _max(transport, hosts, name)
        return nodes_of_hosts(tuple(hosts.tolist()))


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Within torch.func and FakeTensorMode even a new tensor has no memory to send."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


def _max(transport: Transport, message: Tensor, name: str) -> None:
    handle = transport.max_async(message, name)
    while not handle.done():
        transport.idle()
    handle.wait()


def _agrees(header: list[int]) -> bool:
    """Whether all ranks have the same first number, from the maxima.

    Raises:
        AgreementError: a rank has refused.
    """
    number, complement = header[:2]
    if number == complement == _FULL:
        raise AgreementError(REFUSED)
    return number + complement == _FULL


def _pair(number: int) -> list[int]:
    return [number, _FULL - number]


def _header(numbers: list[int]) -> Tensor:
    header = torch.empty(HEADER, dtype=torch.int64, device="cpu")
    _write(header, numbers)
    return header


def _write(header: Tensor, numbers: list[int]) -> None:
    assert len(numbers) <= HEADER
    padded = numbers + [0] * (HEADER - len(numbers))
    header.copy_(torch.tensor(padded, dtype=header.dtype, device="cpu"), non_blocking=True)
