"""``bits="auto"``: all ranks take the same settings, whatever each of them measures.

Where a test says so, steps take the times that it gives, in place of those of the clock.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import zlib

import horovod.torch as hvd
import pytest
import torch
from conftest import process_group
from helpers import assert_same_on_all_ranks, backward, gradients, mlp
from hooked import Given, wrap

from hvd_gqsgd import AgreementError, BlockBits, GlobalQSGD, simulate
from hvd_gqsgd.auto import conductor
from hvd_gqsgd.auto.stopwatch import Stopwatch
from hvd_gqsgd.exchanges import by_node
from hvd_gqsgd.transports.horovod import HorovodTransport

TIMES = {"fp32": 100_000, "16 bits": 70_000, "8 bits": 40_000, "4 bits per block": 60_000}
TIMES |= {f"{name} flat": 90_000 for name in TIMES if name != "fp32"}
under_mpi = pytest.mark.skipif(
    "OMPI_COMM_WORLD_SIZE" not in os.environ, reason="the same as under mpirun"
)


@pytest.fixture
def take(monkeypatch, rank):
    """Steps of a compressor take so many microseconds with each setting, and some more on some
    ranks."""

    def scripted(compressor, times=TIMES):
        def begin_step(self, began=None):
            setting = compressor.stats().setting
            if not setting:
                return None
            busy = times[setting] + 100 * rank
            return busy, busy - 20_000, busy + 30_000

        monkeypatch.setattr(Stopwatch, "begin_step", begin_step)

    return scripted


def forbid_clocks(monkeypatch):
    """Makes reading a clock an error."""

    def read(self, *args):
        raise AssertionError("the clock was read")

    for name in ("begin_step", "enter", "leave", "passed", "result"):
        monkeypatch.setattr(Stopwatch, name, read)


def plan_of(compressor):
    return compressor.state_dict()["schedule"]["plan"]


def assert_same_plan(compressor):
    """On all ranks."""
    assert_same_on_all_ranks(torch.tensor([zlib.crc32(json.dumps(plan_of(compressor)).encode())]))


def names_of(plan):
    return [name for _, name in plan]


def trainer(model, compressor):
    """A function that makes one step."""
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compressor,
    )

    def step(number):
        optimizer.zero_grad()
        backward(model, hvd.rank(), number)
        optimizer.step()

    return step


def weights(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


@pytest.mark.core
def test_all_ranks_settle_on_the_fastest(rank, several, take, caplog):
    model, compressor = mlp(), GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    step = trainer(model, compressor)
    with caplog.at_level(logging.INFO, "hvd_gqsgd"):
        for number in range(50):
            step(number)
    assert_same_on_all_ranks(weights(model))
    assert_same_plan(compressor)
    names = names_of(plan_of(compressor))
    assert names[0] == "fp32"
    assert names[-1] == compressor.stats().setting == "8 bits"
    assert compressor.stats().decisions >= 1
    messages = [record.message for record in caplog.records]
    decided = [message for message in messages if " 8 bits: exchange " in message]
    assert len(decided) == (1 if rank == 0 else 0)


def test_a_compressor_that_does_not_pay_is_not_used(several, take):
    """Where it is predicted to pay, it is tried, and left."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor, {name: 100_000 if name == "fp32" else 130_000 for name in TIMES})
    step = trainer(mlp(), compressor)
    for number in range(60):
        step(number)
    assert compressor.stats().setting == "fp32"
    assert compressor.stats().decisions == 0
    assert len(plan_of(compressor)) > 1
    assert_same_plan(compressor)


def test_uncompressed_steps_are_those_of_horovod(rank, size, take):
    """To the bit, and nothing more is counted on the wire."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    for number in range(3):
        everyone = gradients(size, 5000, seed=number)
        mean = hvd.allreduce(everyone[rank].clone(), compression=compressor, name="x")
        assert torch.equal(mean, hvd.allreduce(everyone[rank].clone(), name="y"))
    stats = compressor.stats()
    assert stats.bytes_on_wire == stats.bytes_before == 3 * 20_000
    assert stats.steps == stats.tensors_auto == 3


def test_compressed_steps_are_those_of_the_setting(rank, size, several, take):
    """With the dither of the step's number, as in a run with that width alone."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    for number in range(40):
        everyone = gradients(size, 5000, seed=number)
        mean = hvd.allreduce(everyone[rank].clone(), compression=compressor, name="x")
        if compressor.stats().setting == "8 bits":
            assert torch.equal(mean, simulate(everyone, step=number))
    assert compressor.stats().setting == "8 bits"


@pytest.mark.core
def test_nodes(rank, size, monkeypatch):
    """The flat settings of a plan have the bits of a flat exchange."""
    if size < 4:
        pytest.skip("needs two nodes of two ranks")
    monkeypatch.setattr(HorovodTransport, "nodes", None)
    for module in (conductor, by_node):
        monkeypatch.setattr(module, "host_number", lambda: 1 + (rank >= size // 2))
    plan = [[0, "fp32"], [2, "4 bits per block flat"], [4, "4 bits per block"]]
    compressor = GlobalQSGD(bits="auto", min_numel=0, plan=plan)
    half = size // 2
    ways = {"4 bits per block": (half, size - half), "4 bits per block flat": "flat"}
    for number in range(6):
        everyone = gradients(size, 5000, seed=number)
        mean = hvd.allreduce(everyone[rank].clone(), compression=compressor, name="x")
        if (way := ways.get(compressor.stats().setting)) is not None:
            bits = BlockBits(4)
            assert torch.equal(mean, simulate(everyone, step=number, bits=bits, hierarchy=way))
    assert plan_of(compressor) == plan


@pytest.mark.core
def test_a_plan_replays_the_bits(rank, size, several, take, monkeypatch):
    """Of one tensor a step: Horovod adds up several uncompressed ones in an order that varies."""

    def means(compressor):
        everyone = [gradients(size, 5000, seed=number)[rank] for number in range(40)]
        return [hvd.allreduce(x, compression=compressor, name="x") for x in everyone]

    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    first = means(compressor)
    forbid_clocks(monkeypatch)
    plan = plan_of(compressor)
    assert len(plan) > 2
    for other, same in ((plan, True), ([*plan[:2], [plan[-1][0], "16 bits"]], False)):
        pinned = GlobalQSGD(bits="auto", min_numel=0, plan=other)
        again = means(pinned)
        assert plan_of(pinned) == other
        assert all(map(torch.equal, first, again)) == same


@pytest.mark.parametrize("who", ["all", "rank 0"])
def test_resuming(rank, several, take, who):
    """Ranks without a state adopt it in the first step, which is uncompressed."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    step = trainer(mlp(), compressor)
    for number in range(40):
        step(number)
    state = json.loads(json.dumps(compressor.state_dict()))
    assert state["step"] == 40
    resumed = GlobalQSGD(bits="auto", min_numel=0)
    if who == "all" or rank == 0:
        resumed.load_state_dict(state)
    take(resumed)
    step = trainer(mlp(), resumed)
    settings = []
    for number in range(40, 48):
        step(number)
        settings.append(resumed.stats().setting)
    assert settings == ["fp32"] + 7 * ["8 bits"]
    assert resumed.state_dict()["step"] == 48
    assert_same_plan(resumed) if who == "all" else None


def test_ranks_that_join_later(rank, size, several, take, restart):
    """As in elastic training: rank 0 comes anew, and the others have a state."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    step = trainer(mlp(), compressor)
    for number in range(30):
        step(number)
    restart()
    if rank == 0:
        compressor = GlobalQSGD(bits="auto", min_numel=0)
        take(compressor)
    step = trainer(mlp(), compressor)
    settings = []
    for number in range(30, 36):
        step(number)
        settings.append(compressor.stats().setting)
    assert settings == ["fp32"] + 5 * ["8 bits"]
    assert compressor.state_dict()["step"] == 36


@pytest.mark.parametrize("batches", [3, 7, 12, 30])
def test_join_with_uneven_batches(rank, size, several, take, batches):
    """Ranks leave before, in and after the trials, and come back for the next epoch."""
    if size > 6 and batches < 30:
        pytest.skip("Horovod 0.28.1 aborts: new messages after lower ranks have left")
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    number = itertools.count()
    for _ in range(4):
        for _ in range(batches + rank):
            everyone = gradients(size, 5000, seed=next(number))
            hvd.allreduce(everyone[rank].clone(), compression=compressor, name="x")
        hvd.join()
    for _ in range(25):
        everyone = gradients(size, 5000, seed=next(number))
        mean = hvd.allreduce(everyone[rank].clone(), compression=compressor, name="x")
        assert_same_on_all_ranks(mean)
    assert compressor.stats().decisions >= 1
    state = compressor.state_dict()
    assert_same_on_all_ranks(torch.tensor([state["step"], *state["schedule"]["words"]]))


def test_different_options(rank, several, take):
    """An error on all ranks at the second step, the first that could be compressed."""
    compressor = GlobalQSGD(bits="auto", error=1e-3 if rank == 0 else None)
    step = trainer(mlp(), compressor)
    step(0)
    with pytest.raises(AgreementError, match=r"different options: error; .* has error="):
        step(1)
    hvd.barrier()


def test_error_excludes_settings(several, take):
    compressor = GlobalQSGD(bits="auto", min_numel=0, error=1e-7)
    take(compressor)
    step = trainer(mlp(), compressor)
    for number in range(40):
        step(number)
    assert set(names_of(plan_of(compressor))) == {"fp32", "16 bits"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(rank, size, several, take, dtype):
    """Horovod takes no bfloat16: it goes in the widest codes where others go uncompressed."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    for number in range(30):
        everyone = gradients(size, 3000, seed=number, dtype=dtype)
        mean = hvd.allreduce(everyone[rank].clone(), compression=compressor, name="x")
        if dtype is torch.bfloat16 and compressor.stats().setting == "fp32":
            assert torch.equal(mean, simulate(everyone, step=number, bits=16))
    assert compressor.stats().setting == "8 bits"
    assert compressor.stats().steps == 30


def test_small_tensors_and_nan(rank, size, several, take):
    """Gradients that a scaler skips are not finite on all ranks, whatever the setting."""
    compressor = GlobalQSGD(bits="auto")
    take(compressor)
    for number in range(30):
        everyone = gradients(size, 5000, seed=number)
        small = hvd.allreduce(everyone[rank, :10].clone(), compression=compressor, name="s")
        assert torch.allclose(small, everyone[:, :10].mean(0))
        if number % 4 == 1:
            everyone[0, 7] = torch.inf
        mean = hvd.allreduce(everyone[rank].clone(), compression=compressor, name="x")
        assert bool(mean.isfinite().all()) == (number % 4 != 1)
    assert compressor.stats().setting == "8 bits"
    assert compressor.stats().tensors_small == 30
    assert compressor.state_dict()["step"] == 30


def test_process_sets(rank, size, process_set, take):
    """Each decides for itself."""
    compressor = GlobalQSGD(bits="auto", min_numel=0, process_set=process_set)
    take(compressor)
    for number in range(30):
        x = gradients(size, 5000, seed=number)[rank].clone()
        hvd.allreduce(x, compression=compressor, name="x", process_set=process_set)
    alone = process_set.size() == 1
    assert compressor.stats().setting == ("fp32" if alone else "8 bits")
    hvd.barrier()


def test_the_real_clock(rank, size, several):
    """A slow rank and a fast one: they may decide anything, but the same."""
    model, compressor = mlp(), GlobalQSGD(bits="auto", min_numel=0)
    step = trainer(model, compressor)
    for number in range(30):
        if rank == 0:
            torch.randn(300, 300) @ torch.randn(300, 300)
        step(number)
    assert_same_on_all_ranks(weights(model))
    assert_same_plan(compressor)


@under_mpi
@pytest.mark.core
def test_ddp(rank, size, several, take):
    def train(compressor):
        model = Given(5000)
        state = compressor.ddp_state(process_group())
        wrapped = wrap(model, state, find_unused_parameters=True)
        for number in range(40):
            model.zero_grad()
            wrapped(gradients(size, 5000, seed=number)[rank]).backward()
            with torch.no_grad():
                model.weight -= 0.1 * model.weight.grad
        state.close()
        return weights(model)

    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    trained = train(compressor)
    assert_same_on_all_ranks(trained)
    assert_same_plan(compressor)
    assert compressor.stats().setting == "8 bits"
    plan = plan_of(compressor)
    assert torch.equal(train(GlobalQSGD(bits="auto", min_numel=0, plan=plan)), trained)


@under_mpi
def test_ddp_with_different_options(rank, several):
    options = {"bits": "auto"} if rank == 0 else {"bits": 8}
    with pytest.raises(AgreementError, match="different options: bits"):
        GlobalQSGD(**options).ddp_state(process_group())


@under_mpi
@pytest.mark.parametrize("weight_bits", [None, 8])
def test_fsdp(rank, size, several, take, weight_bits):
    from sharded import shard  # here, as it takes seconds to import

    def train(compressor):
        model = shard(mlp())
        compressor.fsdp(model, weight_bits=weight_bits)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(40):
            optimizer.zero_grad()
            backward(model, rank, number)
            optimizer.step()
        return torch.cat([p.detach().full_tensor().view(-1) for p in model.parameters()])

    compressor = GlobalQSGD(bits="auto", min_numel=0)
    take(compressor)
    trained = train(compressor)
    assert_same_plan(compressor)
    assert compressor.stats().setting == "8 bits"
    plan = plan_of(compressor)
    assert torch.equal(train(GlobalQSGD(bits="auto", min_numel=0, plan=plan)), trained)


def test_given_directly(rank, size, several, take):
    """A tensor that autograd must differentiate through goes to Horovod, as with any width."""
    compressor = GlobalQSGD(bits="auto", min_numel=0)
    model = Given(5000)
    x = gradients(size, 5000)[rank]
    mean = hvd.allreduce(model.weight * x, compression=compressor, name="x")
    assert mean.requires_grad
    assert compressor.stats().tensors_bypassed == 1
