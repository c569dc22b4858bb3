"""The interface of transports, which move bytes between ranks and are independent of codecs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_gqsgd.nodes import Nodes

__all__ = ["DeviceGroup", "Done", "Handle", "Transport", "nap", "received_from"]


class Handle(Protocol):
    """An operation in flight. Its tensor must stay as it is until ``wait`` has returned."""

    def done(self) -> bool:
        """Whether ``wait`` would return, or raise, at once."""

    def wait(self) -> Tensor:
        """The result, once it is there: the tensor itself if the operation is in place.

        Raises:
            AgreementError: the ranks' tensors do not match.
            Exception: whatever the library below raises when the exchange fails.
        """


@dataclass(frozen=True)
class Done:
    """An operation that was done at once."""

    result: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32, device="cpu"))

    def done(self) -> bool:
        """See :class:`Handle`."""
        return True

    def wait(self) -> Tensor:
        """See :class:`Handle`."""
        return self.result


def received_from(
    transport: Transport, splits: Sequence[int], received: Sequence[int] | None
) -> list[int]:
    """Elements that an Alltoall receives from each rank; see ``Transport.alltoall_async``."""
    return [splits[transport.rank]] * transport.size if received is None else list(received)


def nap(waited: float, shortest: float) -> None:
    """Sleeps for at least ``shortest`` seconds, and longer the longer it has taken already: by the
    end a fortieth of the time, or a millisecond, may be lost."""
    time.sleep(min(shortest + waited / 40, max(shortest, 1e-3)))


class DeviceGroup(Protocol):
    """The ranks' GPUs, connected when they are first needed."""

    def connect(self) -> Any:
        """The communicator; see ``hvd_gqsgd._native.nccl.communicator``. All ranks must call this
        the first time.

        Raises:
            RuntimeError: with the library's own text.
        """

    def close(self) -> None:
        """Ends the communicator. All ranks must call this, with nothing in flight."""


class Transport(Protocol):
    """Collectives on integer tensors, matched between ranks by name, or by order of operations with
    the same last part of the name.

    A name is free again as soon as its operation has been waited for.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0 to ``size`` - 1."""

    @property
    def size(self) -> int:
        """How many ranks take part."""

    @property
    def session(self) -> object:
        """Another object once the transport was shut down and started anew.

        Handles from an earlier session must not be used any more.
        """

    @property
    def mpi_handle(self) -> int | None:
        """The MPI communicator, as in Fortran, where the native allreduce can be used on it."""

    @property
    def nccl(self) -> DeviceGroup | None:
        """The ranks' GPUs, where the native allreduce can be used on them."""

    @property
    def nodes(self) -> Nodes | None:
        """The nodes of the ranks; None: ranks must tell each other their hosts first."""

    @property
    def ranks_may_leave(self) -> bool:
        """Whether sums and maxima may be over fewer ranks, as with ``hvd.join()``."""

    @property
    def absences(self) -> int | None:
        """How often this rank has been absent from sums and maxima of the others, or the others
        from its own, since the process began; None: unknown."""

    def max_async(self, tensor: Tensor, name: str) -> Handle:
        """Starts an elementwise maximum over all ranks, in place, of an int32 or int64 tensor."""

    def sum_async(self, tensor: Tensor, name: str) -> Handle:
        """Starts an elementwise sum over all ranks, in place, of an int32 or int64 tensor."""

    def alltoall_async(
        self, tensor: Tensor, splits: Sequence[int], name: str,
        received: Sequence[int] | None = None,
    ) -> Handle:  # fmt: skip
        """Starts sending each rank its part of a flat tensor, of ``splits[rank]`` elements.

        The result are the parts for this rank, in the order of the ranks, of ``received[rank]``
        elements each. None: all of one length, as ``splits`` is the same on all ranks.
        """

    def allgather_async(self, tensor: Tensor, lengths: Sequence[int], name: str) -> Handle:
        """Starts putting the flat tensors of all ranks end to end.

        ``lengths`` are those of all ranks' tensors, but a rank that has given up may be wrong.
        """

    def idle(self, waited: float = 0.0) -> None:
        """Called again and again while there is nothing to do but wait, with the seconds since that
        began; sleeps for a moment. The core may be needed by the threads that are waited for."""
