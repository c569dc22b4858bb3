"""FSDP2 with a reduce-scatter of codes."""

from __future__ import annotations

import functools
import os

import horovod.torch as hvd
import pytest
import torch
import torch.distributed as dist
from bias import T_LIMIT, TRIALS, rounded, worst_bias
from helpers import assert_same_on_all_ranks, backward, bound, gradients, mlp
from hooked import Given
from sharded import gradient, mesh, shard, step
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from hvd_gqsgd import BlockBits, GlobalQSGD, simulate
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.layout import words_for
from hvd_gqsgd.options import Options
from hvd_gqsgd.transports.simulated import SimulatedWorld

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)


OPTIONS = [
    {}, {"bits": 4}, {"bits": 11, "correlated": False}, {"bits": 16, "norm": "l2"},
    {"dither": "exponential"}, {"dither": "exponential", "bits": 4, "block_size": 100},
    {"bits": BlockBits(4)}, {"block_size": None},
]  # fmt: skip


@pytest.mark.parametrize("numel", [1, 1023, 60_001])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bits_of_simulate(rank, size, options, numel):
    model = shard(Given(numel), GlobalQSGD(min_numel=0, **options))
    for number in range(2):
        everyone = gradients(size, numel, seed=number)
        expected = simulate(everyone, step=number, exchange="one_phase", **options)
        assert torch.equal(step(model, everyone[rank]), expected)


@pytest.mark.core
@pytest.mark.parametrize(
    "options", [{}, {"dither": "exponential"}, {"bits": BlockBits(3)}], ids=str
)
def test_the_bits_of_simulate_on_many_ranks(rank, size, options):
    everyone = gradients(size, 20_001)
    model = shard(Given(20_001), GlobalQSGD(min_numel=0, **options))
    expected = simulate(everyone, exchange="one_phase", **options)
    assert torch.equal(step(model, everyone[rank]), expected)


@pytest.mark.few
@pytest.mark.parametrize("options", [{"norm": "l2"}, {"bits": BlockBits(4)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(rank, size, dtype, options):
    """FSDP divides float16 and float64 itself, before the sum and after it."""
    everyone = gradients(size, 3000, dtype=dtype)
    model = shard(Given(3000, dtype), GlobalQSGD(min_numel=0, **options))
    mean = step(model, everyone[rank])
    expected = simulate(everyone, exchange="one_phase", **options)
    if dtype == torch.bfloat16:
        assert torch.equal(mean, expected)
    else:
        assert torch.allclose(mean, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.few
def test_gradients_in_bfloat16(rank, size):
    """Of parameters in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    everyone = gradients(size, 5000, dtype=torch.bfloat16)
    model = shard(Given(5000), GlobalQSGD(min_numel=0), mp_policy=policy)
    mean = step(model, everyone[rank])
    assert mean.dtype == torch.float32
    assert torch.equal(mean, simulate(everyone, exchange="one_phase").float())


def pipelines(size, number, **options):
    world, resolved = SimulatedWorld(size), Options(exchange="one_phase", min_numel=0, **options)
    return [
        Pipeline(resolved, world.transport(rank), steps=Steps(resolved.bits, number))
        for rank in range(size)
    ]


def values(x):
    return x[x != 0].sort().values


class Recorder:
    """PyTorch's reduce-scatter, and what it was given."""

    def __init__(self):
        self.inputs = []

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.inputs.append(input_tensor.clone())
        dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group)


def layers(reshard):
    """A model of two modules that are sharded for themselves, and the rest."""
    model = mlp(width=96)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh(), reshard_after_forward=reshard)
    return shard(model, reshard_after_forward=reshard)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("reshard", [True, False])
def test_modules_share_a_step(rank, size, reshard):
    """To the bit, what the pipelines make of the same tensors in the same order."""
    compressor = GlobalQSGD(min_numel=0, bits=5)
    stock, ours = layers(reshard), compressor.fsdp(layers(reshard))
    for number in range(2):
        recorder = Recorder()
        for module in stock.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(recorder)
        for model in (stock, ours):
            model.zero_grad()
            backward(model, rank, number)
        simulated, shards = pipelines(size, number, bits=5), []
        assert len(recorder.inputs) == 3
        for mine in recorder.inputs:
            rows = hvd.allgather(mine.unsqueeze(0))
            outs = [mine.new_empty(len(mine) // size) for _ in range(size)]
            tickets = []
            for pipeline, row, out in zip(simulated, rows, outs, strict=True):
                if not shards:
                    pipeline.begin_step()
                tickets.append(pipeline.submit(row, out=out))
            for pipeline in simulated:
                pipeline.flush()
            for _ in range(3):
                for pipeline, ticket in zip(simulated, tickets, strict=True):
                    pipeline.poll(ticket)
            for pipeline, ticket in zip(simulated, tickets, strict=True):
                pipeline.decode(ticket, 1 / size)
            shards.append(outs[rank])
        # FSDP cuts the padding off, which is zeros, and lists parameters in another order.
        found = torch.cat([p.grad.to_local().reshape(-1) for p in ours.parameters()])
        assert torch.equal(values(found), values(torch.cat(shards)))
    assert compressor.state_dict()["step"] == compressor.stats().steps == 2
    assert compressor.stats().tensors == 6


BLOCK, SHARD = 256, 1024


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("correlated", [True, False])
def test_unbiased_and_within_its_bounds(rank, size, correlated):
    """Each of the two comparisons alarms falsely in less than 1e-7 of all seeds.

    The negative control: the same exchange of gradients that were rounded to the levels.
    """
    everyone = gradients(size, SHARD * size, seed=5)
    level = bound(everyone, 127, BLOCK)
    mean = everyone.double().mean(0)
    found = []
    for rows in (everyone, rounded(everyone, level)):
        options = {"block_size": BLOCK, "correlated": correlated, "min_numel": 0}
        model = shard(Given(SHARD * size), GlobalQSGD(**options))
        results = torch.stack([step(model, rows[rank]) for _ in range(TRIALS)]).double()
        errors = (results - mean) / level
        if rows is everyone:
            assert (errors.abs() <= 1).all()
            # One rank's rounding has a variance of at most 1/4 of a level squared.
            assert errors.square().mean() <= 1 / (4 * size)
        found.append(worst_bias(errors, everyone, level))
    assert found[0] < T_LIMIT < 10 * T_LIMIT < found[1]


@pytest.mark.few
def test_accumulation(rank, size):
    """Nothing is exchanged without gradient sync, and then the sum is."""
    model = shard(Given(5000), GlobalQSGD(min_numel=0))
    first, second = gradients(size, 5000, seed=1), gradients(size, 5000, seed=2)
    model.set_requires_gradient_sync(False)
    model(first[rank]).backward()
    model.set_requires_gradient_sync(True)
    model(second[rank]).backward()
    assert torch.equal(gradient(model), simulate(first + second, exchange="one_phase"))


@pytest.mark.few
@pytest.mark.parametrize("factor", [None, 6.0, 0.7])
@pytest.mark.parametrize("force_sum", [False, True])
def test_divide_factors(rank, size, factor, force_sum):
    """As a mean, as a sum that FSDP divides, and as a sum of products."""
    model = shard(Given(5000), GlobalQSGD(min_numel=0))
    model.set_force_sum_reduction_for_comms(force_sum)
    if factor is not None:
        model.set_gradient_divide_factor(factor)
    everyone = gradients(size, 5000)
    expected = simulate(everyone, exchange="one_phase") * (size / (factor or size))
    assert torch.allclose(step(model, everyone[rank]), expected, rtol=1e-6)


def test_several_models(rank, size):
    """One compressor, in one backward pass, in the order of autograd, and then in one each."""
    compressor = GlobalQSGD(min_numel=0)
    models = [shard(Given(5000), compressor) for _ in range(2)]
    everyone = [gradients(size, 5000, seed=seed) for seed in range(2)]
    sum(model(rows[rank]) for model, rows in zip(models, everyone, strict=True)).backward()
    together = [gradient(model) for model in models]
    expected = [
        [simulate(rows, step=number, exchange="one_phase") for number in (0, 1)]
        for rows in everyone
    ]
    assert any(
        all(torch.equal(e[n], mean) for e, n, mean in zip(expected, order, together, strict=True))
        for order in ((0, 1), (1, 0))
    )
    for number, model, rows in zip((2, 3), models, everyone, strict=True):
        mean = step(model, rows[rank])
        assert torch.equal(mean, simulate(rows, step=number, exchange="one_phase"))


def checkpointed(model, reentrant, inputs):
    return checkpoint(model, inputs.requires_grad_(), use_reentrant=reentrant)


@pytest.mark.few
@pytest.mark.parametrize("kind", ["stock", "bfloat16", "checkpoint", "reentrant", "compiled"])
def test_training(rank, size, kind):
    """Close to FSDP's own, with rounded weights too."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if kind == "bfloat16" else None)
    models = []
    for compressor, weights in ((GlobalQSGD(min_numel=100), {}), (None, {}),
                                (GlobalQSGD(min_numel=100), {"weight_bits": 8})):  # fmt: skip
        model = mlp(width=200)
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh(), mp_policy=policy)
        shard(model, mp_policy=policy)
        models.append(model if compressor is None else compressor.fsdp(model, **weights))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    calls = list(models)
    if kind in ("checkpoint", "reentrant"):
        calls = [functools.partial(checkpointed, model, kind == "reentrant") for model in models]
    elif kind == "compiled":
        calls = [torch.compile(model, backend="eager") for model in models]
    for number in range(3):
        for call, optimizer in zip(calls, optimizers, strict=True):
            optimizer.zero_grad()
            backward(call, rank, number)
            optimizer.step()
        ours, exact, both = map(gradient, models)
        for mean in (ours, both):
            assert_same_on_all_ranks(mean)
            assert (mean - exact).norm() < 0.1 * exact.norm()
    torch.compiler.reset()


@pytest.mark.few
def test_meta_device(rank, size):
    """Sharded before its parameters have memory."""
    with torch.device("meta"):
        model = Given(5000)
    shard(model, GlobalQSGD(min_numel=0))
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    everyone = gradients(size, 5000)
    assert torch.equal(step(model, everyone[rank]), simulate(everyone, exchange="one_phase"))


@pytest.mark.few
def test_resumed(rank, size):
    """A compressor that takes over another's state goes on where that was."""
    everyone = gradients(size, 5000)
    before, after = GlobalQSGD(min_numel=0), GlobalQSGD(min_numel=0)
    model = shard(Given(5000), before)
    for _ in range(3):
        step(model, everyone[rank])
    after.load_state_dict(before.state_dict())
    resumed = step(shard(Given(5000), after), everyone[rank])
    assert torch.equal(resumed, simulate(everyone, step=3, exchange="one_phase"))


@pytest.mark.few
def test_statistics(rank, size):
    compressor = GlobalQSGD()
    step(shard(Given(100_002), compressor), torch.ones(100_002))
    stats = compressor.stats()
    assert (stats.tensors, stats.tensors_bypassed) == (1, 0)
    assert stats.compressed_bytes_before == 4 * 100_002
    # The header and the norms by Allreduce, which counts twice; codes, and a flag to each rank.
    length = 100_002 // size
    norms, words = size * -(-length // 1024), size * (1 + words_for(length, 1024, 8))
    assert stats.compressed_bytes_on_wire == 2 * (128 + 4 * norms) + 4 * words
    assert 3.8 < stats.ratio < 4
    assert 8 < stats.mean_bits < 8.4


@pytest.mark.few
def test_small_modules_go_as_they_are(rank, size):
    compressor = GlobalQSGD()
    mean = step(shard(Given(960), compressor), torch.full((960,), float(rank)))
    assert torch.allclose(mean, torch.full((960,), (size - 1) / 2))
    stats = compressor.stats()
    assert (stats.tensors, stats.tensors_bypassed, stats.bypassed_bytes) == (1, 1, 4 * 960)
