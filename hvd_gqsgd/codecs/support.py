"""The dtypes and devices that have kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_gqsgd._native import ops

__all__ = ["check_device", "is_compressible"]


def is_compressible(dtype: torch.dtype) -> bool:
    """Whether there are kernels for elements of this type."""
    return dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_device(what: str, tensor: Tensor) -> None:
    """Checks that there are kernels for the device of a tensor; ``what`` begins the message.

    Raises:
        NotImplementedError: there are none.
    """
    if tensor.device.type not in ops.devices():
        raise NotImplementedError(
            f"{what} on {tensor.device}; this build has kernels for: {', '.join(ops.devices())}"
        )
