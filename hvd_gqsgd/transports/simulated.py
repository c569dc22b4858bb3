"""Many ranks in one process: an operation is done as soon as the last rank has started it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hvd_gqsgd.nodes import Nodes, one_node

__all__ = ["SimulatedTransport", "SimulatedWorld"]


Combine = Callable[[list[Tensor], list[Sequence[int]]], Sequence[Tensor]]
"""The results of all ranks, from their tensors and their splits."""


@dataclass
class _Operation:
    tensors: dict[int, Tensor] = field(default_factory=dict)  # by rank
    splits: dict[int, Sequence[int]] = field(default_factory=dict)
    results: Sequence[Tensor] = ()


class SimulatedWorld:
    """``size`` ranks that take turns in one thread, on one node unless ``nodes`` are given."""

    def __init__(self, size: int, nodes: Nodes | None = None) -> None:
        self.size = size
        self.nodes = nodes or one_node(size)
        self._started: dict[str, _Operation] = {}

    def transport(self, rank: int) -> SimulatedTransport:
        """The end of rank ``rank``."""
        return SimulatedTransport(self, rank)

    def start(
        self, rank: int, tensor: Tensor, name: str, combine: Combine, splits: Sequence[int] = ()
    ) -> _SimulatedHandle:
        """One rank's part of an operation; the last one to come makes the results of all."""
        operation = self._started.setdefault(name, _Operation())
        assert rank not in operation.tensors, f"{name} was started twice"
        _finish(tensor)
        operation.tensors[rank], operation.splits[rank] = tensor, splits
        if len(operation.tensors) == self.size:
            del self._started[name]
            ranks = range(self.size)
            operation.results = combine(
                [operation.tensors[r] for r in ranks], [operation.splits[r] for r in ranks]
            )
            operation.tensors.clear()
            _finish(tensor)
        return _SimulatedHandle(operation, rank)


@dataclass(frozen=True)
class _SimulatedHandle:
    operation: _Operation
    rank: int

    def done(self) -> bool:
        return bool(self.operation.results)

    def wait(self) -> Tensor:
        assert self.operation.results, "no other rank can run while this thread waits"
        return self.operation.results[self.rank]


@dataclass(frozen=True)
class SimulatedTransport:
    """One rank's end of a :class:`SimulatedWorld`."""

    world: SimulatedWorld
    rank: int
    mpi_handle: ClassVar[None] = None
    nccl: ClassVar[None] = None
    ranks_may_leave: ClassVar[bool] = False
    absences: ClassVar[int] = 0

    @property
    def size(self) -> int:
        """How many ranks the world has."""
        return self.world.size

    @property
    def nodes(self) -> Nodes:
        """Those of the world."""
        return self.world.nodes

    @property
    def session(self) -> object:
        """The world: there is no starting it anew."""
        return self.world

    def max_async(self, tensor: Tensor, name: str) -> _SimulatedHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self.world.start(self.rank, tensor, name, _reduce(torch.maximum))

    def sum_async(self, tensor: Tensor, name: str) -> _SimulatedHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self.world.start(self.rank, tensor, name, _reduce(torch.add))

    def alltoall_async(
        self, tensor: Tensor, splits: Sequence[int], name: str,
        received: Sequence[int] | None = None,
    ) -> _SimulatedHandle:  # fmt: skip
        """See :class:`hvd_gqsgd.transports.base.Transport`."""

        return self.world.start(self.rank, tensor, name, _deal, tuple(splits))

    def allgather_async(
        self, tensor: Tensor, lengths: Sequence[int], name: str
    ) -> _SimulatedHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self.world.start(
            self.rank, tensor, name, lambda tensors, _: [torch.cat(tensors)] * len(tensors)
        )

    def idle(self, waited: float = 0.0) -> None:
        """Nothing will come by itself here: the other ranks run in this thread.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("waited for before all simulated ranks had started it")


def _finish(tensor: Tensor) -> None:
    """On a GPU ranks have streams of their own, and would not wait for each other."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _deal(tensors: list[Tensor], splits: list[Sequence[int]]) -> Sequence[Tensor]:
    """The parts for each rank, in the order of the ranks that they come from."""
    sent = [x.split(list(own)) for x, own in zip(tensors, splits, strict=True)]
    return [torch.cat(parts) for parts in zip(*sent, strict=True)]


def _reduce(operation: Callable[..., Tensor]) -> Combine:
    """In place, on all ranks."""

    def reduce_(tensors: list[Tensor], _: list[Sequence[int]]) -> Sequence[Tensor]:
        result = tensors[0]
        for other in tensors[1:]:
            operation(result, other, out=result)
        for other in tensors[1:]:
            other.copy_(result)
        return tensors

    return reduce_
