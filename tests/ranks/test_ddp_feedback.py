"""Error feedback under DistributedDataParallel has the bits of simulated ranks."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from conftest import process_group
from helpers import assert_same_on_all_ranks, gradients
from hooked import Given, wrap
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

from hvd_gqsgd import DDPState, GlobalQSGD, ddp_hook
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import SimulatedRanks

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)

RESIDUAL: dict[str, Any] = {"keep": 1 / 16, "error_feedback": "residual"}
EF21: dict[str, Any] = {"keep": 1 / 8, "error_feedback": "ef21"}
LED: dict[str, Any] = {"keep": 1 / 16, "select": "leader", "exchange": "two_phase"}
MIN_NUMEL = 1000
SHAPES: dict[str, tuple[int, ...]] = {
    "first": (300, 70), "norm": (70,), "image": (8, 16, 5, 5), "mask": (999,), "last": (5, 2003),
}  # fmt: skip


class Several(nn.Module):
    """Parameters whose gradients are what the model is given; used from the last to the first, so
    that DDP makes other buckets after the first step."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))
        self.image.data = self.image.data.to(memory_format=torch.channels_last)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        named = dict(self.named_parameters())
        return sum((named[name] * gradients[name]).sum() for name in reversed(gradients))


class Sum(nn.Module):
    """The sum of all elements of parameters."""

    def __init__(self, parameters: nn.ParameterList) -> None:
        super().__init__()
        self.parts = parameters

    def forward(self) -> Tensor:
        return sum(part.sum() for part in self.parts)


def gradients_of(step: int, rank: int) -> dict[str, Tensor]:
    """The gradients of a rank; the same for every caller."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def means(world: SimulatedRanks, everyone: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of a step, those that are compressed."""
    large = [name for name, x in everyone[0].items() if x.numel() >= MIN_NUMEL]
    found = world.means([[(name, own[name]) for name in large] for own in everyone])
    return dict(zip(large, found, strict=True))


@pytest.fixture
def states() -> Iterator[list[DDPState]]:
    """Gives back the connections of those that a test puts in."""
    made: list[DDPState] = []
    yield made
    for state in made:
        state.close()


def new_state(states: list[DDPState], named: Any, **options: Any) -> DDPState:
    options = {"min_numel": MIN_NUMEL} | options
    states.append(DDPState(process_group(), named_parameters=named, **options))
    return states[-1]


def backward(wrapped: nn.Module, model: nn.Module, step: int, rank: int) -> dict[str, Tensor]:
    model.zero_grad()
    wrapped(gradients_of(step, rank)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_on_all_ranks(torch.cat([x.reshape(-1) for x in found.values()]))
    return found


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        pytest.param(RESIDUAL, {}, marks=pytest.mark.few),
        pytest.param(EF21, {"gradient_as_bucket_view": True}, marks=pytest.mark.core),
        pytest.param(LED, {"static_graph": True}, marks=pytest.mark.core),
        pytest.param(
            EF21 | {"error_feedback": "econtrol", "select": "leader"},
            {"find_unused_parameters": True},
            marks=pytest.mark.few,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_bits_of_simulated_ranks(states, rank, size, options, arguments):
    """In small buckets, which DDP makes anew, with a step that is skipped for infinity, and a state
    that is saved and loaded for another model."""
    world = SimulatedRanks(size, Options(**options))
    saved: dict[str, Any] = {}
    for step in range(6):
        if step in (0, 4):
            model = Several()
            state = new_state(states, model.named_parameters(), **options)
            wrapped = wrap(model, state, bucket_cap_mb=0.05, **arguments)
        if step == 4:
            state.load_state_dict(saved)
        everyone = [gradients_of(step, r) for r in range(size)]
        if step == 2:
            everyone[-1]["first"][7, 3] = torch.inf
        model.zero_grad()
        wrapped(everyone[rank]).backward()
        expected = means(world, everyone)
        for name, parameter in model.named_parameters():
            if name in expected:
                found, exact = (x.nan_to_num(9.0) for x in (parameter.grad, expected[name]))
                assert torch.equal(found, exact), (step, name)
            else:
                mean = torch.stack([own[name] for own in everyone]).mean(0)
                assert torch.allclose(parameter.grad, mean, atol=1e-6)
        saved = state.state_dict()
    stats = state.stats()
    assert (stats.steps, stats.tensors, stats.tensors_small) == (2, 10, 4)


@pytest.mark.few
def test_a_state_of_horovod_goes_on(states, rank, size, several):
    """The compressor's memory is the same under both."""
    model, world = Several(), SimulatedRanks(size, Options(**EF21))
    compressor = GlobalQSGD(**EF21, min_numel=MIN_NUMEL, named_parameters=model.named_parameters())
    for step in range(4):
        everyone = [gradients_of(step, r) for r in range(size)]
        expected = means(world, everyone)
        if step == 2:
            states.append(compressor.ddp_state(process_group()))
            wrapped = wrap(model, states[-1])
        if step >= 2:
            found = backward(wrapped, model, step, rank)
        else:
            found, waiting = {}, {}
            for name, parameter in model.named_parameters():
                parameter.grad = everyone[rank][name].clone()
                if name == "image":
                    parameter.grad = parameter.grad.to(memory_format=torch.channels_last)
                sent, context = compressor.compress(parameter.grad)
                waiting[name] = hvd.allreduce_async(sent, name=name), context
            for name, (handle, context) in waiting.items():
                found[name] = compressor.decompress(hvd.synchronize(handle), context)
        assert all(torch.equal(found[name], mean) for name, mean in expected.items())


@pytest.mark.few
@pytest.mark.parametrize(
    ("where", "cap"), [("all ranks", 0.05), ("one rank", 0.05), ("one rank", 1)]
)
def test_a_parameter_without_a_name(states, rank, size, several, monkeypatch, where, cap):
    """An error on all ranks, and none waits; in the next step too. Also in a bucket of DDP that is
    larger than one of Horovod would be."""
    if cap == 1:
        monkeypatch.setattr(Options, "bucket_bytes", 4096)
    model = Several()
    lacks = rank == 0 or where == "all ranks"
    named = [(name, p) for name, p in model.named_parameters() if name != "image" or not lacks]
    wrapped = wrap(model, new_state(states, named, **RESIDUAL), bucket_cap_mb=cap)
    own = r"takes the parameters of named_parameters alone, got .* shape \[8, 16, 5, 5\]"
    for step in range(2):
        with pytest.raises(RuntimeError, match=own if lacks else "could not take part"):
            wrapped(gradients_of(step, rank)).backward()
    named = model.named_parameters()
    backward(wrap(model, new_state(states, named, **RESIDUAL)), model, 2, rank)


@pytest.mark.few
def test_a_copy_of_the_model_goes_on(states, rank, size, several):
    """With the memory, and the names of its own parameters."""
    model = Several()
    wrapped = wrap(model, new_state(states, model.named_parameters(), **EF21))
    for step in range(2):
        backward(wrapped, model, step, rank)
    copied = copy.deepcopy(wrapped)
    (_, state), *_ = copied._comm_hooks
    states.append(state)
    copied.register_comm_hook(state, ddp_hook)  # PyTorch copies hooks, and does not call them
    for step in range(2, 4):
        found = backward(copied, copied.module, step, rank)
        expected = backward(wrapped, model, step, rank)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@pytest.mark.few
def test_many_small_gradients_beside_a_large_one(states, rank, size, caplog):
    """No warning that nothing was compressed."""
    model = nn.ParameterList([torch.ones(5000), *(torch.ones(3) for _ in range(120))])
    state = new_state(states, model.named_parameters(), **RESIDUAL)
    wrapped = wrap(Sum(model), state)
    wrapped().backward()
    assert "compressed none" not in caplog.text
    assert state.stats().tensors_small == 120


@pytest.mark.few
def test_two_models_in_one_backward_pass(states, rank, size, several):
    """With one state, and names of both."""
    models = {"one": Several(), "two": Several()}
    both = nn.ModuleDict(models)
    state = new_state(states, both.named_parameters(), **RESIDUAL)
    wrapped = [wrap(model, state, bucket_cap_mb=0.05) for model in models.values()]
    world = SimulatedRanks(size, Options(**RESIDUAL))
    for step in range(3):
        both.zero_grad()
        everyone = [
            {f"{key}.{name}": x for i, key in enumerate(models)
             for name, x in gradients_of(2 * step + i, r).items()}
            for r in range(size)
        ]  # fmt: skip
        sum(each(gradients_of(2 * step + i, rank)) for i, each in enumerate(wrapped)).backward()
        found = dict(both.named_parameters())
        for name, mean in means(world, everyone).items():
            assert torch.equal(found[name].grad, mean)


@pytest.mark.core
@pytest.mark.parametrize("select", ["random", "permutation"])
def test_two_states_of_one_compressor_in_one_backward_pass(states, rank, size, several, select):
    """Ranks decode the buckets of both models at different moments, and agree."""
    models = [Several(), Several()]
    named = [(f"{i}.{name}", p) for i, m in enumerate(models) for name, p in m.named_parameters()]
    options = {"keep": 1 / 8, "error_feedback": "marina", "full_every": 3, "select": select}
    compressor = GlobalQSGD(**options, min_numel=MIN_NUMEL, named_parameters=named)
    wrapped = []
    for model in models:
        states.append(compressor.ddp_state(process_group()))
        wrapped.append(wrap(model, states[-1], bucket_cap_mb=0.05))
    for step in range(8):
        for _, parameter in named:
            parameter.grad = None
        losses = [each(gradients_of(2 * step + i, rank)) for i, each in enumerate(wrapped)]
        sum(losses).backward()
        found = [p.grad for name, p in named if p.numel() >= MIN_NUMEL]
        assert_same_on_all_ranks(torch.cat([x.reshape(-1) for x in found]))


@pytest.mark.few
def test_compiled_autograd_hands_in_gradients(states, rank, size, several):
    model, world = Given(5000), SimulatedRanks(size, Options(**RESIDUAL))
    state = new_state(states, model.named_parameters(), **RESIDUAL)
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        compiled = torch.compile(wrap(model, state), backend="eager")
        for step in range(2):
            everyone = gradients(size, 5000, seed=step)
            model.zero_grad()
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                compiled(everyone[rank]).backward()
            (mean,) = world.means([[("weight", row.contiguous())] for row in everyone])
            assert torch.equal(model.weight.grad, mean)
    torch.compiler.reset()


class Rare(nn.Module):
    """Parameters whose gradients are sparse, complex, and none but on odd ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 8, sparse=True)
        self.wave = nn.Parameter(torch.ones(2000, dtype=torch.complex64))
        self.odd = nn.Parameter(torch.ones(2000))

    def forward(self, wave: Tensor, rank: int) -> Tensor:
        seen = self.table(torch.tensor([1, 5 + rank])).sum() + (self.wave * wave).real.sum()
        return seen + (self.odd * rank).sum() if rank % 2 else seen


@pytest.mark.few
def test_sparse_complex_and_unused_gradients(states, rank, size, several):
    model = Rare()
    state = new_state(states, model.named_parameters(), **EF21)
    wrapped = wrap(model, state, find_unused_parameters=True)
    everyone = gradients(size, 4000).view(size, 2000, 2)
    wrapped(torch.view_as_complex(everyone[rank]), rank).backward()
    odd, wave = SimulatedRanks(size, Options(**EF21)).means([
        [("odd", torch.full((2000,), float(r if r % 2 else 0))),
         ("wave", torch.view_as_real(torch.view_as_complex(row).conj().resolve_conj()).view(-1))]
        for r, row in enumerate(everyone)
    ])  # fmt: skip
    assert torch.equal(model.odd.grad, odd)
    assert torch.equal(torch.view_as_real(model.wave.grad).view(-1), wave)
    assert (model.table.weight.grad.to_dense()[1] == 1).all()
    stats = state.stats()
    assert (stats.tensors, stats.tensors_bypassed, stats.tensors_sparse) == (3, 1, 1)


@pytest.mark.few
def test_a_buffer_without_parameters(states, rank, size):
    state = new_state(states, Several().named_parameters(), **RESIDUAL)
    with pytest.raises(ValueError, match="takes the gradients of parameters"):
        state.average(torch.ones(5000), first=True)


@pytest.mark.few
def test_uneven_inputs(states, rank, size, several):
    """A rank without inputs takes part with gradients of zero, and what it has not sent."""
    model = Several()
    wrapped = wrap(
        model, new_state(states, model.named_parameters(), **RESIDUAL), bucket_cap_mb=0.05
    )
    with Join([wrapped]):
        for step in range(2 + rank):
            model.zero_grad()
            wrapped(gradients_of(step, rank)).backward()
    backward(wrapped, model, 9, rank)
