"""A part of the elements, over real transports: the bits of the simulated ranks."""

from __future__ import annotations

from typing import Any

import conftest
import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, backward, batch, gradients, mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hvd_gqsgd
from hvd_gqsgd import AgreementError, BlockBits, GlobalQSGD, ddp_hook, simulate
from hvd_gqsgd.exchanges.differences import is_whole
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import SimulatedRanks

OPTIONS: list[dict[str, Any]] = [
    {"exchange": "allreduce"},
    {"exchange": "two_phase", "bits": 4},
    {"bits": BlockBits(4)},
    {"select": "permutation"},
    {"select": "permutation", "dither": "exponential"},
]


@pytest.mark.core
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_random_runs(rank, size, several, options):
    rows = gradients(size, 20_003)
    options = options | {"keep": 1 / 16}
    compressor = GlobalQSGD(**options)
    for step in range(2):
        mean = hvd.allreduce(rows[rank], name="x", compression=compressor)
        assert torch.equal(mean, simulate(rows, step=step, **options))
    assert compressor.stats().ratio > (30 if "select" not in options else 60 / size)


@pytest.mark.few
@pytest.mark.flat
def test_other_front_ends(rank, size, several):
    """``allreduce`` over Horovod, and the DDP hook."""
    rows = gradients(size, 20_003)
    expected = simulate(rows, keep=1 / 16)
    assert torch.equal(hvd_gqsgd.allreduce(rows[rank], keep=1 / 16), expected)
    conftest.process_group()
    model = DistributedDataParallel(mlp())
    model.register_comm_hook(GlobalQSGD(keep=1 / 16, min_numel=0).ddp_state(), ddp_hook)
    backward(model, rank)
    gradient = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
    assert_same_on_all_ranks(gradient)
    assert 0.03 < (gradient != 0).double().mean() < 0.1


LED = {"keep": 1 / 16, "select": "leader"}
EF21 = {"keep": 1 / 16, "error_feedback": "ef21"}
MARINA = {"keep": 1 / 16, "select": "permutation", "error_feedback": "marina", "full_every": 2}
NEAREST = {"bits": 2, "rounding": "nearest"}
NARROW = NEAREST | {"error_feedback": "ef21"}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(LED | {"exchange": "allreduce", "low_pass": 0.5}, marks=pytest.mark.few),
        pytest.param(LED | {"exchange": "two_phase"}, marks=pytest.mark.core),
        pytest.param(EF21, marks=pytest.mark.core),
        pytest.param(LED | {"error_feedback": "econtrol"}, marks=pytest.mark.few),
        pytest.param(MARINA, marks=pytest.mark.core),
        pytest.param(MARINA | {"select": "random"}, marks=pytest.mark.few),
        pytest.param(NARROW, marks=pytest.mark.core),
        pytest.param(
            {"select": "permutation", "keep": 1 / 4, "error_feedback": "residual"} | NEAREST,
            marks=pytest.mark.few,
        ),
    ],
    ids=str,
)
def test_error_feedback(rank, size, several, options):
    """With the memory of all ranks, a step that is skipped for infinity, and a checkpoint."""
    parameter = nn.Parameter(torch.zeros(20_003))
    world = SimulatedRanks(size, Options(**options))

    def new() -> GlobalQSGD:
        return GlobalQSGD(**options, named_parameters=[("x", parameter)])

    compressor = new()
    for step in range(5):
        rows = gradients(size, 20_003, seed=step)
        if step == 2:
            rows[-1, 7] = torch.inf
        if step == 3:
            state = compressor.state_dict()
            compressor = new()
            compressor.load_state_dict(state)
        parameter.grad = rows[rank].clone()
        handle, ctx = compressor.compress(parameter.grad)
        mean = compressor.decompress(hvd.allreduce(handle, name="probe"), ctx)
        assert_same_on_all_ranks(mean)
        (expected,) = world.means([[("x", row.contiguous())] for row in rows])
        assert torch.equal(mean.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.few
@pytest.mark.parametrize("options", [EF21, LED | {"error_feedback": "econtrol"}, MARINA], ids=str)
def test_one_rank_has_loaded_its_state(rank, size, several, options):
    """And the others have not: all begin with estimates of zero, and have the same result."""
    parameter = nn.Parameter(torch.zeros(5000))

    def new() -> GlobalQSGD:
        return GlobalQSGD(**options, named_parameters=[("x", parameter)])

    def step(compressor: GlobalQSGD, number: int) -> torch.Tensor:
        rows = gradients(size, 5000, seed=number)
        parameter.grad = rows[rank].clone()
        handle, ctx = compressor.compress(parameter.grad)
        mean = compressor.decompress(hvd.allreduce(handle, name="probe"), ctx)
        assert_same_on_all_ranks(mean)
        return mean

    compressor = new()
    for number in range(3):
        step(compressor, number)
    state = compressor.state_dict()
    compressor = new()
    if rank == 0:
        compressor.load_state_dict(state)
    mean = step(compressor, 3)
    if options is MARINA:  # the first exchange of new estimates is a whole one
        exact = gradients(size, 5000, seed=3).mean(0)
        assert (mean - exact).norm() < 0.6 * exact.norm()
    elif "select" not in options:
        kept = mean != 0
        exact = gradients(size, 5000, seed=3).mean(0)
        assert 0 < kept.sum() <= 5000 / 16 + 32
        assert (mean - exact)[kept].norm() < 0.3 * exact[kept].norm()


@pytest.mark.few
@pytest.mark.parametrize("options", [EF21, MARINA], ids=str)
def test_a_rank_comes_back_after_join(rank, size, several, options):
    """After as many steps of the others as it has itself: all have the same result."""
    parameter = nn.Parameter(torch.zeros(5000))
    compressor = GlobalQSGD(**options, named_parameters=[("x", parameter)])

    def step(number: int) -> torch.Tensor:
        parameter.grad = gradients(size, 5000, seed=number)[rank].clone()
        handle, ctx = compressor.compress(parameter.grad)
        return compressor.decompress(hvd.allreduce(handle, name="probe"), ctx)

    step(0)
    if rank < size - 1:
        step(1)
    hvd.join()
    for number in (2, 3):
        assert_same_on_all_ranks(step(number))


@pytest.mark.few
def test_a_tensor_without_a_name(rank, size, several):
    parameter = nn.Parameter(torch.zeros(5000))
    compressor = GlobalQSGD(**EF21, named_parameters=[("x", parameter)])
    with pytest.raises(ValueError, match="error feedback takes the gradients of named_parameters"):
        hvd.allreduce(torch.ones(5000), compression=compressor)


@pytest.mark.core
@pytest.mark.parametrize("select", ["random", "permutation", "leader", "ef21", "marina", "nearest"])
def test_ranks_leave_by_join(rank, size, several, select):
    """The leader of a step among them."""
    chosen = {
        "ef21": {"error_feedback": "ef21"},
        "marina": MARINA | {"keep": 1 / 8},
        "nearest": NEAREST | {"error_feedback": "residual"},
    }.get(select, {"select": select})
    chosen = {"keep": 1 / 8} | chosen
    parameter = nn.Parameter(torch.zeros(5000))
    named = [("x", parameter)]
    compressor = GlobalQSGD(**chosen, named_parameters=named)
    for step in range(rank + 2):
        everyone = gradients(size, 5000, seed=step)
        parameter.grad = everyone[rank].clone()
        handle, ctx = compressor.compress(parameter.grad)
        mean = compressor.decompress(hvd.allreduce(handle, name="probe"), ctx)
        assert mean.isfinite().all()
        assert mean.any()
        # In steps that a rank is away from, estimates begin with zero, and all send the same runs.
        if select == "marina":  # and whole gradients are exchanged
            exact = everyone[step - 1 :].sum(0) if step > 1 else everyone.sum(0)
            assert step < 2 or (mean * size - exact).norm() < 0.6 * exact.norm()
        elif select not in ("permutation", "ef21") or step > 1:
            assert mean.count_nonzero() <= 5000 / 8 + 32
    hvd.join()


@pytest.mark.few
@pytest.mark.parametrize(
    "chosen",
    [
        {"select": "random"},
        {"select": "permutation"},
        {"select": "leader"},
        {"error_feedback": "ef21"},
        NARROW,
    ],
    ids=str,
)
def test_one_rank_gives_up_a_step(rank, size, several, chosen):
    """It leaves the memory of all ranks, and the next step is right."""
    parameters = [nn.Parameter(torch.zeros(9000)) for _ in range(2)]
    named = [(str(i), parameter) for i, parameter in enumerate(parameters)]
    options = {"keep": 1 / 8, "bucket_mb": 0.03} | chosen
    compressor = GlobalQSGD(**options, named_parameters=named)
    everyone = gradients(size, 9000)
    waiting = []
    for i, parameter in enumerate(parameters):
        parameter.grad = everyone[rank].clone()
        probe, context = compressor.compress(parameter.grad)
        waiting.append((hvd.allreduce_async_(probe, name=f"given up {i}"), context))
    reduced = [hvd.synchronize(handle) for handle, _ in waiting]
    if rank == size - 1:
        del context, waiting
    else:
        with pytest.raises(AgreementError):
            compressor.decompress(reduced[0], waiting[0][1])
    state = compressor.state_dict()
    assert not any(state.get("memory", {"tensors": {}})["tensors"].values())
    means = []
    for _ in range(2):
        parameters[0].grad = everyone[rank].clone()
        probe, context = compressor.compress(parameters[0].grad)
        means.append(compressor.decompress(hvd.allreduce(probe, name="probe"), context))
    world = SimulatedRanks(size, Options(**options), step=1)
    world.load_state_dicts([state] * size)  # for the turns, which the last rank did not count
    for mean in means:
        assert_same_on_all_ranks(mean)
        (expected,) = world.means([[("0", row.contiguous())] for row in everyone])
        assert rank == size - 1 or torch.equal(mean, expected)


@pytest.mark.core
def test_one_rank_gives_up_whichever_messages_follow(rank, size, several):
    """Steps of whole gradients, and of a part: it starts the messages that the others wait for, and
    the next step has the result of a run without the steps given up."""
    parameters = [nn.Parameter(torch.zeros(9000)) for _ in range(2)]
    named = [(str(i), parameter) for i, parameter in enumerate(parameters)]
    options = Options(**MARINA | {"bucket_mb": 0.03})
    compressor = GlobalQSGD(**MARINA, bucket_mb=0.03, named_parameters=named)
    given_up = (2, 4)  # a part, and whole gradients
    assert [is_whole(options, step) for step in given_up] == [False, True]
    for step in range(6):
        everyone = gradients(size, 9000, seed=step)
        waiting = []
        for i, parameter in enumerate(parameters):
            parameter.grad = everyone[rank] * (i + 1)
            probe, context = compressor.compress(parameter.grad)
            waiting.append((hvd.allreduce_async_(probe, name=f"{step} {i}"), context))
        reduced = [hvd.synchronize(handle) for handle, _ in waiting]
        if step not in given_up:
            for tensor, (_, context) in zip(reduced, waiting, strict=True):
                mean = compressor.decompress(tensor, context)
                assert_same_on_all_ranks(mean)
            histories = compressor.state_dict()["memory"]["history"]
            assert len(histories) == 2
            continue
        if rank == size - 1:
            del context, waiting
        else:
            with pytest.raises(AgreementError):
                compressor.decompress(reduced[0], waiting[0][1])
        assert compressor.state_dict()["memory"]["history"] == histories


@pytest.mark.few
@pytest.mark.parametrize("options", [{"keep": 1 / 16}, LED, EF21], ids=str)
def test_an_optimizer(rank, size, several, options):
    model = mlp()
    compressor = GlobalQSGD(**options, min_numel=512, named_parameters=model.named_parameters())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(),
        compression=compressor,
    )  # fmt: skip
    inputs, labels = batch(rank)

    def loss() -> float:
        return nn.functional.cross_entropy(model(inputs), labels).item()

    before = loss()
    for _ in range(60):
        optimizer.zero_grad()
        backward(model, rank)
        optimizer.step()
    assert loss() < 0.8 * before
    assert_same_on_all_ranks(nn.utils.parameters_to_vector(model.parameters()))
