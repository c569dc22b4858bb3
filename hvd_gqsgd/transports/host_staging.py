"""Tensors of a GPU staged through host memory, for transports that take CPU tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hvd_gqsgd.transports.base import Handle, Transport
from hvd_gqsgd.transports.wrapped import WrappedTransport

__all__ = ["StagedTransport"]


@dataclass(frozen=True)
class _StagedHandle:
    handle: Handle
    receive: Callable[[Tensor], Tensor]

    def done(self) -> bool:
        return self.handle.done()

    def wait(self) -> Tensor:
        return self.receive(self.handle.wait())


class StagedTransport(WrappedTransport):
    """Another transport, that takes tensors of a GPU too.

    They are copied to pinned memory, after the work that made them, and the results are copied
    back, on the stream that is the current one by then.

    Args:
        base: what moves the bytes.
        staged: which tensors to copy, for tests; by default those on GPUs.
    """

    nccl: ClassVar[None] = None

    def __init__(
        self, base: Transport, staged: Callable[[Tensor], bool] = lambda tensor: tensor.is_cuda
    ) -> None:
        super().__init__(base)
        self._staged = staged

    def max_async(self, tensor: Tensor, name: str) -> Handle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._in_place(tensor, lambda host: self._base.max_async(host, name))

    def sum_async(self, tensor: Tensor, name: str) -> Handle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._in_place(tensor, lambda host: self._base.sum_async(host, name))

    def alltoall_async(
        self, tensor: Tensor, splits: Sequence[int], name: str,
        received: Sequence[int] | None = None,
    ) -> Handle:  # fmt: skip
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._to_new(
            tensor, lambda host: self._base.alltoall_async(host, splits, name, received)
        )

    def allgather_async(self, tensor: Tensor, lengths: Sequence[int], name: str) -> Handle:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._to_new(tensor, lambda host: self._base.allgather_async(host, lengths, name))

    def _in_place(self, tensor: Tensor, start: Callable[[Tensor], Handle]) -> Handle:
        if not self._staged(tensor):
            return start(tensor)
        return _StagedHandle(
            start(_to_host(tensor)), lambda result: tensor.copy_(result, non_blocking=True)
        )

    def _to_new(self, tensor: Tensor, start: Callable[[Tensor], Handle]) -> Handle:
        if not self._staged(tensor):
            return start(tensor)
        return _StagedHandle(
            start(_to_host(tensor)), lambda result: result.to(tensor.device, non_blocking=True)
        )


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that is there when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=True)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return host
