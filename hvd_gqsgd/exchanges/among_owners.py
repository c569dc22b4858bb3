"""The exchange of a shard among its owners, one on each node.

It is that of an ordinary bucket among as many ranks as there are nodes, in messages that all ranks
take part in: reductions of norms, to which each owner contributes those of its own shard, and
Alltoalls in which a rank has parts for the other owners of its shard alone. A Sum of codes becomes
a reduce-scatter and an Allgather; integers add up to the same in any order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from hvd_gqsgd.bucket import Bucket
from hvd_gqsgd.errors import GAVE_UP, AgreementError
from hvd_gqsgd.exchanges.allreduce import AllreduceExchange
from hvd_gqsgd.exchanges.base import CodedExchange, Running, Setup, Terms
from hvd_gqsgd.exchanges.collectives import Allgather, Alltoall, Collective, Max, Sum
from hvd_gqsgd.exchanges.contribution import Contribution, everyone
from hvd_gqsgd.exchanges.two_phase import TwoPhaseExchange
from hvd_gqsgd.nodes import Nodes
from hvd_gqsgd.transports.base import Transport

__all__ = ["AmongOwners", "Exchanged", "Owned"]


class Owned(NamedTuple):
    """The shard that this rank owns."""

    bucket: Bucket
    """Its tensors: sums over the ranks of this node."""
    norms: slice
    """In the norms of all shards."""
    owners: tuple[int, ...]
    """Its owner on each node."""


class Exchanged(NamedTuple):
    """The result of an exchange among owners."""

    norms: Tensor
    """The global norms of all shards."""
    last: Tensor | None
    """The last message of the own shard; None without a shard, or after an error."""


@dataclass(frozen=True)
class _Owner:
    """An owner's place among the nodes, in the role of a transport."""

    rank: int
    size: int
    ranks_may_leave: ClassVar[bool] = False


class AmongOwners:
    """The exchange of this rank's shard with its owners on other nodes.

    Args:
        setup: that of all ranks.
        nodes: of all ranks; two or more.

    Raises:
        ValueError: the options leave no levels to this many nodes.
    """

    def __init__(self, setup: Setup, nodes: Nodes) -> None:
        count, transport = len(nodes.members), setup.transport
        self._size, self._take = transport.size, setup.take
        # A sum takes as many messages here, with fewer levels.
        kind = "two_phase" if setup.options.exchange == "auto" else setup.options.exchange
        make = TwoPhaseExchange if kind == "two_phase" else AllreduceExchange
        options = dataclasses.replace(setup.options, exchange=kind)
        owner = cast("Transport", _Owner(nodes.node(transport.rank), count))
        self.exchange: CodedExchange = make(
            setup._replace(options=options, transport=owner, header=0)
        )
        """Of a shard among as many ranks as there are nodes."""

    def run(
        self, owned: Owned | None, bucket: Bucket, num_norms: int, terms: Terms
    ) -> Generator[Collective, Tensor, Exchanged]:
        """Exchanges a shard; an error is kept in the terms.

        Args:
            owned: None if this rank owns no shard of the bucket.
            bucket: of all shards.
            num_norms: norms of all shards.
            terms: of the bucket.
        """
        running = self.exchange.run(owned.bucket, terms) if owned else None
        inner = _Inner(running, terms, everyone(self.exchange.size))
        own = owned.norms if owned else slice(0)

        def of_all(dtype: torch.dtype) -> Tensor:
            """The message of a reduction, with this rank's part."""
            message = self._take(max(num_norms, 1), dtype, bucket.device).zero_()
            if inner.collective is not None:
                message[own] = inner.collective.tensor
            return message

        norms = yield Max("norms", of_all(bucket.norm_dtype))
        inner.send(norms[own].clone())
        if self.exchange.options.norm == "l2":
            squares = yield Sum("squares", of_all(torch.int64))
            inner.send(squares[own])
            with terms.attempt():
                if terms.takes_part:
                    self.exchange.codec(terms.bits).l2_norms(norms, squares)
        across = _Across(
            owned.owners if owned else (), self.exchange.rank, self._size, bucket.device
        )
        if isinstance(inner.collective, Sum):
            summed = yield from across.sum(inner.collective.tensor)
            if summed is None:
                inner.fail(AgreementError(GAVE_UP))
            else:
                inner.send(summed)
        else:
            for message in ("codes", "means"):
                inner.send((yield from across.exchange(message, inner.collective)))
        return Exchanged(norms, inner.last if inner.done else None)


class _Inner:
    """An exchange of a shard that keeps its error.

    Args:
        running: None: of a rank that has no shard.
        terms: of the bucket; they get the error.
        nodes: the contribution of all nodes.
    """

    def __init__(self, running: Running | None, terms: Terms, nodes: Contribution) -> None:
        self._running, self._terms, self._nodes = running, terms, nodes
        self.collective: Collective | None = None if running is None else next(running)
        """The collective to start; None after the last one, and after an error."""
        self.last: Tensor | None = None
        """The result that was sent last."""
        self.done = False
        """Whether it has ended, and all nodes took part."""

    def send(self, result: Tensor) -> None:
        """Goes on to the next collective."""
        if self._running is None or self.collective is None:
            return
        self.last, self.collective = result, None
        try:
            self.collective = self._running.send(result)
        except StopIteration as end:
            self.done = end.value.contribution == self._nodes
            if not self.done:
                self.fail(AgreementError(GAVE_UP))
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends it with an error, unless there is one already."""
        self.collective = None
        self._terms.failure = self._terms.failure or error


class _Parts(NamedTuple):
    """The parts of an Alltoall, in the order of the nodes."""

    tensor: Tensor
    to: Sequence[int]
    """Elements for each owner."""
    of: Sequence[int]
    """Elements from each owner."""


class _Across:
    """Alltoalls among the owners of a shard.

    Args:
        owners: by node; none: this rank has no shard.
        node: that of this rank.
        size: number of all ranks.
        device: of the messages.
    """

    def __init__(self, owners: Sequence[int], node: int, size: int, device: torch.device) -> None:
        self._owners, self._node, self._size = owners, node, size
        # An Alltoall has parts in the order of the ranks, and nodes need not be in that order.
        self._order = sorted(range(len(owners)), key=owners.__getitem__)
        self._nothing = _Parts(torch.empty(0, dtype=torch.int32, device=device), (), ())

    def exchange(
        self, message: str, collective: Collective | None
    ) -> Generator[Collective, Tensor, Tensor]:
        """Takes an Alltoall or an Allgather of owners to its result; None: there is nothing."""
        count, parts = len(self._owners), self._nothing
        if isinstance(collective, Alltoall):
            own = [collective.splits[self._node]] * count
            parts = _Parts(collective.tensor, collective.splits, own)
        elif isinstance(collective, Allgather):
            own = [collective.tensor.numel()] * count
            parts = _Parts(collective.tensor.repeat(count), own, collective.lengths)
        # Ranks without a part have it of one type with the others, as Horovod demands.
        dtype, unit = parts.tensor.dtype, parts.tensor.element_size() // 4
        splits, received = [0] * self._size, [0] * self._size
        for owner, to, of in zip(self._owners, parts.to, parts.of, strict=False):
            splits[owner], received[owner] = to * unit, of * unit
        in_order = self._order == [*range(count)] or not parts.to
        sent = parts.tensor
        if not in_order:
            by_node = sent.split(list(parts.to))
            sent = torch.cat([by_node[node] for node in self._order])
        result = yield Alltoall(message, sent.view(torch.int32), splits, received)
        if result.numel() != sum(received):
            return sent[:0]  # a rank has given up
        result = result.view(dtype)
        if in_order:
            return result
        by_rank = result.split([parts.of[node] for node in self._order])
        return torch.cat([by_rank[self._order.index(node)] for node in range(count)])

    def sum(self, words: Tensor) -> Generator[Collective, Tensor, Tensor | None]:
        """Sums words over the owners: each adds up a segment for all. None: a rank gave up."""
        count = len(self._owners)
        ends = [words.numel() * node // count for node in range(count + 1)]
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        own = lengths[self._node]
        rows = yield from self.exchange("codes", Alltoall("codes", words, lengths))
        fits = rows.numel() == count * own
        sums = rows.view(count, own).sum(0, dtype=words.dtype) if fits else words[:own]
        result = yield from self.exchange("means", Allgather("means", sums, lengths))
        return result if fits and result.numel() == words.numel() else None
