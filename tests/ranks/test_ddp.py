"""The communication hook of DistributedDataParallel."""

from __future__ import annotations

import os

import horovod.torch as hvd
import pytest
import torch
import torch.distributed as dist
from conftest import process_group
from helpers import assert_same_on_all_ranks, backward, batch, gradients, mlp
from hooked import Given, gradient, wrap
from torch import nn

from hvd_gqsgd import AgreementError, BlockBits, DDPState, DynamicBits, GlobalQSGD, simulate

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)


@pytest.mark.parametrize("numel", [1, 3, 1023, 300_001])
@pytest.mark.parametrize("options", [
    {}, {"exchange": "two_phase"}, {"dither": "exponential"}, {"bits": BlockBits(4)},
    {"bits": BlockBits(DynamicBits(7)), "exchange": "allreduce"},
], ids=str)  # fmt: skip
def test_the_bits_of_simulate(new_state, rank, size, options, numel):
    model = Given(numel)
    wrapped = wrap(model, new_state(**options))
    for step in range(2):
        everyone = gradients(size, numel, seed=step)
        model.zero_grad()
        wrapped(everyone[rank]).backward()
        assert torch.equal(model.weight.grad, simulate(everyone, step=step, **options))


@pytest.mark.few
def test_an_empty_bucket(new_state, rank, size):
    buffer = torch.empty(0)
    assert new_state().average(buffer, first=True).wait() is buffer


@pytest.mark.few
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", ["max", "l2"])
def test_types(new_state, rank, size, dtype, norm):
    model = Given(3000, dtype)
    everyone = gradients(size, 3000, dtype=dtype)
    wrapped = wrap(model, new_state(norm=norm))
    wrapped(everyone[rank]).backward()
    assert torch.equal(model.weight.grad, simulate(everyone, norm=norm))


@pytest.mark.few
@pytest.mark.parametrize("options", [
    {}, {"exchange": "two_phase"}, {"bits": DynamicBits(10, total_steps=6, min_bits=7)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("arguments", [
    {}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True},
], ids=str)  # fmt: skip
def test_training(new_state, rank, size, options, arguments):
    """Many buckets in flight: replicas stay the same, and close to plain DDP."""
    state = new_state(min_numel=100, **options)
    models = [mlp(width=200), mlp(width=200)]
    wrapped = [
        wrap(model, s, bucket_cap_mb=0.05, **arguments)
        for model, s in zip(models, (state, None), strict=True)
    ]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    for step in range(6):
        for model, optimizer in zip(wrapped, optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, rank, step)
            optimizer.step()
        exact, ours = gradient(models[1]), gradient(models[0])
        assert_same_on_all_ranks(ours)
        assert (ours - exact).norm() < 0.5 * exact.norm()
    assert_same_on_all_ranks(torch.cat([p.view(-1) for p in models[0].parameters()]))


@pytest.mark.few
def test_small_buckets_go_as_they_are(rank, size):
    compressor = GlobalQSGD(min_numel=1000)
    model = Given(999)
    wrapped = wrap(model, compressor.ddp_state(process_group()))
    x = torch.full((999,), float(rank))
    wrapped(x).backward()
    assert torch.allclose(model.weight.grad, torch.full((999,), (size - 1) / 2))
    stats = compressor.stats()
    assert (stats.tensors, stats.tensors_bypassed, stats.bypassed_bytes) == (1, 1, 4 * 999)


@pytest.mark.few
@pytest.mark.flat
def test_statistics(rank, size):
    compressor = GlobalQSGD(bits=8, exchange="two_phase")
    wrapped = wrap(Given(100_000), compressor.ddp_state(process_group()))
    wrapped(torch.ones(100_000)).backward()
    stats = compressor.stats()
    assert stats.compressed_bytes_before == 400_000
    assert 3.5 < stats.ratio < 4


@pytest.mark.few
def test_accumulation(new_state, rank, size):
    """Under no_sync nothing is exchanged, and then the sum is."""
    model = Given(5000)
    wrapped = wrap(model, new_state())
    first, second = gradients(size, 5000, seed=1), gradients(size, 5000, seed=2)
    with wrapped.no_sync():
        wrapped(first[rank]).backward()
    assert torch.equal(model.weight.grad, first[rank])
    wrapped(second[rank]).backward()
    assert torch.equal(model.weight.grad, simulate(first + second))


@pytest.mark.few
def test_compiled_model(new_state, rank, size):
    """Traced by TorchDynamo and cut at DDP's buckets; not compiled further, which takes long."""
    model = mlp(width=700)
    wrapped = torch.compile(wrap(model, new_state(), bucket_cap_mb=1), backend="eager")
    for step in range(3):
        model.zero_grad()
        backward(wrapped, rank, step)
        assert_same_on_all_ranks(gradient(model))
    torch.compiler.reset()


@pytest.mark.few
def test_checkpoint(new_state, rank, size):
    """A new state that takes over the old one's goes on where that was."""
    everyone, bits = gradients(size, 5000), DynamicBits(7, total_steps=8, min_bits=5)
    options = {"bits": bits, "exchange": "allreduce"}

    def steps(state, count):
        results = []
        for _ in range(count):
            buffer = everyone[rank].clone()
            state.average(buffer, first=True).wait()
            results.append(buffer)
        return results

    whole = steps(new_state(**options), 6)
    before, after = new_state(**options), new_state(**options)
    first = steps(before, 3)
    after.load_state_dict(before.state_dict())
    assert torch.equal(torch.stack(first + steps(after, 3)), torch.stack(whole))


@pytest.mark.usefixtures("several")
def test_the_hook_does_not_wait(new_state, rank, size):
    """Rank 0 hands in its buckets only after all others have theirs back as futures."""
    state = new_state()
    buffers = [torch.full((5000,), float(rank)) for _ in range(3)]
    if rank == 0:
        hvd.barrier()
    futures = [state.average(buffer, first=i == 0) for i, buffer in enumerate(buffers)]
    if rank != 0:
        assert not any(future.done() for future in futures)
        hvd.barrier()
    for future in futures:
        mean = future.wait()
        assert torch.allclose(mean, torch.full((5000,), (size - 1) / 2), atol=0.1 * size)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("other", [
    {"seed": 1}, {"min_numel": 7}, {"norm": "l2"}, {"dither": "exponential"}, {"block_size": 9},
], ids=str)  # fmt: skip
def test_ranks_that_disagree(new_state, rank, size, other):
    with pytest.raises(AgreementError, match=f"ranks use different options: {next(iter(other))};"):
        new_state(**(other if rank == size - 1 else {}))


@pytest.mark.usefixtures("several")
def test_an_error_of_one_rank_is_one_on_all(new_state, rank, size):
    if rank == 0:
        with pytest.raises(ValueError, match="bits=2 is too narrow"):
            new_state(bits=2, exchange="allreduce")
    else:
        with pytest.raises(AgreementError, match="could not take part"):
            new_state()
    x = gradients(size, 5000)[rank].clone()
    assert_same_on_all_ranks(new_state().average(x, first=True).wait())


@pytest.mark.usefixtures("several")
def test_an_error_in_one_bucket_loses_the_step_alone(new_state, rank, size):
    """Another length of the first of three buckets; the next step is right."""
    state, everyone = new_state(), gradients(size, 5000)
    futures = [
        state.average(everyone[rank][: 4000 if i == 0 and rank == 0 else 5000].clone(), i == 0)
        for i in range(3)
    ]
    for future in futures:
        with pytest.raises(RuntimeError):
            future.wait()
    buffers = [everyone[rank].clone() for _ in range(2)]
    futures = [state.average(buffer, i == 0) for i, buffer in enumerate(buffers)]
    for future in futures:
        assert_same_on_all_ranks(future.wait())
    assert torch.equal(buffers[0], simulate(everyone, step=1))


def test_a_part_of_the_ranks(rank, size):
    """A process group of some ranks, of which others know nothing but that it was made."""
    if size < 3:
        pytest.skip("needs three ranks")
    process_group()
    groups = [dist.new_group(list(range(k, size, 2))) for k in (0, 1)]
    group = groups[rank % 2]
    ranks = len(range(rank % 2, size, 2))
    everyone = gradients(ranks, 5000, seed=rank % 2)
    x = everyone[dist.get_rank(group)].clone()
    GlobalQSGD(min_numel=0).ddp_state(group).average(x, first=True).wait()
    assert torch.equal(x, simulate(everyone))
    with pytest.raises(ValueError, match="not in the process group"):
        GlobalQSGD().ddp_state(groups[1 - rank % 2])


def test_a_rank_in_more_groups_than_others(rank, size):
    """PyTorch can name new groups by how many the rank is in, which must not matter here."""
    process_group()
    group = dist.new_group()  # one without connections to take over
    more = dist.new_group([0])
    everyone = gradients(size, 5000)
    x = everyone[rank].clone()
    DDPState(group, min_numel=0).average(x, first=True).wait()
    assert torch.equal(x, simulate(everyone))
    if rank == 0:
        dist.destroy_process_group(more)


def test_bits_that_are_too_few(new_state, rank, size):
    if size < 2:
        pytest.skip("needs two ranks")
    with pytest.raises(ValueError, match="bits=2 is too narrow"):
        new_state(bits=2, exchange="allreduce")


@pytest.mark.few
def test_loss_goes_down(rank, size):
    """A whole training, with defaults and momentum."""
    model = mlp(width=200)
    wrapped = wrap(model, GlobalQSGD().ddp_state(process_group()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        inputs, labels = batch(rank)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
