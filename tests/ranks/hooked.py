"""Models with ``ddp_hook``, for the tests on several ranks."""

from __future__ import annotations

import torch
from conftest import process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvd_gqsgd import ddp_hook


class Given(nn.Module):
    """A parameter whose gradient is what the model is given."""

    def __init__(self, numel, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(numel, dtype=dtype))

    def forward(self, x):
        return (self.weight * x).sum()


def wrap(model, state=None, **arguments):
    """The model with DDP around it, and the hook if there is a state."""
    wrapped = DistributedDataParallel(model, process_group=process_group(), **arguments)
    if state is not None:
        wrapped.register_comm_hook(state, ddp_hook)
    return wrapped


def gradient(model):
    return torch.cat([p.grad.view(-1) for p in model.parameters()])
