"""NCCL for the tensors of one GPU, beside another transport for tensors of the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd.transports.base import Done, Handle, Transport, received_from
from hvd_gqsgd.transports.wrapped import WrappedTransport

__all__ = ["NcclGroup", "NcclTransport"]


class NcclGroup:
    """A communicator of the ranks of a transport, made when it is first asked for."""

    def __init__(self, base: Transport, device: torch.device) -> None:
        self._base = base
        self._device = device
        self._communicator: Any = None
        self._session: object = None

    def connect(self) -> Any:
        """See :class:`hvd_gqsgd.transports.base.DeviceGroup`."""
        if self._communicator is None or self._session is not self._base.session:
            self._session = self._base.session  # another one has other ranks
            unique_id = self._share(native_nccl.unique_id if self._base.rank == 0 else None)
            self._communicator = native_nccl.communicator(
                unique_id, self._base.rank, self._base.size, self._device
            )
            self._warm_up()
        return self._communicator

    def close(self) -> None:
        """See :class:`hvd_gqsgd.transports.base.DeviceGroup`."""
        if self._communicator is not None:
            self._communicator.close()
            self._communicator = None

    def _warm_up(self) -> None:
        """NCCL connects GPUs when they first exchange something, in a way that depends on what.
        That takes memory and waits for all ranks: better here than in the midst of other work."""
        size = self._base.size
        for numel in (1, 2**20):
            words = torch.zeros(numel, dtype=torch.int32, device=self._device)
            self._communicator.max(words)
            self._communicator.sum(words)
        words = torch.zeros(size, dtype=torch.int32, device=self._device)
        self._communicator.all_to_all(words, words.clone(), [1] * size, [1] * size)
        self._communicator.all_gather(words[:1], words.clone(), [1] * size)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _share(self, make: Any) -> Tensor:
        """What rank 0 makes. Without Broadcast: a sum, to which the others add zeros."""
        error, made = None, torch.zeros(128, dtype=torch.uint8, device="cpu")
        if make is not None:
            try:
                made = make()
            except RuntimeError as raised:
                error = raised  # the others wait: they are told by zeros
        handle = self._base.sum_async(made.view(torch.int64), "gqsgd-nccl-id")
        while not handle.done():
            self._base.idle()
        unique_id = handle.wait().view(torch.uint8)
        if error is not None:
            raise error
        if not bool(unique_id.any()):
            raise RuntimeError("NCCL could not be initialized on rank 0; see the error of rank 0")
        return unique_id


class NcclTransport(WrappedTransport):
    """The ranks of another transport, with the GPU of each.

    Operations on tensors of the GPU are enqueued on the current stream, and count as done: whatever
    is enqueued there later finds their results. All ranks must start them in one order.

    Args:
        base: for all tensors that are not on the GPU, and to find the other ranks' GPUs by.
        device: this rank's GPU, with its index.
    """

    def __init__(self, base: Transport, device: torch.device) -> None:
        super().__init__(base)
        self._device = device
        self.nccl = NcclGroup(base, device)

    def max_async(self, tensor: Tensor, name: str) -> Handle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        if tensor.device != self._device:
            return self._base.max_async(tensor, name)
        self.nccl.connect().max(tensor)
        return Done(tensor)

    def sum_async(self, tensor: Tensor, name: str) -> Handle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        if tensor.device != self._device:
            return self._base.sum_async(tensor, name)
        self.nccl.connect().sum(tensor)
        return Done(tensor)

    def alltoall_async(
        self, tensor: Tensor, splits: Sequence[int], name: str,
        received: Sequence[int] | None = None,
    ) -> Handle:  # fmt: skip
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        counts = received_from(self, splits, received)
        result = tensor.new_empty(sum(counts))
        self.nccl.connect().all_to_all(tensor, result, list(splits), counts)
        return Done(result)

    def allgather_async(self, tensor: Tensor, lengths: Sequence[int], name: str) -> Handle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        result = tensor.new_empty(sum(lengths))
        self.nccl.connect().all_gather(tensor, result, list(lengths))
        return Done(result)
