"""The collectives that exchanges are made of: each carries one message of a bucket."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hvd_gqsgd.transports.base import Done, Handle, Transport

__all__ = ["Allgather", "Alltoall", "Collective", "Kept", "Max", "NativeCall", "Sum"]


@dataclass(frozen=True)
class Collective(ABC):
    """A collective that an exchange asks for."""

    message: str
    """Ends the name of the operation."""
    tensor: Tensor
    """The data of this rank; reduced in place by ``Max`` and ``Sum``."""

    @property
    def inside(self) -> bool:
        """Whether it moves data within nodes only."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, counted as those of an Allreduce; see ``Stats``."""
        return self.tensor.nbytes

    @abstractmethod
    def start(self, transport: Transport, name: str) -> Handle:
        """Starts it, and returns at once."""


class Max(Collective):
    """An elementwise maximum, in place."""

    def start(self, transport: Transport, name: str) -> Handle:
        """See :class:`Collective`."""
        return transport.max_async(self.tensor, name)


class Sum(Collective):
    """An elementwise sum, in place."""

    def start(self, transport: Transport, name: str) -> Handle:
        """See :class:`Collective`."""
        return transport.sum_async(self.tensor, name)


class Kept(Collective):
    """A message of a rank that is alone, which goes nowhere."""

    @property
    def nbytes(self) -> int:
        """None."""
        return 0

    def start(self, transport: Transport, name: str) -> Handle:
        """See :class:`Collective`."""
        return Done(self.tensor)


@dataclass(frozen=True)
class Alltoall(Collective):
    """Sends each rank its part of a flat tensor."""

    splits: Sequence[int]
    """Elements for each rank."""
    received: Sequence[int] | None = None
    """Elements from each rank; None: as many from each as this rank sends to itself."""
    inside: bool = False
    """Whether it moves data within nodes only."""

    @property
    def nbytes(self) -> int:
        """Half of those of an Allreduce of as many bytes."""
        return self.tensor.nbytes // 2

    def start(self, transport: Transport, name: str) -> Handle:
        """See :class:`Collective`."""
        return transport.alltoall_async(self.tensor, self.splits, name, self.received)


@dataclass(frozen=True)
class Allgather(Collective):
    """Concatenates the flat tensors of all ranks."""

    lengths: Sequence[int]
    """Elements of each rank's tensor."""

    @property
    def nbytes(self) -> int:
        """Half of those of an Allreduce of the result."""
        return sum(self.lengths) * self.tensor.element_size() // 2

    def start(self, transport: Transport, name: str) -> Handle:
        """See :class:`Collective`."""
        return transport.allgather_async(self.tensor, self.lengths, name)


@dataclass(frozen=True)
class NativeCall(Collective):
    """A native operator that exchanges a bucket by itself; ``tensor`` is empty."""

    call: Callable[[], None]
    moved: Callable[[], int]
    """Counts the bytes that its collectives move."""

    @property
    def nbytes(self) -> int:
        """See :class:`Collective`."""
        return self.moved()

    def start(self, transport: Transport, name: str) -> Handle:
        """Returns once it is done, or enqueued on the current stream."""
        self.call()
        return Done(self.tensor)
