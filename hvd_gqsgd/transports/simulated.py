"""Many ranks in one process: an operation is done as soon as the last rank has started it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["SimulatedTransport", "SimulatedWorld"]


@dataclass
class _Operation:
    tensors: list[Tensor] = field(default_factory=list)
    done: bool = False


class SimulatedWorld:
    """``size`` ranks that take turns in one thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._started: dict[str, _Operation] = {}

    def transport(self, rank: int) -> SimulatedTransport:
        """The end of rank ``rank``."""
        return SimulatedTransport(self, rank)

    def start(
        self, tensor: Tensor, name: str, reduce_: Callable[[Tensor, Tensor], None]
    ) -> _Operation:
        """One rank's part of an operation; the last one to come reduces for all."""
        operation = self._started.setdefault(name, _Operation())
        operation.tensors.append(tensor)
        if len(operation.tensors) == self.size:
            del self._started[name]
            result = operation.tensors[0]
            for other in operation.tensors[1:]:
                reduce_(result, other)
            for other in operation.tensors[1:]:
                other.copy_(result)
            operation.done = True
        return operation


@dataclass(frozen=True)
class _SimulatedHandle:
    operation: _Operation

    def done(self) -> bool:
        return self.operation.done

    def wait(self) -> None:
        assert self.operation.done, "nobody else can finish it while this thread waits"


@dataclass(frozen=True)
class SimulatedTransport:
    """One rank's end of a :class:`SimulatedWorld`."""

    world: SimulatedWorld
    rank: int
    turn_bytes: int = 0

    @property
    def size(self) -> int:
        """How many ranks the world has."""
        return self.world.size

    @property
    def session(self) -> object:
        """The world: there is no starting it anew."""
        return self.world

    def max_async(self, tensor: Tensor, name: str) -> _SimulatedHandle:
        """See :class:`hvd_gqsgd.transports.Transport`."""

        def maximum(total: Tensor, other: Tensor) -> None:
            torch.maximum(total, other, out=total)

        return _SimulatedHandle(self.world.start(tensor, name, maximum))

    def sum_async(self, tensor: Tensor, name: str) -> _SimulatedHandle:
        """See :class:`hvd_gqsgd.transports.Transport`."""

        def add(total: Tensor, other: Tensor) -> None:
            total.add_(other)

        return _SimulatedHandle(self.world.start(tensor, name, add))

    def pass_turn(self, name: str) -> _SimulatedHandle:
        """Nobody counts here."""
        return _SimulatedHandle(_Operation(done=True))

    def idle(self) -> None:
        """Nothing will come by itself here: the other ranks run in this thread.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("waited for before all simulated ranks had started it")
