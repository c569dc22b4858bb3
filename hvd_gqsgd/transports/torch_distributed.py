"""PyTorch's own collectives on tensors of the host, over the backend of a process group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.transports.base import nap

__all__ = ["TorchDistributedTransport"]


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
        group: the ranks, with a backend for the CPU; None for all. See ``host_group``.
        channels: the groups that messages go over, by the last part of their names; all others go
            over ``group``.
        notify: called, in any thread, when an operation is done.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: this process is not one of them, or there is no default group.
    """

    mpi_handle: ClassVar[None] = None
    nccl: ClassVar[None] = None
    ranks_may_leave = False

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        channels: Mapping[str, dist.ProcessGroup] | None = None,
        notify: Callable[[], None] | None = None,
    ) -> None:
        group = group if group is not None else dist.group.WORLD
        if group is None:
            raise ValueError(
                "there is no default process group: call torch.distributed.init_process_group() "
                "first"
            )
        if not isinstance(group, dist.ProcessGroup):
            if group == dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError(f"this process is not in the process group, which is {group!r}")
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, or None for the default "
                f"group, got {group!r}"
            )
        # Weakly: what is remembered for a group must not keep it.
        self._group = weakref.ref(group)
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.session = object()
        self._channels = channels or {}
        self._notify = notify

    @property
    def group(self) -> dist.ProcessGroup:
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
        return self._allreduce(tensor, name, dist.ReduceOp.MAX)

    def sum_async(self, tensor: Tensor, name: str) -> _WorkHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._allreduce(tensor, name, dist.ReduceOp.SUM)

    def alltoall_async(self, tensor: Tensor, splits: Sequence[int], name: str) -> _WorkHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        received = [splits[self.rank]] * self.size
        result = tensor.new_empty(sum(received))
        work = dist.all_to_all_single(
            result, tensor, received, list(splits), group=self._channel(name), async_op=True
        )
        return self._handle(work, lambda: result)

    def allgather_async(self, tensor: Tensor, lengths: Sequence[int], name: str) -> _WorkHandle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        # Gloo wants them to be of one length.
        longest = max(lengths)
        padded = tensor.new_zeros(longest)
        padded[: tensor.numel()] = tensor
        every = tensor.new_empty(self.size, longest)
        work = dist.all_gather(list(every), padded, group=self._channel(name), async_op=True)
        return self._handle(
            work, lambda: torch.cat([row[:n] for row, n in zip(every, lengths, strict=True)])
        )

    def idle(self, waited: float = 0.0) -> None:
        """Sleeps for a moment: threads of the process group do the work."""
        nap(waited, 2e-5)

    def _allreduce(self, tensor: Tensor, name: str, op: dist.ReduceOp.RedOpType) -> _WorkHandle:
        work = dist.all_reduce(tensor, op, group=self._channel(name), async_op=True)
        return self._handle(work, lambda: tensor)

    def _channel(self, name: str) -> dist.ProcessGroup:
        return self._channels.get(name.rsplit(".", 1)[-1], self.group)

    def _handle(self, work: Any, result: Callable[[], Tensor]) -> _WorkHandle:
        future = work.get_future()
        if self._notify is not None:
            notify = self._notify
            future.add_done_callback(lambda _: notify())
        return _WorkHandle(future, work, result)
