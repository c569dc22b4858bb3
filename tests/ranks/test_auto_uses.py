"""``bits="auto"`` in programs with several models, and with a rank that has nothing to do."""

from __future__ import annotations

import copy
import itertools
import os

import horovod.torch as hvd
import pytest
import torch
from conftest import process_group
from helpers import assert_same_on_all_ranks, backward, gradients, mlp
from hooked import Given, wrap
from test_auto import TIMES, assert_same_plan, plan_of, take, trainer  # noqa: F401

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.transports.horovod import HorovodTransport

SLOW = {name: 100_000 if name == "fp32" else 130_000 for name in TIMES}
under_mpi = pytest.mark.skipif(
    "OMPI_COMM_WORLD_SIZE" not in os.environ, reason="the same as under mpirun"
)


def test_two_compressors_in_turn(rank, size, several, take):  # noqa: F811
    """As those of a generator and its critic, which decide apart."""
    both = [GlobalQSGD(bits="auto", min_numel=0) for _ in range(2)]
    steps = [trainer(mlp(seed), compressor) for seed, compressor in enumerate(both)]
    take(both[0])
    for number in range(40):
        steps[0](number)
        steps[1](number)
        if number % 3 == 0:
            steps[1](number)
    for compressor in both:
        assert_same_plan(compressor)
    assert both[0].stats().setting == "8 bits"


def exchange(compressor, **tensors):
    """One step."""
    sent = {name: compressor.compress(tensor) for name, tensor in tensors.items()}
    for name, (each, context) in sorted(sent.items()):
        compressor.decompress(hvd.allreduce(each.clone(), name=name), context)


def test_a_copy_on_one_rank(rank, size, several, take):  # noqa: F811
    """A shallow one has the same state."""
    compressor = GlobalQSGD(bits="auto", min_numel=0, patience=10.0)
    take(compressor, SLOW)
    for number in range(40):
        x = gradients(size, 5000, seed=number)[rank].clone()
        exchange(compressor, x=x)
        if rank == 0 and number == 12:
            copied = copy.copy(compressor)
    assert compressor.state_dict()["step"] == 40
    if rank == 0:
        assert copied.state_dict() == compressor.state_dict()
    assert_same_plan(compressor)


def test_another_order_on_one_rank(rank, size, several, take):  # noqa: F811
    """In some steps, where the first gradient is one that Horovod does not take."""
    compressor = GlobalQSGD(bits="auto", min_numel=0, patience=10.0)
    take(compressor, {"fp32": 20_001})  # nothing to gain
    for number in range(25):
        x = gradients(size, 5000, seed=number)[rank].clone()
        tensors = {"x": x, "y": x.bfloat16()}
        if rank == 0 and number % 20 > 2:
            tensors = dict(reversed(tensors.items()))
        exchange(compressor, **tensors)
    assert compressor.stats().tensors_auto == compressor.state_dict()["step"] == 25


def test_an_interrupted_step(rank, size, several, take, monkeypatch):  # noqa: F811
    """Its first gradient comes again, and begins it."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor, SLOW)
    tell, told = HorovodTransport.max_async, itertools.count()

    def interrupted(self, tensor, name):
        if "auto" in name and next(told) == 2:
            raise KeyboardInterrupt
        return tell(self, tensor, name)

    monkeypatch.setattr(HorovodTransport, "max_async", interrupted)
    interrupts = 0
    for number in range(20):
        x = gradients(size, 5000, seed=number)[rank].clone()
        try:
            exchange(compressor, x=x)
        except KeyboardInterrupt:
            interrupts += 1
            exchange(compressor, x=x)
    assert interrupts == 1
    assert compressor.state_dict()["step"] == 20
    assert_same_plan(compressor)


@under_mpi
def test_horovod_and_ddp_in_turn(rank, size, several, take):  # noqa: F811
    """Each begins a session of its own, whatever the other one has measured."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor, SLOW)
    state = compressor.ddp_state(process_group())
    wrapped = wrap(Given(5000), state)
    for turn in range(3):
        for number in range(11):
            exchange(compressor, x=gradients(size, 5000, seed=number)[rank].clone())
        assert compressor.stats().steps == turn * 22 + 11
        for number in range(11):
            wrapped(gradients(size, 5000, seed=number)[rank]).backward()
        assert state.state_dict()["step"] == turn * 22 + 22
    earlier = compressor.state_dict()
    for _ in range(4):
        exchange(compressor, x=torch.ones(5000))
    state.load_state_dict(earlier)
    assert compressor.state_dict()["step"] == 66
    state.close()


@under_mpi
@pytest.mark.parametrize("at_once", [False, True], ids=["in turn", "in one backward pass"])
def test_ddp_states_of_one_compressor(rank, size, several, take, at_once):  # noqa: F811
    """As those of a generator and its critic: each begins steps of its own, of one session."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    states = [compressor.ddp_state(process_group()) for _ in range(2)]
    models = [Given(5000) for _ in states]
    wrapped = [wrap(model, state) for model, state in zip(models, states, strict=True)]
    for number in range(30):
        losses = [
            model(gradients(size, 5000, seed=2 * number + which)[rank])
            for which, model in enumerate(wrapped)
        ]
        for loss in [sum(losses)] if at_once else losses:
            loss.backward()
    for model in models:
        assert_same_on_all_ranks(model.weight.grad)
    assert_same_plan(compressor)
    assert compressor.stats().setting == "8 bits"
    assert compressor.state_dict()["step"] == 60
    for state in states:
        state.close()


@under_mpi
def test_fsdp_models_of_one_compressor(rank, several, take):  # noqa: F811
    from sharded import shard  # here, as it takes seconds to import

    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    models = [compressor.fsdp(shard(mlp(seed))) for seed in range(2)]
    for number in range(20):
        for model in models:
            backward(model, rank, number)
    for model in models:
        full = [p.grad.full_tensor().view(-1) for p in model.parameters()]
        assert_same_on_all_ranks(torch.cat(full))
    assert_same_plan(compressor)
    assert compressor.stats().setting == "8 bits"


@under_mpi
@pytest.mark.parametrize("front_end", ["ddp", "fsdp"])
def test_an_earlier_state(rank, size, several, front_end):
    """Loaded by the same compressor: its steps come again, with the same bits."""
    compressor = GlobalQSGD(bits="auto", min_numel=0, plan=[(0, "8 bits")])
    model = Given(5000)
    if front_end == "ddp":
        state = compressor.ddp_state(process_group())
        wrapped = wrap(model, state)
    else:
        from sharded import shard  # here, as it takes seconds to import

        wrapped = shard(model, compressor)
    start = compressor.state_dict()

    def mean():
        model.zero_grad()
        wrapped(gradients(size, 5000)[rank]).backward()
        each = model.weight.grad
        return each.clone() if front_end == "ddp" else each.full_tensor()

    first, second = mean(), mean()
    assert not torch.equal(first, second)
    compressor.load_state_dict(start)
    assert torch.equal(mean(), first)
    assert torch.equal(mean(), second)
    if front_end == "ddp":
        state.close()


@under_mpi
def test_fsdp_modules_of_some_steps(rank, several):
    """A setting that is taken again begins a step, whichever module comes first."""
    from sharded import shard  # here, as it takes seconds to import

    plan = [(0, "8 bits"), (1, "fp32"), (2, "8 bits")]
    compressor = GlobalQSGD(bits="auto", min_numel=0, plan=plan)
    modules = torch.nn.ModuleList(shard(torch.nn.Linear(64, 64)) for _ in range(2))
    compressor.fsdp(modules)
    for used in ([0], [0, 1], [1]):
        for module in used:
            modules[module](torch.ones(8, 64)).square().mean().backward()
    assert compressor.stats().steps == compressor.state_dict()["step"] == 3


@under_mpi
@pytest.mark.core
def test_replicas_of_shards(rank, size, several, take):  # noqa: F811
    """The ranks of all shards take one setting, also where those of one shard are slower."""
    if size % 2:
        pytest.skip("needs an even number of ranks")
    from sharded import mesh, shard  # here, as it takes seconds to import

    both = mesh(2, size // 2, names=("replicate", "shard"))
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor, TIMES if rank % (size // 2) else dict.fromkeys(TIMES, 100_000))
    model = shard(mlp(), mesh=both["shard"])
    compressor.fsdp(model, replicate_group=both["replicate"].get_group())
    for number in range(10):
        backward(model, rank, number)
    assert len(plan_of(compressor)) > 1
    assert_same_plan(compressor)


@pytest.mark.parametrize("resumed", [False, True])
def test_join_before_the_first_batch(rank, size, several, take, resumed):  # noqa: F811
    """All steps are uncompressed until this rank has taken part in one."""
    if size > 6:
        pytest.skip("Horovod 0.28.1 aborts: new messages after lower ranks have left")
    compressor = GlobalQSGD(bits="auto", min_numel=0, patience=20.0)
    take(compressor)

    def train(batches):
        for number in range(batches):
            x = gradients(size, 5000, seed=number)[rank].clone()
            mean = hvd.allreduce(x, compression=compressor, name="x")
        return mean if batches else None

    if resumed:
        train(30)
        assert compressor.stats().setting == "8 bits"
        compressor.load_state_dict(compressor.state_dict())
    train(0 if rank == size - 1 else 4)
    if rank < size - 1:
        assert compressor.stats().setting == "fp32"
    hvd.join()
    assert_same_on_all_ranks(train(20))
    assert compressor.stats().setting == "8 bits"
    hvd.join()
    assert_same_on_all_ranks(torch.tensor([compressor.state_dict()["step"]]))


def test_alone(size, take):  # noqa: F811
    """One rank exchanges nothing, and decides nothing."""
    if size > 1:
        pytest.skip("needs one rank")
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    x = gradients(1, 5000)[0]
    for _ in range(10):
        assert torch.equal(hvd.allreduce(x.clone(), compression=compressor, name="x"), x)
    assert plan_of(compressor) == [[0, "fp32"]]
