"""Full precision within a node, few bits between nodes.

On each node, an Alltoall brings the gradients of every shard to the rank that owns it, which adds
them up in full precision, in the order of the ranks. The owners of one shard, one on each node,
exchange these sums as codes, as if they were the only ranks: lanes have room for nodes, not for
ranks, and the links between nodes carry each shard once. A last Alltoall within the node brings the
result of every shard, still as codes, to all ranks, which decode the same. The bits are those of an
exchange of the nodes' sums among as many ranks, however a bucket is cut.

Reductions are over all ranks. All other messages are for some ranks alone: Alltoalls in which the
other ranks have no part, so that no transport needs groups of its own.

Where the ranks do not know their nodes, as under Horovod, they tell each other the numbers of their
hosts in the first message, which has the agreement too. It comes before all messages that need all
ranks: once a rank has left by ``hvd.join()``, the others exchange without nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.errors import GAVE_UP, AgreementError
from hvd_gqsgd.exchanges.among_owners import AmongOwners, Owned
from hvd_gqsgd.exchanges.base import (
    Exchange,
    Result,
    Running,
    Setup,
    Terms,
    WrappingExchange,
    first_message,
)
from hvd_gqsgd.exchanges.collectives import Collective, Max
from hvd_gqsgd.exchanges.contribution import Contribution, everyone
from hvd_gqsgd.exchanges.parcels import Parcel, exchange_parcels
from hvd_gqsgd.exchanges.remaining import RemainingSum
from hvd_gqsgd.layout import Shard, part_identity, shards
from hvd_gqsgd.nodes import Nodes, host_number, nodes_of_hosts, one_node

__all__ = ["NodeExchange"]


class NodeExchange(WrappingExchange):
    """Sums within nodes, and codes between them.

    Args:
        setup: of all ranks.
        flat: makes the exchange without nodes.
        nodes: of the ranks; None: the ranks tell each other their hosts.
        takes: whether to exchange by these nodes; else a bucket takes the flat exchange.

    Raises:
        ValueError: the options leave no levels to this many nodes, or, before the nodes are known,
            to this many ranks.
    """

    def __init__(
        self,
        setup: Setup,
        flat: Callable[[], Exchange],
        nodes: Nodes | None,
        takes: Callable[[Nodes], bool],
    ) -> None:
        self.options = setup.options
        self.rank, self.size = setup.transport.rank, setup.transport.size
        self._setup, self._nodes, self._takes = setup, nodes, takes
        self._make_flat = flat
        self._told: Nodes | None = None  # hosts stay the same as long as the ranks do
        self._remaining = RemainingSum.of_wide_lanes(setup._replace(header=0))
        self._known: dict[Nodes, AmongOwners] = {}
        self.codec(self.options.most_bits)
        norms = ("norms", "squares") if self.options.norm == "l2" else ("norms",)
        self._hosts = first_message(setup, "hosts")
        # The header travels with hosts even if the nodes are known.
        asks = nodes is None or setup.header > 0
        self.messages = (
            *((self._hosts,) if asks else ()),
            *("inside", *norms, "codes", "means", "results"),
            *(("told",) if setup.may_give_up else ()),
            *(("rest",) if self._remaining.at_risk else ()),
        )

    def describe(self) -> str:
        """See :class:`Exchange`."""
        if self._nodes is None and not self._known:
            return f"by node, as soon as the nodes are known; else {self._flat.describe()}"
        nodes = self._nodes or next(reversed(self._known))
        among = self._among(nodes).exchange
        return f"by node: {among.options.describe(among.size, 'nodes')}, of {self.size} ranks"

    @property
    def count_of_remaining(self) -> int:
        """See :class:`Exchange`."""
        return 1 + len(self._remaining.messages)

    @property
    def branches(self) -> bool:
        """See :class:`Exchange`."""
        return self.messages[0] == self._hosts

    def to_rehearse(self, bucket: Bucket) -> bool:
        """See :class:`Exchange`."""
        return self._remaining.to_rehearse(bucket)

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        nodes, header = self._nodes, self._setup.header
        if self.branches:
            hosts = torch.zeros(header + self.size, dtype=torch.int64, device="cpu")
            hosts[header + self.rank] = host_number()
            hosts = yield Max(self._hosts, hosts)
            if not terms.all_here:
                return (yield from self._remaining.all(bucket, terms))
            if nodes is None:
                numbers = tuple(hosts[header:].tolist())
                if 0 not in numbers:  # as of a rank that gives up before the others tell theirs
                    self._told = nodes_of_hosts(numbers)
                nodes = self._told or one_node(self.size)
                if not self._takes(nodes):
                    return (yield from self._padded(self._flat.run(bucket, terms), bucket))
        assert nodes is not None
        result = yield from self._by_node(bucket, terms, nodes)
        failed = False
        if self._setup.may_give_up:
            # The results reach a node alone: all ranks must lose a bucket, or none.
            lost = torch.tensor([int(result is None)], dtype=torch.int32, device="cpu")
            told = yield Max("told", lost)
            failed = not terms.given_up and bool(told)
        if self._remaining.at_risk and terms.rehearses:
            yield from self._remaining.rehearse_alone(bucket)
        elif self._remaining.at_risk:
            yield Max("rest", torch.zeros(1, dtype=torch.int32, device="cpu"))
        terms.raise_failure()
        if failed or result is None:
            raise AgreementError(GAVE_UP)
        return result

    def _by_node(
        self, bucket: Bucket, terms: Terms, nodes: Nodes
    ) -> Generator[Collective, Tensor, Result | None]:
        """Exchanges a bucket; None: this rank did not take part, or another one."""
        block_size = self.options.block_size
        place = bucket.layout(block_size, terms.bits)
        members, among = nodes.of(self.rank), self._among(nodes)
        # By owner, on this node. A bucket of few blocks leaves some shards empty.
        cut = shards(place.tensors, nodes.shards)
        owned_by = ((rank, nodes.shard(rank)) for rank in members)
        parts = {rank: cut[g] for rank, g in owned_by if g is not None and cut[g].parts}
        own, owned, full = parts.get(self.rank), None, _type_of(bucket)
        others = [rank for rank in members if rank != self.rank]
        summands = yield from exchange_parcels(
            self._setup, terms, "inside", bucket.device,
            to={rank: Parcel(parts[rank].numel, full) for rank in others if rank in parts},
            of={rank: Parcel(own.numel, full) for rank in others} if own else {},
            write=functools.partial(_cut, bucket, parts),
        )  # fmt: skip
        if own:
            sums = self._setup.take(own.numel, _sum_type(bucket), bucket.device)
            with terms.attempt():
                if summands is not None and terms.takes_part:
                    _add([summands.get(rank) for rank in members], _slices(bucket, own), sums)
            owners = nodes.owners(members.index(self.rank))
            owned = Owned(_shard(bucket, own, block_size, sums), own.norms, owners)
        norms, message = yield from among.run(owned, bucket, place.num_norms, terms)

        buckets = {rank: _shard(bucket, shard, block_size) for rank, shard in parts.items()}
        last = {
            rank: among.exchange.last_message(each, terms.bits) for rank, each in buckets.items()
        }
        parcels = {rank: Parcel(each.length, each.dtype) for rank, each in last.items()}
        results = yield from exchange_parcels(
            self._setup, terms, "results", bucket.device,
            to=dict.fromkeys(others, parcels[self.rank]) if own else {},
            of={rank: parcel for rank, parcel in parcels.items() if rank != self.rank},
            write=functools.partial(_copy, message),
        )  # fmt: skip
        if results is None:
            return None
        if message is not None:
            results[self.rank] = message
        with terms.attempt():
            read = [
                (shard, buckets[rank], last[rank].read(norms[shard.norms], results[rank]))
                for rank, shard in parts.items()
            ]
        return _ByNode(everyone(self.size), read) if terms.takes_part else None

    def _padded(self, running: Running, bucket: Bucket) -> Running:
        """The exchange without nodes, in as many messages: Horovod's operations are counted. They
        have names of their own, as a rank that gives up starts them all at once."""
        left = len(self.messages) - 1
        collective = next(running)
        result: Result | None = None
        error: Exception | None = None
        while result is None and error is None:
            reduced = yield collective
            left -= 1
            try:
                collective = running.send(reduced)
            except StopIteration as end:
                result = end.value
            except Exception as kept:  # raised once the others have their messages
                error = kept
        norms = bucket.layout(self.options.block_size, self.options.most_bits).num_norms
        for number in range(left):
            zeros = torch.zeros(max(norms, 1), dtype=bucket.norm_dtype, device=bucket.device)
            yield Max(f"pad.{number}", zeros)
        if result is None:
            assert error is not None
            raise error
        return result

    def _among(self, nodes: Nodes) -> AmongOwners:
        if nodes not in self._known:
            self._known[nodes] = AmongOwners(self._setup, nodes)
        return self._known[nodes]

    @functools.cached_property
    def _flat(self) -> Exchange:
        return self._make_flat()

    @property
    def _settled(self) -> Exchange:
        """That among nodes; before the nodes are known, the flat one."""
        return self._flat if self._nodes is None else self._among(self._nodes).exchange


@dataclass(frozen=True)
class _ByNode:
    contribution: Contribution
    shards: Sequence[tuple[Shard, Bucket, Result]]

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        flat = {item.place: out.view(-1) for item, out in zip(items, outs, strict=True)}
        for shard, bucket, result in self.shards:
            wanted = [
                (item, flat[tensor][first:last])
                for item, (tensor, first, last) in zip(bucket.items, shard.parts, strict=True)
                if tensor in flat
            ]
            if wanted:
                result.decode([item for item, _ in wanted], [out for _, out in wanted], scale)


def _type_of(bucket: Bucket) -> torch.dtype:
    """The type that gradients travel as within a node: their own, if they have one in common."""
    types = {item.dtype for item in bucket.items}
    return types.pop() if len(types) == 1 else _sum_type(bucket)


def _sum_type(bucket: Bucket) -> torch.dtype:
    return torch.float64 if bucket.norm_dtype == torch.int64 else torch.float32


def _cut(bucket: Bucket, shards: Mapping[int, Shard], parcels: Mapping[int, Tensor]) -> None:
    """Writes each shard of the gradients to its parcel."""
    for rank, parcel in parcels.items():
        parts = _slices(bucket, shards[rank])
        if len({part.dtype for part in parts} | {parcel.dtype}) > 1:
            parts = [part.to(parcel.dtype) for part in parts]
        torch.cat(parts, out=parcel)


def _slices(bucket: Bucket, shard: Shard) -> list[Tensor]:
    """This rank's gradients in a shard."""
    return [bucket.items[tensor].x.view(-1)[a:b] for tensor, a, b in shard.parts]


def _add(summands: Sequence[Tensor | None], own: Sequence[Tensor], sums: Tensor) -> None:
    """Adds up the gradients of the ranks of a node, in their order; None: those of this rank."""
    pieces = sums.split([part.numel() for part in own])
    for place, summand in enumerate(summands):
        targets = [sums] if summand is not None else pieces
        for target, x in zip(targets, own if summand is None else [summand], strict=True):
            if place:
                target += x
            else:
                target.copy_(x)


def _copy(message: Tensor | None, copies: Mapping[int, Tensor]) -> None:
    for copy in copies.values():
        assert message is not None, "a rank that takes part has the result of its shard"
        copy.copy_(message)


def _shard(
    bucket: Bucket, shard: Shard, block_size: int | None, sums: Tensor | None = None
) -> Bucket:
    """The tensors of a shard, in ``sums``; without, for their sizes alone."""
    made = Bucket(bucket.name, (bucket.norm_dtype, bucket.device), bucket.stream)
    begin = 0
    for tensor, first, last in shard.parts:
        item = bucket.items[tensor]
        length = last - first
        x = item.x.view(-1)[first:last] if sums is None else sums[begin : begin + length]
        made.add(Item(x, len(made.items), part_identity(item.identity, first, block_size)))
        begin += length
    made.close()
    return made
