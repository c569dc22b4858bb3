"""Ray Train: ``prepare_model(model, GlobalQSGD(bits=4))`` in the loop of a ``TorchTrainer``."""

from __future__ import annotations

from typing import Any

from ray.train import torch as ray_torch
from torch import nn

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.integrations.ddp import attach

__all__ = ["prepare_model"]


def prepare_model(model: nn.Module, compressor: GlobalQSGD | None, **options: Any) -> nn.Module:
    """Returns the model as ``ray.train.torch.prepare_model`` does, with compressed gradients.

    The driver may make the compressor and send it to the workers in ``train_loop_config``. Save
    ``compressor.state_dict()`` with your checkpoints.

    Args:
        model: a model on the CPU.
        compressor: the compressor of this worker; None sends gradients uncompressed.
        options: keywords of ``ray.train.torch.prepare_model``.

    Returns:
        The model on the device of the worker, in ``DistributedDataParallel`` on several workers.

    Raises:
        TypeError: on several workers, ``parallel_strategy`` is another one than ``"ddp"``.
    """
    prepared: nn.Module = ray_torch.prepare_model(model, **options)
    if compressor is not None:
        attach(prepared, compressor)
    return prepared
