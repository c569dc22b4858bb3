"""``hvd.DistributedOptimizer(..., compression=...)`` in every way it can be asked to reduce."""

from __future__ import annotations

import copy

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, backward, batch, mlp
from torch import nn

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.codecs.linear import levels_for

SMALL = {"min_numel": 64, "bucket_mb": 0.02}  # several buckets, even from a small model


def gradients_of(model, rank, compression, steps=1, passes=1, **optimizer_options):
    """Reduced gradients of the last of some steps; the model is left as it is."""
    model = copy.deepcopy(model)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        named_parameters=model.named_parameters(),
        compression=compression(model),
        backward_passes_per_step=passes,
        **optimizer_options,
    )
    for step in range(steps):
        optimizer.zero_grad()
        for i in range(passes):
            backward(model, rank, step * passes + i)
        optimizer.step()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(quantized, plain, size):
    """Within two levels of the largest gradient: generous, the bound itself is tested elsewhere."""
    assert quantized.keys() == plain.keys()
    for name, expected in plain.items():
        limit = 2 * size * expected.abs().max() / levels_for(8, size) + 1e-7
        assert (quantized[name] - expected).abs().max() <= limit, name
        assert_same_on_all_ranks(quantized[name])


def plainly(model):
    return hvd.Compression.none


def by_class(model):
    return GlobalQSGD


def by_order(model):
    return GlobalQSGD(**SMALL)


def by_name(model):
    return GlobalQSGD(named_parameters=model.named_parameters(), **SMALL)


WAYS = [
    {},
    {"op": hvd.Sum},
    {"gradient_predivide_factor": 3.0},
    {"groups": 2},
    {"passes": 3},
    {"passes": 2, "groups": 3, "steps": 3},
    {"steps": 3},
]


@pytest.mark.parametrize("compression", [by_order, by_name])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_ways_to_reduce(rank, size, several, compression, way):
    model = mlp()
    quantized = gradients_of(model, rank, compression, **way)
    assert_close(quantized, gradients_of(model, rank, plainly, **way), size)


@pytest.mark.core
def test_the_class_as_compression(rank, size, several):
    model = mlp()
    plain = gradients_of(model, rank, plainly)
    assert_close(gradients_of(model, rank, by_class), plain, size)


def test_groups_of_parameters(rank, size, several):
    model = mlp()

    def run(compression):
        copied = copy.deepcopy(model)
        parameters = list(copied.parameters())
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(copied.parameters(), lr=0.0),
            named_parameters=copied.named_parameters(),
            groups=[parameters[:2], parameters[2:5]],
            compression=compression,
        )
        backward(copied, rank)
        optimizer.step()
        return {name: p.grad for name, p in copied.named_parameters()}

    assert_close(run(GlobalQSGD(**SMALL)), run(hvd.Compression.none), size)


@pytest.mark.core
def test_process_sets(rank, size, process_set):
    model = mlp()

    def compression(model):
        return GlobalQSGD(process_set=process_set, **SMALL)

    quantized = gradients_of(model, rank, compression, process_set=process_set)
    plain = gradients_of(model, rank, plainly, process_set=process_set)
    for name, expected in plain.items():
        assert (quantized[name] - expected).abs().max() <= expected.abs().max()
        everyone = hvd.allgather(quantized[name].unsqueeze(0), process_set=process_set)
        assert (everyone == everyone[0]).all()


class Heads(nn.Module):
    """Has parts that are frozen, never used, or used by some ranks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.unused = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])
        self.sometimes = nn.Linear(64, 64)

    def forward(self, x, use_all):
        x = self.frozen(x)
        return self.body(self.sometimes(x) if use_all else x)


def test_frozen_and_unused_parameters(rank, size, several):
    torch.manual_seed(0)
    model = Heads()

    def run(compression):
        copied = copy.deepcopy(model)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.0),
            named_parameters=[(n, p) for n, p in copied.named_parameters() if p.requires_grad],
            compression=compression(copied),
        )
        for step in range(3):
            optimizer.zero_grad()
            inputs, labels = batch(rank, step)
            output = copied(inputs, use_all=(rank + step) % 2 == 0)
            nn.functional.cross_entropy(output, labels).backward()
            optimizer.step()
        return {n: p.grad for n, p in copied.named_parameters() if p.grad is not None}

    quantized, plain = run(by_name), run(plainly)
    assert_close(quantized, plain, size)
    assert not any(quantized[name].any() for name in quantized if name.startswith("unused"))


@pytest.mark.parametrize("as_dense", [True, False])
def test_sparse_gradients(rank, size, several, as_dense):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 64, sparse=True), nn.Linear(64, 64))

    def run(compression):
        copied = copy.deepcopy(model)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(copied.parameters(), lr=0.0),
            named_parameters=copied.named_parameters(),
            sparse_as_dense=as_dense,
            compression=compression,
        )
        copied(torch.arange(10) + rank).square().sum().backward()
        optimizer.step()
        return {name: p.grad.to_dense() for name, p in copied.named_parameters()}

    assert_close(run(GlobalQSGD(**SMALL)), run(hvd.Compression.none), size)


@pytest.mark.parametrize("shared", [True, False])
def test_two_optimizers_at_once(rank, size, several, shared):
    models = [mlp(seed=1), mlp(seed=2, width=128)]

    def run(compressions):
        copies = [copy.deepcopy(model) for model in models]
        optimizers = [
            hvd.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.0),
                named_parameters=[(f"{i}.{n}", p) for n, p in model.named_parameters()],
                compression=compression,
            )
            for i, (model, compression) in enumerate(zip(copies, compressions, strict=True))
        ]
        for step in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for model in copies:
                backward(model, rank, step)
            for optimizer in reversed(optimizers):
                optimizer.step()
        return {f"{i}.{n}": p.grad for i, m in enumerate(copies) for n, p in m.named_parameters()}

    one = GlobalQSGD(**SMALL)
    quantized = run([one, one] if shared else [one, GlobalQSGD(**SMALL)])
    assert_close(quantized, run([hvd.Compression.none] * 2), size)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_do_not_change_after_the_step(rank, size, several, to_none):
    """Buffers are used again, but not while a parameter's gradient still lies in one."""
    model = mlp()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        named_parameters=model.named_parameters(),
        compression=GlobalQSGD(**SMALL),
    )
    kept = []
    for step in range(4):
        for parameter in model.parameters():
            if to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()
        backward(model, rank, step)
        optimizer.step()
        if to_none:
            kept += [(p.grad, p.grad.clone()) for p in model.parameters()]
        for parameter in model.parameters():
            assert_same_on_all_ranks(parameter)
    assert all(torch.equal(gradient, copied) for gradient, copied in kept)


def test_clipping_and_a_scaler_like_user(rank, size, several):
    model = mlp()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-3),
        named_parameters=model.named_parameters(),
        compression=GlobalQSGD(**SMALL),
    )
    for step in range(3):
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.synchronize()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert_same_on_all_ranks(norm)
        with optimizer.skip_synchronize():
            optimizer.step()
    for parameter in model.parameters():
        assert_same_on_all_ranks(parameter)


def test_training_reaches_the_loss_of_plain_horovod(rank, size):
    """The whole point, small: the same accuracy with fewer bytes."""

    def train(compression):
        model = mlp()
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.3),
            named_parameters=model.named_parameters(),
            compression=compression,
        )
        for step in range(60):
            optimizer.zero_grad()
            backward(model, rank, step % 2)
            optimizer.step()
        inputs, labels = batch(rank)
        loss = nn.functional.cross_entropy(model(inputs), labels).detach()
        for parameter in model.parameters():
            assert_same_on_all_ranks(parameter)
        return hvd.allreduce(loss).item()

    compressor = GlobalQSGD(**SMALL)
    quantized, plain = train(compressor), train(hvd.Compression.none)
    assert quantized < 0.5 * 2.3
    assert abs(quantized - plain) < 0.15
    if size > 1:
        assert compressor.stats().compressed_ratio > 3
