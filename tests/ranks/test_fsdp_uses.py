"""FSDP2 with gradients and weights as codes, in the ways that people use it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import assert_same_on_all_ranks, backward, mlp
from sharded import gradient, mesh, shard
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from hvd_gqsgd import GlobalQSGD

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)

pytestmark = pytest.mark.few


def prepared(compressor, seed=0, **arguments):
    """A model with both kinds of codes, and its optimizer, which has a state."""
    model = mlp(seed, width=200)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh(), **arguments)
    shard(model, **arguments)
    compressor.fsdp(model, weight_bits=8)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, optimizer, rank, steps):
    for number in steps:
        optimizer.zero_grad()
        backward(model, rank, number)
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().full_tensor().view(-1) for p in model.parameters()])


@pytest.fixture
def folder(rank):
    """The same on all ranks."""
    number = hvd.broadcast(torch.tensor([os.getpid()]), 0, name="folder").item()
    name = Path(tempfile.gettempdir(), f"gqsgd-{number}")
    yield name
    hvd.barrier()
    if rank == 0:
        shutil.rmtree(name, ignore_errors=True)


def test_resumed_from_a_distributed_checkpoint(rank, size, folder):
    """With the bits of a training that was not interrupted; on disk the exact parameters."""
    compressor = GlobalQSGD(min_numel=100)
    model, optimizer = prepared(compressor)
    train(model, optimizer, rank, range(2))
    saved = weights(model)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer, "gqsgd": compressor.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    train(model, optimizer, rank, range(2, 4))

    compressor = GlobalQSGD(min_numel=100)
    resumed, optimizer = prepared(compressor, seed=1)
    backward(resumed, rank)  # at step 0
    resumed.zero_grad()  # or PyTorch would not make the optimizer's state
    of_model, of_optimizer = get_state_dict(resumed, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer, "gqsgd": compressor.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    compressor.load_state_dict(state["gqsgd"])
    assert compressor.state_dict()["step"] == 2
    assert torch.equal(weights(resumed), saved)
    train(resumed, optimizer, rank, range(2, 4))
    assert torch.equal(weights(resumed), weights(model))


def test_parameters_that_are_offloaded(rank, size):
    """On a CPU they are where they would be anyway: the same bits."""
    found = []
    for arguments in ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        model, optimizer = prepared(GlobalQSGD(min_numel=100), **arguments)
        train(model, optimizer, rank, range(2))
        found.append(weights(model))
    assert torch.equal(*found)


def test_meta_device(rank, size):
    """Sharded, and given to the compressor, before its parameters have memory."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 100), nn.Linear(100, 10))
    shard(model)
    compressor = GlobalQSGD(min_numel=100)
    compressor.fsdp(model, weight_bits=8)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in model:
        layer.reset_parameters()
    backward(model, rank)
    assert_same_on_all_ranks(gradient(model))
    assert gradient(model).norm() > 0
    assert compressor.stats().weight_ratio > 3 or size == 1


def test_two_models_that_take_turns(rank, size):
    """As in adversarial training, with one compressor: each close to a training without codes."""
    trained = []
    for compressor in (GlobalQSGD(min_numel=100), None):
        models = [mlp(seed, width=200) for seed in range(2)]
        for model in models:
            shard(model)
            if compressor is not None:
                compressor.fsdp(model, weight_bits=8)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
        for number in range(3):
            # Both forward passes come before the first of the backward passes.
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(number + 100 * rank))
            losses = [model(x).square().mean() for model in models]
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        trained.append(torch.cat([weights(model) for model in models]))
        if compressor is not None:
            assert compressor.state_dict()["step"] == 6
    ours, exact = trained
    assert_same_on_all_ranks(ours)
    start = torch.cat(
        [p.detach().view(-1) for seed in range(2) for p in mlp(seed, 200).parameters()]
    )
    assert (ours - exact).norm() < 0.1 * (exact - start).norm()


def test_gathered_by_hand(rank, size):
    """By ``unshard()``, which returns a handle."""
    compressor = GlobalQSGD(min_numel=100)
    model, optimizer = prepared(compressor)
    handle = model[0].unshard(async_op=True)
    assert handle is not None
    handle.wait()
    found = model[0].weight.detach().clone()
    assert_same_on_all_ranks(found)
    model[0].reshard()
    train(model, optimizer, rank, range(2))
    assert_same_on_all_ranks(weights(model))
