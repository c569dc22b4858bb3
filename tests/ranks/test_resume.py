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


def weights(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def copy_of(model):
    """Without the hooks of a former training."""
    other = mlp()
    other.load_state_dict(model.state_dict())
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


@pytest.mark.parametrize("train", [train_horovod, train_ddp])
@pytest.mark.parametrize("loading", [0, -1])
def test_a_state_loaded_on_one_rank_is_that_of_all(rank, size, train, loading):
    """As where rank 0 alone reads the checkpoint: the others take over the step, so that a fixed
    width gives the bits of a run whose ranks have all loaded, and the schedule of widths."""
    source, model = GlobalQSGD(min_numel=0), mlp()
    train(model, source, rank, range(BEFORE))
    everywhere, one = GlobalQSGD(min_numel=0), GlobalQSGD(min_numel=0)
    for compressor in (everywhere, one) if rank == loading % size else (everywhere,):
        compressor.load_state_dict(source.state_dict())
    trained = []
    for compressor in (everywhere, one):
        after = copy_of(model)
        train(after, compressor, rank, range(BEFORE, BEFORE + AFTER))
        trained.append(weights(after))
    assert torch.equal(*trained)
    assert everywhere.state_dict() == one.state_dict()

    dynamic, after = new_compressor(), copy_of(model)
    if rank == loading % size:
        words = dict.fromkeys(("last", "recent", "mean"), 2**30)
        schedule = {"steps": BEFORE, "saved": 2**30, **words}
        dynamic.load_state_dict({"step": BEFORE, "schedule": schedule})
    train(after, dynamic, rank, range(BEFORE, BEFORE + AFTER))
    assert_same_on_all_ranks(weights(after))
    state = dynamic.state_dict()
    assert state["step"] == state["schedule"]["steps"] == BEFORE + AFTER
