"""Many ranks in one process: an operation is done as soon as the last rank has started it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["SimulatedTransport", "SimulatedWorld"]


Combine = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass
class _Operation:
    tensors: dict[int, Tensor] = field(default_factory=dict)  # by rank
    results: Sequence[Tensor] = ()


class SimulatedWorld:
    """``size`` ranks that take turns in one thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._started: dict[str, _Operation] = {}

    def transport(self, rank: int) -> SimulatedTransport:
        """The end of rank ``rank``."""
        return SimulatedTransport(self, rank)

    def start(self, rank: int, tensor: Tensor, name: str, combine: Combine) -> _SimulatedHandle:
        """One rank's part of an operation; the last one to come makes the results of all."""
        operation = self._started.setdefault(name, _Operation())
        assert rank not in operation.tensors, f"{name} was started twice"
        _finish(tensor)
        operation.tensors[rank] = tensor
        if len(operation.tensors) == self.size:
            del self._started[name]
            operation.results = combine([operation.tensors[r] for r in range(self.size)])
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
        assert self.operation.results, "nobody else can finish it while this thread waits"
        return self.operation.results[self.rank]


@dataclass(frozen=True)
class SimulatedTransport:
    """One rank's end of a :class:`SimulatedWorld`."""

    world: SimulatedWorld
    rank: int
    mpi_handle: ClassVar[None] = None
    nccl: ClassVar[None] = None
    ranks_may_leave: ClassVar[bool] = False

    @property
    def size(self) -> int:
        """How many ranks the world has."""
        return self.world.size

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

    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> _SimulatedHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""

        def deal(tensors: list[Tensor]) -> Sequence[Tensor]:
            return [part.reshape(-1) for part in torch.stack(tensors).split(list(splits), dim=1)]

        return self.world.start(self.rank, tensor, name, deal)

    def allgather_async(
        self, tensor: Tensor, lengths: Sequence[int], name: str
    ) -> _SimulatedHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self.world.start(
            self.rank, tensor, name, lambda tensors: [torch.cat(tensors)] * len(tensors)
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


def _reduce(operation: Callable[..., Tensor]) -> Combine:
    """In place, on all ranks."""

    def reduce_(tensors: list[Tensor]) -> Sequence[Tensor]:
        result = tensors[0]
        for other in tensors[1:]:
            operation(result, other, out=result)
        for other in tensors[1:]:
            other.copy_(result)
        return tensors

    return reduce_
