"""The hook on a model that a library has wrapped in DistributedDataParallel."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvd_gqsgd import GlobalQSGD, ddp_hook

__all__ = ["attach"]


def attach(model: nn.Module, compressor: GlobalQSGD) -> None:
    """Registers the hook on a wrapped model, which may be compiled too. All ranks must call this.

    In a single process, libraries do not wrap the model, and the function has no effect.

    Args:
        model: a ``DistributedDataParallel``, or a result of ``torch.compile`` on one.
        compressor: the compressor, whose ``stats()`` has the counts.

    Raises:
        TypeError: on several ranks, the model is not wrapped in DistributedDataParallel.
    """
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(inner, DistributedDataParallel):
        inner.register_comm_hook(compressor.ddp_state(inner.process_group), ddp_hook)
    elif dist.is_initialized() and dist.get_world_size() > 1:
        raise TypeError(
            "the hook is for a model in DistributedDataParallel, got a "
            f"{type(inner).__module__}.{type(inner).__qualname__}: attach it after the library has "
            "wrapped the model, and let it take DDP rather than FSDP or DeepSpeed"
        )
