"""PyTorch's own collectives on tensors of the host, over the backend of a process group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.nodes import Nodes, one_node
from hvd_gqsgd.registry import of_process_group
from hvd_gqsgd.transports.base import nap, received_from
from hvd_gqsgd.transports.process_groups import Channel

__all__ = ["TorchDistributedTransport"]


def _reduce_by(op: dist.ReduceOp.RedOpType) -> dist.AllreduceOptions:
    options = dist.AllreduceOptions()
    options.reduceOp = op  # type: ignore[assignment]
    return options


_MAX, _SUM = _reduce_by(dist.ReduceOp.MAX), _reduce_by(dist.ReduceOp.SUM)


@dataclass
class _WorkHandle:
    # Not the work itself: Gloo calls back before that says that it is done.
    future: torch.futures.Future[Any]
    work: Any  # dist.Work; must live until the end
    result: Callable[[], Tensor]

    def done(self) -> bool:
        return self.future.done()

    def wait(self) -> Tensor:
        self.future.wait()
        return self.result()


class TorchDistributedTransport:
    """The ranks of a process group.

    It matches operations by their order, so that all ranks must start those of one process group in
    one order. Several buckets may be in flight if each kind of message has a group of its own.

    Args:
        group: the ranks, with a backend for the CPU; see ``host_group``.
        channels: the connections that messages go over, by the last part of their names; all others
            go over ``group``.
        notify: called, in any thread, when an operation is done.
        nodes: of the ranks; None: all are on one.
    """

    mpi_handle: ClassVar[None] = None
    nccl: ClassVar[None] = None
    ranks_may_leave = False
    absences = 0

    def __init__(
        self,
        group: Channel,
        channels: Mapping[str, Channel] | None = None,
        notify: Callable[[], None] | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        # Weakly: state that is kept for a group must not keep the group alive.
        self._group = weakref.ref(group)
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.session = of_process_group(group, "session", object)
        self.nodes = nodes or one_node(self.size)
        self._channels = channels or {}
        self._notify = notify

    @property
    def group(self) -> Channel:
        """The ranks.

        Raises:
            RuntimeError: the process group was destroyed.
        """
        group = self._group()
        if group is None:
            raise RuntimeError("the process group was destroyed")
        return group

    def max_async(self, tensor: Tensor, name: str) -> _WorkHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._allreduce(tensor, name, _MAX)

    def sum_async(self, tensor: Tensor, name: str) -> _WorkHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._allreduce(tensor, name, _SUM)

    def alltoall_async(
        self, tensor: Tensor, splits: Sequence[int], name: str,
        received: Sequence[int] | None = None,
    ) -> _WorkHandle:  # fmt: skip
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        counts = received_from(self, splits, received)
        result = tensor.new_empty(sum(counts))
        work = self._channel(name).alltoall_base(result, tensor, counts, list(splits))
        return self._handle(work, lambda: result)

    def allgather_async(self, tensor: Tensor, lengths: Sequence[int], name: str) -> _WorkHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        # Gloo requires equal lengths.
        longest = max(lengths)
        every = tensor.new_empty(self.size, longest)
        if longest == min(lengths) == tensor.numel():
            work = self._channel(name).allgather([list(every)], [tensor])
            return self._handle(work, lambda: every.view(-1))
        padded = tensor.new_zeros(longest)
        padded[: tensor.numel()] = tensor
        work = self._channel(name).allgather([list(every)], [padded])
        return self._handle(
            work, lambda: torch.cat([row[:n] for row, n in zip(every, lengths, strict=True)])
        )

    def idle(self, waited: float = 0.0) -> None:
        """Sleeps for a moment: threads of the process group do the work."""
        nap(waited, 2e-5)

    def _allreduce(self, tensor: Tensor, name: str, options: dist.AllreduceOptions) -> _WorkHandle:
        work = self._channel(name).allreduce([tensor], options)
        return self._handle(work, lambda: tensor)

    def _channel(self, name: str) -> Channel:
        return self._channels.get(name.rsplit(".", 1)[-1], self.group)

    def _handle(self, work: Any, result: Callable[[], Tensor]) -> _WorkHandle:
        future = work.get_future()
        if self._notify is not None:
            notify = self._notify
            future.add_done_callback(lambda _: notify())
        return _WorkHandle(future, work, result)
