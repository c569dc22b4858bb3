"""Stock Horovod's asynchronous collectives, over whatever it was built with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops
from torch import Tensor

from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.nodes import Nodes, one_node
from hvd_gqsgd.registry import of_horovod
from hvd_gqsgd.transports.base import nap

__all__ = ["SLOT_BYTES", "HorovodTransport", "held"]

SLOT_BYTES = 4
"""Bytes of an operation that fills a slot."""


def held(tensor: Tensor) -> Tensor:
    """A tensor that refers to another one from C++, by ``grad``.

    As long as there is one, another thread drops its own references without the GIL. PyTorch takes
    the GIL to drop the last reference beside that of Python.
    """
    holder = tensor.data
    holder.grad = tensor
    return holder


class _InFlight:
    """Holds the tensors of operations.

    When one rank shuts Horovod down, Horovod's threads on all ranks drop the tensors in flight, and
    meanwhile hold a mutex that starting an operation takes too, with the GIL. If a tensor needs the
    GIL to be dropped, neither thread continues. So tensors are held from before they are handed
    to Horovod until the operation is done, or Horovod was started anew. What Horovod took while it
    shut down stays in its queue until the next shutdown, and is held for one session more.
    """

    def __init__(self) -> None:
        self._session: object = None
        self._of: dict[int, list[Tensor]] = {}
        self._ended: set[int] = set()
        self._left: list[list[Tensor]] = []  # of the session before

    def add(self, handle: int, holders: list[Tensor]) -> None:
        """An operation was started with tensors that were held before."""
        if self._session is not mpi_ops._handle_map:
            self._session = mpi_ops._handle_map
            self._left = [t for handle, t in self._of.items() if handle not in self._ended]
            self._of.clear()
            self._ended.clear()
        self._of[handle] = holders

    def done(self, handle: int) -> None:
        """An operation is done, or was refused."""
        self._of.pop(handle, None)

    def ended(self, handle: int) -> None:
        """An operation was ended by a shutdown."""
        self._ended.add(handle)


@dataclass
class _HorovodHandle:
    handle: int
    name: str
    in_flight: _InFlight

    def done(self) -> bool:
        return bool(hvd.poll(self.handle))

    def wait(self) -> Tensor:
        try:
            result = hvd.synchronize(self.handle)
        except HorovodInternalError as error:
            # Horovod's controller compares shapes and types before it moves any data, and tells
            # every rank. What else it raises is left alone: elastic training acts on it.
            if "Mismatched" not in str(error):
                self.in_flight.ended(self.handle)
                raise
            self.in_flight.done(self.handle)
            raise AgreementError(
                f"ranks disagree on {self.name}: they use different options or different tensors. "
                f"Horovod says: {error}"
            ) from error
        self.in_flight.done(self.handle)
        # An Alltoall gives the lengths of the parts too.
        tensor: Tensor = result[0] if isinstance(result, tuple) else result
        return tensor


def _started(handle: int, name: str, holders: list[Tensor]) -> _HorovodHandle:
    in_flight = of_horovod("in flight", _InFlight)
    in_flight.add(handle, holders)
    return _HorovodHandle(handle, name, in_flight)


class _Joins:
    """Counts the calls of ``hvd.join()`` from the first use on, which Horovod does not count.

    ``hvd.join`` looks up the function of Horovod's library in each call, however a program has
    imported ``join``. The function is replaced by one that counts and calls it.
    """

    def __init__(self) -> None:
        self.count: int | None = None
        """None: Horovod has another function."""
        join = getattr(mpi_ops.mpi_lib, "horovod_torch_join", None)
        if join is None:
            return
        self.count = 0

        def counted(*args: Any) -> Any:
            assert self.count is not None
            handle = join(*args)
            self.count += 1  # a call that is refused keeps this rank nowhere
            return handle

        mpi_ops.mpi_lib.horovod_torch_join = counted


@dataclass(frozen=True)
class HorovodTransport:
    """The ranks of one Horovod process set."""

    process_set: Any = hvd.global_process_set
    mpi_handle: ClassVar[None] = None
    nccl: ClassVar[None] = None

    @property
    def rank(self) -> int:
        """This process's rank in the process set."""
        return int(self.process_set.rank())

    @property
    def size(self) -> int:
        """How many processes are in the process set."""
        return int(self.process_set.size())

    @property
    def nodes(self) -> Nodes | None:
        """Of the ranks; None if there are several nodes, and several ranks on one: Horovod does not
        tell which."""
        several = hvd.cross_size() > 1 and hvd.local_size() > 1
        return None if several or not mpi_ops.is_homogeneous() else one_node(self.size)

    @property
    def ranks_may_leave(self) -> bool:
        """Whether there are other ranks in the job, which may call ``hvd.join()``."""
        return int(hvd.size()) > 1

    @property
    def absences(self) -> int | None:
        """The calls of ``hvd.join()``."""
        return of_horovod("joins", _Joins).count

    @property
    def session(self) -> object:
        """Horovod's table of handles: ``hvd.init()``, as elastic training calls it, makes one."""
        return mpi_ops._handle_map

    @property
    def session_variables(self) -> tuple[tuple[dict[str, Any], str], ...]:
        """Where ``session`` and ``absences`` are: a ``__dict__`` and a name for each."""
        joins = of_horovod("joins", _Joins)
        return (vars(mpi_ops), "_handle_map"), (vars(joins), "count")

    @property
    def included(self) -> bool:
        """Whether this process belongs to the process set, which may have been removed."""
        return self.process_set.process_set_id is not None and bool(self.process_set.included())

    @property
    def takes_gpu_tensors(self) -> bool:
        """Whether Horovod was built to reduce tensors of a GPU where they are."""
        return bool(hvd.nccl_built())

    def takes(self, tensor: Tensor) -> bool:
        """Whether Horovod itself could reduce a tensor of floating point."""
        return tensor.is_contiguous() and hasattr(
            mpi_ops.mpi_lib, mpi_ops._allreduce_function_factory(tensor)
        )

    def max_async(self, tensor: Tensor, name: str) -> _HorovodHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._allreduce(tensor, name, hvd.Max)

    def sum_async(self, tensor: Tensor, name: str) -> _HorovodHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._allreduce(tensor, name, hvd.Sum)

    def alltoall_async(
        self, tensor: Tensor, splits: Sequence[int], name: str,
        received: Sequence[int] | None = None,
    ) -> _HorovodHandle:  # fmt: skip
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        counts = torch.tensor(splits, dtype=torch.int32, device="cpu")
        result, lengths = tensor.new_empty(0), counts.new_empty(0)
        holders = [held(each) for each in (tensor, result, lengths)]
        handle = mpi_ops._alltoall_async(tensor, counts, result, lengths, name, self.process_set)
        return _started(handle, name, holders)

    def allgather_async(self, tensor: Tensor, lengths: Sequence[int], name: str) -> _HorovodHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        result = tensor.new_empty(0)
        holders = [held(tensor), held(result)]
        handle = mpi_ops._allgather_async(tensor, result, name, self.process_set)
        return _started(handle, name, holders)

    def fill_slot(self, name: str) -> _HorovodHandle:
        """Starts an operation of ``SLOT_BYTES`` with an unused result: Horovod counts it like the
        operation that another rank starts in its place."""
        return self._allreduce(torch.zeros(1, dtype=torch.int32, device="cpu"), name, hvd.Sum)

    def idle(self, waited: float = 0.0) -> None:
        """Sleeps for less than one of Horovod's cycles, which take a millisecond."""
        nap(waited, 1e-4)

    def _allreduce(self, tensor: Tensor, name: str, op: int) -> _HorovodHandle:
        holders = [held(tensor)]
        handle = hvd.allreduce_async_(tensor, name=name, op=op, process_set=self.process_set)
        return _started(handle, name, holders)
