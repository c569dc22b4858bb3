"""Resumed trainings have the bits of uninterrupted ones, by the state of the compressor alone."""

from __future__ import annotations

import gc
import os

import horovod.torch as hvd
import pytest
import torch
from conftest import process_group
from helpers import assert_same_on_all_ranks, backward, mlp
from torch.nn.parallel import DistributedDataParallel

from hvd_gqsgd import DynamicBits, GlobalQSGD, ddp_hook

BEFORE, AFTER = 6, 4  # a new schedule would have other widths than one that goes on from here


def new_compressor() -> GlobalQSGD:
    """Its widths change from step to step."""
    bits = DynamicBits(6, total_steps=12, min_bits=4)
    return GlobalQSGD(bits=bits, exchange="allreduce", min_numel=0)


def train_horovod(model, compressor, rank, steps):
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5),
        named_parameters=model.named_parameters(),
        compression=compressor,
    )
    for step in steps:
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()


def train_ddp(model, compressor, rank, steps):
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        pytest.skip("the same as under mpirun")
    # Otherwise DDP orders its buckets anew after the first step, a resumed one too.
    wrapped = DistributedDataParallel(
        model, process_group=process_group(), find_unused_parameters=True
    )
    state = compressor.ddp_state(process_group())
    wrapped.register_comm_hook(state, ddp_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in steps:
        optimizer.zero_grad()
        backward(wrapped, rank, step)
        optimizer.step()
    state.close()


def train_fsdp(model, compressor, rank, steps):
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        pytest.skip("the same as under mpirun")
    from sharded import shard  # here, as it takes seconds to import

    shard(model, compressor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in steps:
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()


def whole(tensor):
    """Gathered, if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(model):
    return torch.cat([whole(p.detach()).view(-1) for p in model.parameters()])


def copy_of(model):
    """Without the hooks of a former training."""
    other = mlp()
    other.load_state_dict({key: whole(value) for key, value in model.state_dict().items()})
    return other


@pytest.mark.parametrize("train", [train_horovod, train_ddp])
def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(rank, several, train):
    """The state is loaded before the front end exists. With a part of it the bits differ."""
    whole, throughout = mlp(), new_compressor()
    train(whole, throughout, rank, range(BEFORE + AFTER))
    first, saved = mlp(), new_compressor()
    train(first, saved, rank, range(BEFORE))
    state = saved.state_dict()
    assert state["step"] == state["schedule"]["steps"] == BEFORE

    resumed, compressor = copy_of(first), new_compressor()
    compressor.load_state_dict(state)
    train(resumed, compressor, rank, range(BEFORE, BEFORE + AFTER))
    assert torch.equal(weights(resumed), weights(whole))
    assert compressor.state_dict() == throughout.state_dict()

    for lost in ({"step": 0}, {"schedule": new_compressor().state_dict()["schedule"]}):
        other, compressor = copy_of(first), new_compressor()
        compressor.load_state_dict(state | lost)
        train(other, compressor, rank, range(BEFORE, BEFORE + AFTER))
        assert not torch.equal(weights(other), weights(whole)), lost


@pytest.mark.parametrize("train", [train_horovod, train_ddp])
def test_a_front_end_goes_on_where_one_that_is_gone_ended(rank, several, train):
    """With the same compressor, whose state does not depend on when the garbage is collected."""
    whole = mlp()
    train(whole, new_compressor(), rank, range(BEFORE + AFTER))
    first, compressor = mlp(), new_compressor()
    train(first, compressor, rank, range(BEFORE))
    before = compressor.state_dict()
    gc.collect()
    assert compressor.state_dict() == before
    second = copy_of(first)
    train(second, compressor, rank, range(BEFORE, BEFORE + AFTER))
    assert torch.equal(weights(second), weights(whole))


@pytest.mark.parametrize("train", [train_horovod, train_ddp])
def test_one_rank_may_ask_for_the_state(rank, several, train):
    """As where rank 0 alone writes checkpoints: asking changes no bit."""
    asked, silent = (mlp(), new_compressor()), (mlp(), new_compressor())
    train(*silent, rank, range(BEFORE))
    ask = asked[1].state_dict if rank == 0 else lambda: None
    train(*asked, rank, (step for step in range(BEFORE) if ask() is None or True))
    assert torch.equal(weights(asked[0]), weights(silent[0]))


@pytest.mark.few
@pytest.mark.parametrize("loading", [0, -1])
@pytest.mark.parametrize("train", [train_horovod, train_ddp, train_fsdp])
def test_what_one_rank_loads_alone_is_settled_by_all(rank, size, several, train, loading):
    """They take the latest of their steps, as with newcomers: none has a dither of its own."""

    def trained(source, load):
        model, compressor = mlp(), source()
        train(model, compressor, rank, range(2))
        load(compressor)
        model = copy_of(model)
        train(model, compressor, rank, range(2, 4))
        return weights(model), compressor.state_dict()

    def fixed():
        return GlobalQSGD(min_numel=0)

    alone = rank == loading % size
    behind, ahead = fixed().state_dict(), fixed().state_dict() | {"step": 20}
    nobody = trained(fixed, lambda compressor: None)
    everyone = trained(fixed, lambda compressor: compressor.load_state_dict(ahead))
    one_ahead = trained(fixed, lambda compressor: alone and compressor.load_state_dict(ahead))
    one_behind = trained(fixed, lambda compressor: alone and compressor.load_state_dict(behind))
    for found, right in ((one_ahead, everyone), (one_behind, nobody)):
        assert torch.equal(found[0], right[0])
        assert found[1] == right[1]
    assert not torch.equal(nobody[0], everyone[0])
    if train is not train_fsdp:  # which takes no DynamicBits
        states = []
        for other in (ahead, behind):
            schedule = new_compressor().state_dict()["schedule"]
            state = {"step": other["step"], "schedule": schedule}
            load = lambda compressor: alone and compressor.load_state_dict(state)  # noqa: B023, E731
            found, settled = trained(new_compressor, load)
            assert_same_on_all_ranks(found)
            states += [settled["step"], *settled["schedule"].values()]
        assert_same_on_all_ranks(torch.tensor(states, dtype=torch.int64))
