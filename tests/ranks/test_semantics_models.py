"""Models and other things beside ``hvd.DistributedOptimizer``: see ``semantics.py``."""

from __future__ import annotations

import copy
import itertools

import horovod.torch as hvd
import pytest
import torch
from semantics import MARKS, Model, Ways, check, grads, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvd_gqsgd import GlobalQSGD

pytestmark = MARKS
way = Ways()  # filled below


@pytest.mark.parametrize(("program", "refuses"), way)
def test_as_plain_horovod(rank, size, program, refuses):
    check(program, refuses, rank, size)


def fill(run, model, magnitude):
    """The same random numbers on all ranks."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(run.random(*parameter.shape, same=True) * magnitude)


# Which parameters


@way()
def freezing_and_unfreezing(run):
    model = Model()
    optimizer = run.optimizer(model)
    for step in range(4):
        model.wide.requires_grad_(step % 2 == 0)
        optimizer.zero_grad()
        run.backward(model, step)
        optimizer.step()
    run.magnitude = 4
    return weights(model)


@way()
def a_frozen_parameter_with_an_old_gradient(run):
    model = Model()
    optimizer = run.optimizer(model)
    run.backward(model)
    optimizer.step()
    model.wide.requires_grad_(False)
    model.bias.grad = model.long.grad = None
    run.backward(model, step=1)
    optimizer.step()
    run.magnitude = 4
    return weights(model)


@way()
def unfrozen_after_the_optimizer_was_made(run):
    """Horovod knows nothing of it, and leaves each rank its own gradient."""
    model = Model()
    model.wide.requires_grad_(False)
    optimizer = run.optimizer(model)
    model.wide.requires_grad_(True)
    run.backward(model)
    optimizer.step()
    run.replicated = False
    return grads(model)


@way()
def a_parameter_group_added_later(run):
    model, later = Model(), Model()
    optimizer = run.optimizer(model)
    optimizer.add_param_group({"params": list(later.parameters())})
    run.backward([*model.parameters(), *later.parameters()])
    optimizer.step()
    run.replicated = False
    return [*grads(model), *grads(later)]


@way()
def used_on_one_rank_only(run):
    """In turns; on the others Horovod sends zeros, and the last one has no gradient at all."""
    model = Model()
    optimizer = run.optimizer(model)
    for step in range(3):
        optimizer.zero_grad()
        if run.rank == step % run.size:
            run.backward(model, step)
        optimizer.step()
    run.magnitude = 3
    return weights(model)


@way()
def tied_weights(run):
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    model[1].weight = model[0].weight
    fill(run, model, 1 / 40)
    optimizer = run.optimizer(model)
    model(run.random(4, 40)).mean().backward()
    optimizer.step()
    return grads(model)


@way()
def tied_weights_named_twice(run):
    model = Model()
    model.also_wide = model.wide
    named = [(run.name(n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    optimizer = run.optimizer(model, named_parameters=named)
    run.backward(model)
    optimizer.step()
    return grads(model)


@way(reentrant=True)
@way(reentrant=False)
def checkpointed_activations(run, reentrant):
    model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40))
    fill(run, model, 1 / 40)
    optimizer = run.optimizer(model)
    x = run.random(4, 40).requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).mean().backward()
    optimizer.step()
    return grads(model)


@way(shapes=[(0,), (300,)])
@way(shapes=[(), (300,), (1,)])
@way(shapes=[(20, 30)])
@way(shapes=[(3,)])
def shapes_of_parameters(run, shapes):
    model = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
    compression = run.compression(named_parameters=run.named(model), min_numel=0)
    optimizer = run.optimizer(model, compression=compression)
    run.backward(model)
    optimizer.step()
    return grads(model)


@way(dtype=torch.float16)
@way(dtype=torch.float64)
def types_of_parameters(run, dtype):
    model = Model(dtype)
    model.extra = nn.Parameter(torch.zeros(500))
    optimizer = run.optimizer(model)
    run.backward(model)
    optimizer.step()
    return grads(model)


@way(as_dense=True, op=hvd.Sum)
@way(as_dense=False, op=hvd.Sum)
@way(as_dense=True, backward_passes_per_step=2)
@way(as_dense=False, backward_passes_per_step=2)
@way(as_dense=True, groups=1)
@way(as_dense=False, groups=1)
def sparse_embeddings(run, as_dense, **options):
    model = nn.Sequential(nn.Embedding(40, 30, sparse=True), nn.Linear(30, 30))
    fill(run, model, 1 / 30)
    optimizer = run.optimizer(model, sparse_as_dense=as_dense, **options)
    run.magnitude = 2 * run.size
    for step in range(options.get("backward_passes_per_step", 1)):
        model(torch.tensor([1, 1, 5 + run.rank, step])).mean(0).sum().backward()
    optimizer.step()
    return grads(model)


# Several optimizers


@way(shared=True)
@way(shared=False)
def optimizers_for_parts_of_a_model(run, shared):
    parts = [Model(), Model()]
    compression = run.compression()
    optimizers = [
        run.optimizer(
            part,
            named_parameters=[(run.name(f"{i}.{n}"), p) for n, p in part.named_parameters()],
            compression=compression if shared else run.compression(),
        )
        for i, part in enumerate(parts)
    ]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        run.backward(itertools.chain(*(part.parameters() for part in parts)), step)
        for optimizer in optimizers[:: 1 if step % 2 else -1]:
            optimizer.step()
    run.magnitude = 3
    return [*weights(parts[0]), *weights(parts[1])]


@way(frozen=True)
@way(frozen=False)
def adversaries(run, frozen):
    """What one's loss leaves in the other's gradients is in flight, if that was not frozen."""
    generator, discriminator = Model(), Model()
    optimizers = {}
    for name, model in (("g", generator), ("d", discriminator)):
        named = [(run.name(f"{name}.{n}"), p) for n, p in model.named_parameters()]
        optimizers[model] = run.optimizer(model, named_parameters=named)
    for step in range(2):
        for model, other in ((generator, discriminator), (discriminator, generator)):
            if frozen:
                other.requires_grad_(False)
            optimizers[model].zero_grad()
            (run.loss(model, step) + (run.loss(other) if not frozen else 0)).backward()
            optimizers[model].step()
            other.requires_grad_(True)
    run.magnitude = 2
    return [*weights(generator), *weights(discriminator)]


# What is beside it


@way()
def parameter_groups_and_a_scheduler(run):
    model = Model()
    sgd = torch.optim.SGD(
        [{"params": [model.wide], "lr": 1.0}, {"params": [model.bias, model.long], "lr": 0.5}],
        momentum=0.5, weight_decay=0.1,
    )  # fmt: skip
    optimizer = run.optimizer(model, sgd)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step in range(3):
        optimizer.zero_grad()
        run.backward(model, step)
        optimizer.step()
        scheduler.step()
    run.magnitude = 4  # 1 + (0.5 + 0.5) + (0.25 + 0.25 + 0.25) at most, and some for the decay
    return weights(model)


@way()
def communication_in_the_model(run):
    """As in a synchronized batch norm: Horovod's own operations in the middle of backward()."""
    model = Model()
    optimizer = run.optimizer(model)
    for step in range(2):
        optimizer.zero_grad()
        mean = hvd.allreduce(model.long[:20].mean().view(1), name=run.name(f"mean {step}"))
        (run.loss([model.wide, model.long], step) + mean.sum() + model.bias.sum()).backward()
        optimizer.step()
    run.magnitude = 2
    return weights(model)


@way()
def sync_batch_norm(run):
    """Horovod's, which is for GPUs only."""
    model = nn.Sequential(nn.Linear(20, 20), hvd.SyncBatchNorm(20))
    optimizer = run.optimizer(model)
    model(torch.rand(5, 20)).sum().backward()
    optimizer.step()
    return grads(model)


@way()
def a_gradient_scaler(run):
    model = Model()
    optimizer = run.optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(run.loss(model, step)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    run.magnitude = 2
    return weights(model)


@way()
def state_is_broadcast(run):
    """Momentum and parameters of rank 0 reach all, before the first step and after it."""
    model = Model()
    with torch.no_grad():
        model.wide.fill_(run.rank)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0 + run.rank, momentum=0.5)
    optimizer = run.optimizer(model, sgd)
    for step in range(2):
        hvd.broadcast_parameters(dict(run.named(model)), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        optimizer.zero_grad()
        run.backward(model, step)
        optimizer.step()
    run.magnitude = 3
    return [*weights(model), *(s["momentum_buffer"] for s in optimizer.state.values())]


@way(in_flight=True)
@way(in_flight=False)
def state_is_saved_and_loaded(run, in_flight):
    """Into the same optimizer, after a backward pass too, and into a new one."""
    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    optimizer = run.optimizer(model, sgd)
    run.backward(model)
    optimizer.step()
    state = optimizer.state_dict()
    if in_flight:
        run.backward(model, step=1)
        hvd.barrier()
    else:  # of a new model: the hooks of the old one's optimizer live until that is collected
        model = copy.deepcopy(model)
        optimizer = run.optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.load_state_dict(state)
    optimizer.zero_grad()
    run.backward(model, step=2)
    optimizer.step()
    run.magnitude = 3
    return weights(model)


@pytest.mark.parametrize("parameters", [
    [torch.zeros(50, 60).t()],
    [torch.zeros(9, 8, 7, 6).to(memory_format=torch.channels_last)],
    [torch.zeros(3000, dtype=torch.bfloat16), torch.zeros(10, dtype=torch.bfloat16)],
], ids=["transposed", "channels_last", "bfloat16"])  # fmt: skip
def test_what_plain_horovod_cannot_do(rank, several, parameters):
    """It is an error there. Here even small ones are compressed; equal magnitudes are exact."""

    def run(compression):
        model = nn.ParameterList(nn.Parameter(p) for p in parameters)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), compression=compression
        )
        torch.stack([p.sum().float() for p in model]).sum().backward()
        optimizer.step()
        return grads(model)

    with pytest.raises(ValueError, match=r"contiguous|not supported"):
        run(hvd.Compression.none)
    for grad in run(GlobalQSGD):
        assert torch.equal(grad, torch.ones_like(grad))
