"""What users do with ``ddp_hook`` and its state: copies, sparse gradients, timeouts, compilers."""

from __future__ import annotations

import copy
import io
import os
import pickle  # noqa: TID251 -- of this process's own bytes
import time
from datetime import timedelta

import horovod.torch as hvd
import pytest
import torch
import torch.distributed as dist
from conftest import process_group
from helpers import assert_same_on_all_ranks, backward, batch, gradients, mlp
from hooked import Given, gradient, wrap
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvd_gqsgd import DDPState, DynamicBits, GlobalQSGD, ddp_hook, simulate

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)


@pytest.mark.usefixtures("several")
def test_members_in_different_numbers_of_groups(rank, size):
    """Names that PyTorch makes by counting would differ, and the members wait for ever."""
    process_group()
    before = [dist.new_group([rank], use_local_synchronization=True) for _ in range(rank)]
    ranks = list(range(max(size - 1, 1)))
    group = dist.new_group(ranks)
    if rank in ranks:
        everyone = gradients(len(ranks), 5000)
        x = everyone[rank].clone()
        DDPState(group, min_numel=0).average(x, first=True).wait()
        assert torch.equal(x, simulate(everyone))
    for each in before:
        dist.destroy_process_group(each)


@pytest.mark.usefixtures("several")
def test_the_timeout_is_that_of_the_process_group(rank, size):
    """One rank stays away: the others wait as long as the user said, not for half an hour."""
    process_group()
    group = dist.new_group(timeout=timedelta(seconds=1.5))
    state = DDPState(group, min_numel=0)
    began = time.monotonic()
    if rank != 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out|reset|closed"):
            state.average(torch.ones(5000), first=True).wait()
        assert time.monotonic() - began < 10
    hvd.barrier()


def test_a_sparse_bucket_goes_as_it_is(rank, size):
    state = DDPState(process_group(), min_numel=0)
    models = [nn.Embedding(5000, 8, sparse=True) for _ in range(2)]
    models[0].load_state_dict(models[1].state_dict())
    for model, its_state in zip(models, (state, None), strict=True):
        wrapped = wrap(model, its_state)
        wrapped(torch.tensor([1, 5, 5, 7 + rank])).sum().backward()
    found, exact = (model.weight.grad for model in models)
    assert found.is_sparse
    assert torch.equal(found.to_dense(), exact.to_dense())
    stats = state.stats()
    assert (stats.tensors, stats.tensors_bypassed, stats.tensors_sparse) == (1, 1, 1)
    assert stats.bypassed_bytes == 4 * (4 * 8 + 2 * 4)  # values, and indices of 64 bits
    assert "compressed none of 1 tensors: 1 sparse" in str(stats)
    state.close()


@pytest.mark.few
def test_a_warning_if_nothing_is_ever_compressed(rank, size, caplog):
    state = DDPState(process_group())
    for _ in range(150):
        state.average(torch.ones(9), first=True).wait()
    said = [r.getMessage() for r in caplog.records if "compressed none" in r.getMessage()]
    expected = ["GlobalQSGD compressed none of 100 tensors: 100 smaller than min_numel"]
    assert said == (expected if rank == 0 else [])
    assert state.stats().tensors_small == 150
    state.close()


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_a_copy_has_a_state_of_its_own(rank, size, how, caplog):
    process_group()
    options = {"bits": DynamicBits(7, total_steps=8, min_bits=5), "exchange": "allreduce"}
    state = DDPState(min_numel=0, **options)
    everyone = gradients(size, 5000)

    def step(state):
        x = everyone[rank].clone()
        return state.average(x, first=True).wait()

    step(state)
    step(state)
    before = state.state_dict()
    with caplog.at_level("INFO", "hvd_gqsgd"):
        copied = how(state)
    assert "opens them on the default process group" in caplog.text
    assert copied.world_size is None
    assert (copied.state_dict(), copied.stats()) == (before, state.stats())
    third = step(copied)
    assert state.state_dict() == before
    assert copied.state_dict()["step"] == 3
    assert torch.equal(third, step(state))
    assert copied.state_dict() == state.state_dict()
    state.close()
    copied.close()


def test_models_with_the_hook_are_copied_and_saved(rank, size):
    process_group()
    model = DistributedDataParallel(mlp())
    model.register_comm_hook(GlobalQSGD(min_numel=0).ddp_state(), ddp_hook)
    backward(model, rank)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.zero_grad()
        backward(other, rank, step=1)
        assert_same_on_all_ranks(gradient(other))
    _, state = model._comm_hooks[0]
    assert state.stats().steps == 1
    state.close()


def test_a_compressor_knows_the_steps_of_its_hook(new_state, rank, size):
    compressor = GlobalQSGD(min_numel=0)
    compressor.load_state_dict({"step": 40, "schedule": {}})
    state = compressor.ddp_state(process_group())
    model = Given(5000)
    wrapped, everyone = wrap(model, state), gradients(size, 5000)
    for step in range(40, 44):
        model.zero_grad()
        wrapped(everyone[rank]).backward()
        assert torch.equal(model.weight.grad, simulate(everyone, step=step))
    assert compressor.state_dict()["step"] == 44
    state.close()


def test_a_state_made_before_the_process_group(rank, size):
    """As where Lightning makes its strategy."""
    process_group()
    dist.destroy_process_group()
    process_group.cache_clear()
    compressor = GlobalQSGD(min_numel=0)
    states = [compressor.ddp_state(), GlobalQSGD.ddp_state()]
    with pytest.raises(ValueError, match="bits must be"):
        GlobalQSGD(bits=8).ddp_state() and DDPState(bits=1)
    process_group()
    everyone = gradients(size, 5000)
    x = everyone[rank].clone()
    assert torch.equal(states[0].average(x, first=True).wait(), simulate(everyone))
    assert compressor.stats().steps == 1
    assert states[0].world_size == size
    for state in states:
        state.close()


def test_models_that_share_a_state_and_a_backward_pass(new_state, rank, size):
    state = new_state()
    models = [mlp(seed=1), mlp(seed=2)]
    wrapped = [wrap(model, state, bucket_cap_mb=0.01) for model in models]
    inputs, _ = batch(rank)
    for step in range(3):
        for model in models:
            model.zero_grad()
        sum(model(inputs).square().sum() for model in wrapped).backward()
        assert_same_on_all_ranks(torch.cat([gradient(model) for model in models]))
        assert state.state_dict()["step"] == step + 1


@pytest.mark.few
def test_compiled_autograd_hands_in_gradients(new_state, rank, size):
    state, everyone = new_state(), gradients(size, 5000)
    model = Given(5000)
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        compiled = torch.compile(wrap(model, state), backend="eager")
        for step in range(2):
            model.zero_grad()
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                compiled(everyone[rank]).backward()
            assert torch.equal(model.weight.grad, simulate(everyone, step=step))
    torch.compiler.reset()
