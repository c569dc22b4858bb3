"""Tensors that are exchanged uncompressed: the reason, and their size."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_gqsgd.codecs import is_compressible
from hvd_gqsgd.stats import Reason

__all__ = ["nbytes_of", "why_bypassed"]


def why_bypassed(tensor: Tensor, min_numel: int) -> Reason | None:
    """Returns the reason not to compress a tensor; None if the tensor can be compressed."""
    if tensor.layout != torch.strided:
        return "sparse"
    if not is_compressible(tensor.dtype):
        return "type"
    return "small" if tensor.numel() < min_numel else None


def nbytes_of(tensor: Tensor) -> int:
    """Returns the bytes of all elements, including the indices of a sparse tensor."""
    if tensor.layout == torch.strided:
        return tensor.nbytes
    if tensor.layout == torch.sparse_coo:
        return tensor._values().nbytes + tensor._indices().nbytes
    return tensor.numel() * tensor.element_size()
