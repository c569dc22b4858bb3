"""The dtypes and devices that have kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_gqsgd._native import ops

__all__ = ["check_compressible", "check_device", "check_plain", "check_unmasked", "is_compressible"]


def is_compressible(dtype: torch.dtype) -> bool:
    """Whether there are kernels for elements of this type."""
    return dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_plain(name: str, tensor: Tensor) -> None:
    """Checks that a tensor has memory of its own, which kernels can read.

    Raises:
        TypeError: it has not.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise TypeError(
            f"{name} must be a plain tensor, got one within torch.func (vmap, grad, jvp, ...), "
            "whose tensors have no data: call this outside of the transform"
        )
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        remedy = ": pass its to_local()" if hasattr(tensor, "to_local") else ""
        raise TypeError(
            f"{name} must be a plain tensor, got a {kind.__module__}.{kind.__qualname__}, "
            f"which wraps other tensors{remedy}"
        )


def check_compressible(name: str, tensor: Tensor) -> None:
    """Checks that there are kernels for a tensor, dense and of floating point.

    Raises:
        TypeError: its layout, its type or its kind is another one.
        NotImplementedError: it is on a device for which there are none.
    """
    if tensor.layout != torch.strided or tensor.is_nested or not is_compressible(tensor.dtype):
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(
            f"{name} must be dense and float16, bfloat16, float32 or float64, got {tensor.dtype}"
            + (f" of layout {layout}" if layout != torch.strided else "")
        )
    check_plain(name, tensor)
    check_device(f"{name} is", tensor)


def check_unmasked(name: str, array: np.ndarray[Any, Any]) -> None:
    """Checks that an array is not a masked one, of which the result would not be.

    Raises:
        TypeError: it is.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must not be a masked array, as ranks may mask different elements: pass its "
            "filled(0), and sum the masks to compute a mean"
        )


def check_device(what: str, tensor: Tensor) -> None:
    """Checks that there are kernels for the device of a tensor; ``what`` begins the message.

    Raises:
        NotImplementedError: there are none.
    """
    if tensor.device.type not in ops.devices():
        raise NotImplementedError(
            f"{what} on {tensor.device}; this build has kernels for: {', '.join(ops.devices())}"
        )
