"""MPI through mpi4py: non-blocking collectives on a communicator of the user."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hvd_gqsgd._native import mpi as native_mpi
from hvd_gqsgd.nodes import one_node
from hvd_gqsgd.transports.base import received_from

__all__ = ["MpiTransport"]


# MPI accesses the memory of an operation until its end, even if the operation was abandoned.
_in_flight: dict[int, _MpiHandle] = {}


@dataclass
class _MpiHandle:
    request: MPI.Request
    sent: Tensor
    result: Tensor
    error: MPI.Exception | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _in_flight[id(self)] = self

    def done(self) -> bool:
        try:
            done = bool(self.request.Test())
        except MPI.Exception as error:
            self.error, done = error, True
        if done:
            _in_flight.pop(id(self), None)
        return done

    def wait(self) -> Tensor:
        if self.error is not None:
            raise self.error
        self.request.Wait()
        _in_flight.pop(id(self), None)
        return self.result


class MpiTransport:
    """The ranks of an intracommunicator.

    MPI matches collectives by their order, so that all ranks must start the same ones in one order:
    one bucket at a time. As any collective does, they go between those of the user.

    Raises:
        ValueError: it is no intracommunicator.
    """

    nccl: ClassVar[None] = None
    ranks_may_leave = False
    absences = 0

    def __init__(self, comm: MPI.Comm) -> None:
        if comm == MPI.COMM_NULL or comm.Is_inter():
            null = comm == MPI.COMM_NULL
            why = ", which this process is not in: leave the call to its members" if null else ""
            raise ValueError(f"comm must be an intracommunicator, got {comm}{why}")
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.session: object = comm
        self.nodes = one_node(self.size)

    @property
    def mpi_handle(self) -> int | None:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        usable = native_mpi.usable_with(MPI.Get_library_version())
        return self.comm.py2f() if usable else None

    def max_async(self, tensor: Tensor, name: str) -> _MpiHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._allreduce(tensor, MPI.MAX)

    def sum_async(self, tensor: Tensor, name: str) -> _MpiHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._allreduce(tensor, MPI.SUM)

    def alltoall_async(
        self, tensor: Tensor, splits: Sequence[int], name: str,
        received: Sequence[int] | None = None,
    ) -> _MpiHandle:  # fmt: skip
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        counts = received_from(self, splits, received)
        result = torch.empty(sum(counts), dtype=tensor.dtype, device="cpu")
        request = self.comm.Ialltoallv([tensor.numpy(), list(splits)], [result.numpy(), counts])
        return _MpiHandle(request, tensor, result)

    def allgather_async(self, tensor: Tensor, lengths: Sequence[int], name: str) -> _MpiHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        result = torch.empty(sum(lengths), dtype=tensor.dtype, device="cpu")
        request = self.comm.Iallgatherv(tensor.numpy(), [result.numpy(), list(lengths)])
        return _MpiHandle(request, tensor, result)

    def idle(self, waited: float = 0.0) -> None:
        """Lets another process have the core; MPI goes on when it is asked whether it is done."""
        os.sched_yield()

    def _allreduce(self, tensor: Tensor, op: MPI.Op) -> _MpiHandle:
        array: np.ndarray = tensor.numpy()
        return _MpiHandle(self.comm.Iallreduce(MPI.IN_PLACE, array, op), tensor, tensor)
