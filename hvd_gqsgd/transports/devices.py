"""The transport for tensors on a GPU, given the one that takes those on the CPU."""

from __future__ import annotations

import torch

from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd.transports.base import Transport
from hvd_gqsgd.transports.host_staging import StagedTransport
from hvd_gqsgd.transports.nccl import NcclTransport

__all__ = ["transport_for"]


def transport_for(device: torch.device, base: Transport, nccl: bool = True) -> Transport:
    """``base`` itself for the CPU. For a GPU, one over NCCL if ``nccl`` is true and NCCL was built,
    and otherwise one that stages through host memory. ``nccl`` must be the same on all ranks."""
    if device.type == "cpu":
        return base
    return NcclTransport(base, device) if nccl and native_nccl.built() else StagedTransport(base)
