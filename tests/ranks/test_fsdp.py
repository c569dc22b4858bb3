"""FSDP2 with a reduce-scatter of codes."""

from __future__ import annotations

import functools
import os

import horovod.torch as hvd
import pytest
import torch
import torch.distributed as dist
from conftest import process_group
from helpers import assert_same_on_all_ranks, backward, bound, gradients, mlp
from hooked import Given
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.utils.checkpoint import checkpoint

from hvd_gqsgd import AgreementError, BlockBits, DynamicBits, GlobalQSGD, simulate
from hvd_gqsgd._native import ops
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.options import Options
from hvd_gqsgd.transports.simulated import SimulatedWorld

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)


@functools.cache
def mesh(*shape, names=None):
    process_group()
    return init_device_mesh("cpu", shape or (hvd.size(),), mesh_dim_names=names)


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


TRIALS, BLOCK, SHARD = 30, 256, 1024
T_LIMIT = 8.0  # Student's t with 29 degrees of freedom is beyond with a probability of 8e-9


def worst_bias(errors, everyone, level):
    """Largest |t| of the mean error along directions in which quantizers are biased: upwards, away
    from zero, and as round-to-nearest errs; errors are in units of a level."""
    mean = everyone.double().mean(0)
    nearest = rounded(everyone, level).double().mean(0) - mean
    directions = torch.stack([torch.ones_like(mean), mean.sign(), nearest / level])
    along = errors @ directions.t()
    return (along.mean(0).abs() / (along.std(0) / len(along) ** 0.5)).max().item()


def rounded(everyone, level):
    return ((everyone.double() / level).round() * level).float()


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
        errors += 1e-9 * torch.randn(errors.shape, generator=torch.Generator().manual_seed(0))
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
    """Close to FSDP's own."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if kind == "bfloat16" else None)
    models = []
    for compressor in (GlobalQSGD(min_numel=100), None):
        model = mlp(width=200)
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh(), mp_policy=policy)
        models.append(shard(model, compressor, mp_policy=policy))
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
        ours, exact = map(gradient, models)
        assert_same_on_all_ranks(ours)
        assert (ours - exact).norm() < 0.1 * exact.norm()
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
    assert 3.8 < stats.ratio < 4
    assert 8 < stats.mean_bits < 8.4


@pytest.mark.few
def test_small_modules_go_as_they_are(rank, size):
    compressor = GlobalQSGD()
    mean = step(shard(Given(960), compressor), torch.full((960,), float(rank)))
    assert torch.allclose(mean, torch.full((960,), (size - 1) / 2))
    stats = compressor.stats()
    assert (stats.tensors, stats.tensors_bypassed, stats.bypassed_bytes) == (1, 1, 4 * 960)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("other", [{"seed": 1}, {"bits": 4}, {"norm": "l2"}], ids=str)
def test_ranks_that_disagree(rank, size, other):
    model = shard(Given(5000))
    compressor = GlobalQSGD(**(other if rank == size - 1 else {}))
    with pytest.raises(AgreementError, match=f"ranks use different options: {next(iter(other))};"):
        compressor.fsdp(model)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize(("options", "kind", "message"), [
    ({"exchange": "two_phase"}, TypeError, r"GlobalQSGD\.fsdp\(\) takes no option 'exchange'"),
    ({"bucket_mb": 5}, TypeError, "no option 'bucket_mb': FSDP reduces a module at a time"),
    ({"bits": DynamicBits(8)}, ValueError, r"bits must be an int or BlockBits\(\.\.\.\)"),
], ids=str)  # fmt: skip
def test_an_error_of_one_rank_is_one_on_all(rank, size, options, kind, message):
    model = shard(Given(5000))
    if rank == 0:
        with pytest.raises(kind, match=message):
            GlobalQSGD(**options).fsdp(model)
    else:
        with pytest.raises(AgreementError, match="could not take part"):
            GlobalQSGD().fsdp(model)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("stage", ["block_max_each", "quantize_each", "sum_codes"])
def test_an_error_between_two_messages(rank, size, stage, monkeypatch):
    """As of memory that runs out, on the last rank alone. After the last message it is that rank's
    alone, and the others have a right shard."""

    def fails(*arguments):
        raise MemoryError("on purpose")

    everyone = gradients(size, 5000)
    model = shard(Given(5000), GlobalQSGD(min_numel=0))
    if rank == size - 1:
        monkeypatch.setattr(ops, stage, fails)
    if rank == size - 1 or stage != "sum_codes":
        with pytest.raises(MemoryError if rank == size - 1 else AgreementError):
            model(everyone[rank]).backward()
    else:
        model(everyone[rank]).backward()
    monkeypatch.undo()
    model = shard(Given(5000), GlobalQSGD(min_numel=0))
    assert torch.equal(step(model, everyone[rank]), simulate(everyone, exchange="one_phase"))


@pytest.mark.usefixtures("several")
def test_modules_in_another_order(rank, size):
    """An error on all ranks, where PyTorch would end the program or wait."""
    models = [shard(Given(numel), GlobalQSGD(min_numel=0)) for numel in (4000, 5000)]
    losses = [model(torch.ones(model.weight.numel())) for model in models]
    with pytest.raises(AgreementError, match="handed in different tensors, or in another order"):
        losses[rank == 0].backward()


def test_a_pytorch_without_the_seam(rank, size, monkeypatch):
    model = shard(Given(50))
    monkeypatch.delattr(FSDPModule, "set_custom_reduce_scatter")
    with pytest.raises(NotImplementedError, match=r"needs PyTorch 2\.9 or newer"):
        GlobalQSGD().fsdp(model)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), None], ids=str)
def test_what_is_no_model_of_fsdp(rank, size, model):
    with pytest.raises(TypeError, match=r"takes a model of .*: call fully_shard\(model\) before"):
        GlobalQSGD().fsdp(model)


# --- HSDP ----------------------------------------------------------------------------------------


def grid(size):
    """Ranks by which half holds them, and by their shard."""
    if size % 2:
        pytest.skip("needs an even number of ranks")
    return mesh(2, size // 2, names=("replicate", "shard"))


@pytest.mark.core
@pytest.mark.parametrize("options", [{}, {"exchange": "two_phase", "bits": 4}], ids=str)
def test_replicas(rank, size, options):
    """PyTorch's mean within each half, which is exact here, and ours of the two halves."""
    both = grid(size)
    model = shard(Given(6000), mesh=both["shard"])
    group = both["replicate"].get_group()
    compressor = GlobalQSGD(min_numel=0, **options)
    assert compressor.fsdp(model, replicate_group=group) is model
    everyone = (16 * gradients(size, 6000)).round()
    model(everyone[rank]).backward()
    found = model.weight.grad.to_local()
    halves = everyone.view(2, size // 2, 6000).mean(1)
    shards = halves.view(2, size // 2, -1)[:, rank % (size // 2)]
    assert torch.equal(found, simulate(shards, **options))
    assert compressor.stats().tensors == 1


def test_a_mesh_that_replicates(rank, size):
    model = shard(Given(6000), mesh=grid(size))
    with pytest.raises(ValueError, match=r"HSDP.*replicate_group=mesh\['replicate'\]\.get_group"):
        GlobalQSGD().fsdp(model)
