"""Accelerate: ``model = attach(accelerator, accelerator.prepare(model), GlobalQSGD(bits=4))``.

Accelerate has a fixed list of hooks, ``DDPCommunicationHookType``, to which none can be added.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.integrations import ddp

__all__ = ["attach"]


def attach(accelerator: Accelerator, model: nn.Module, compressor: GlobalQSGD) -> nn.Module:
    """Compresses the gradients of a prepared model, and returns it.

    ``accelerator.save_state()`` and ``load_state()`` save and load the compressor's state too.

    Args:
        accelerator: the accelerator that prepared the model.
        model: a result of ``accelerator.prepare``.
        compressor: the compressor, whose ``stats()`` has the counts.

    Returns:
        ``model``.

    Raises:
        TypeError: on several processes, Accelerate has not wrapped the model in DDP.
    """
    ddp.attach(model, compressor)
    accelerator.register_for_checkpointing(compressor)
    return model
