"""Models of ``fully_shard``, for the tests on several ranks."""

from __future__ import annotations

import functools

import horovod.torch as hvd
import torch
from conftest import process_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh


def mesh(*shape, names=None):
    return mesh_of(process_group(), shape or (hvd.size(),), names)


@functools.cache
def mesh_of(world, shape, names):
    """Of the groups that there are now: some tests make the process group anew."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def shard(model, compressor=None, **arguments):
    """The model with ``fully_shard`` applied, and our reduce-scatter if there is a compressor."""
    fully_shard(model, **({"mesh": mesh()} | arguments))
    return model if compressor is None else compressor.fsdp(model)


def gradient(model):
    return torch.cat([p.grad.full_tensor().view(-1) for p in model.parameters()])


def step(model, row):
    """The gradient, gathered, of a model that is given its gradient."""
    model.zero_grad()
    model(row).backward()
    return gradient(model)
