"""``hvd.allreduce(x, compression=...)``: the right number, in every type and shape."""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, bound, gradients

from hvd_gqsgd import GlobalQSGD, allreduce, simulate
from hvd_gqsgd.codecs.linear import levels_for

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.core
@pytest.mark.parametrize("options", [
    {}, {"bits": 16}, {"bits": 5}, {"bits": 11}, {"block_size": 256}, {"block_size": None},
    {"block_size": 1000}, {"correlated": False}, {"seed": 7},
])  # fmt: skip
@pytest.mark.parametrize("bucket_mb", [25, 0.001])
def test_has_the_bits_of_simulate(rank, size, options, bucket_mb):
    compressor = GlobalQSGD(bucket_mb=bucket_mb, **options)
    for step in range(3):
        everyone = gradients(size, 10_001, seed=step)
        mean = hvd.allreduce(everyone[rank], compression=compressor)
        assert torch.equal(mean, simulate(everyone, step=step, **options))
        assert_same_on_all_ranks(mean)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [13, 33])
def test_two_phases_of_small_blocks(rank, size, dtype, numel):
    """Where the sum of the remaining ranks is rehearsed, from 7 on, in an odd number of words."""
    options = {"bits": 4, "exchange": "two_phase", "block_size": 1}
    everyone = gradients(size, numel, dtype=dtype)
    mean = hvd.allreduce(everyone[rank], compression=GlobalQSGD(min_numel=0, **options))
    assert torch.equal(mean, simulate(everyone, **options))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 3, 1023, 1024, 1025, 20_000])
def test_types_and_sizes(rank, size, dtype, numel):
    everyone = gradients(size, numel, dtype=dtype)
    mean = hvd.allreduce(everyone[rank], compression=GlobalQSGD(min_numel=0))
    assert mean.dtype == dtype and mean.shape == (numel,)
    assert torch.equal(mean, simulate(everyone))
    error = (mean.double() - everyone.double().mean(0)).abs()
    rounding = everyone.double().abs().amax(0) * torch.finfo(dtype).eps
    assert (error <= bound(everyone, levels_for(8, size)) + rounding).all()


def test_the_input_is_not_modified(rank, size):
    everyone = gradients(size, 9000)
    x = everyone[rank].clone()
    hvd.allreduce(x, compression=GlobalQSGD)
    assert torch.equal(x, everyone[rank])


@pytest.mark.parametrize("make", [
    lambda x: x.view(100, 90).t(),
    lambda x: x.view(10, 9, 10, 10).to(memory_format=torch.channels_last),
    lambda x: x.view(2, 4500)[:, ::2],
    lambda x: x.view(1, 1, 9000).expand(2, 1, 9000),
])  # fmt: skip
def test_non_contiguous(rank, size, make):
    everyone = gradients(size, 9000)
    x = make(everyone[rank])
    mean = hvd.allreduce(x, compression=GlobalQSGD())
    flat = torch.stack([make(row).reshape(-1) for row in everyone])
    assert mean.shape == x.shape
    assert torch.equal(mean.reshape(-1), simulate(flat))


def test_scalar(rank, size):
    compressor = GlobalQSGD(min_numel=0, bits=16)
    mean = hvd.allreduce(torch.tensor(float(rank + 1)), compression=compressor)
    assert mean.shape == ()
    assert abs(mean.item() - (size + 1) / 2) <= size / levels_for(16, size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_non_finite_on_one_rank_reaches_all(rank, size, bad, dtype, several):
    everyone = gradients(size, 5000, dtype=dtype)
    everyone[size - 1, 1500] = bad
    mean = hvd.allreduce(everyone[rank], compression=GlobalQSGD)
    assert mean[1024:2048].isnan().all()
    assert not mean[:1024].isnan().any() and not mean[2048:].isnan().any()


def test_zeros(rank):
    mean = hvd.allreduce(torch.zeros(5000), compression=GlobalQSGD)
    assert torch.equal(mean, torch.zeros(5000))


@pytest.mark.parametrize("scale", [
    1e-45, 1e-40, 1e-38, 1e30,
    pytest.param(3e38, marks=pytest.mark.flat),  # the sum within a node overflows
])  # fmt: skip
def test_extreme_magnitudes(rank, size, scale):
    everyone = gradients(size, 5000)
    everyone = (everyone / everyone.abs().max()).double().mul(scale).float()
    mean = hvd.allreduce(everyone[rank], compression=GlobalQSGD)
    error = (mean.double() - everyone.double().mean(0)).abs()
    assert (error <= bound(everyone, levels_for(8, size)) + 2e-45).all()


@pytest.mark.parametrize("op_and_scales", [
    (hvd.Sum, 1.0, 1.0), (hvd.Average, 0.5, 1.0), (hvd.Average, 1 / 3, 3.0), (hvd.Sum, 1.0, 0.1),
    (hvd.Average, 1.0, -2.0), (hvd.Sum, 0.0, 1.0),
])  # fmt: skip
def test_linear_reductions(rank, size, op_and_scales):
    op, prescale, postscale = op_and_scales
    everyone = gradients(size, 5000)
    result = hvd.allreduce(
        everyone[rank], op=op, prescale_factor=prescale, postscale_factor=postscale,
        compression=GlobalQSGD,
    )  # fmt: skip
    factor = prescale * postscale * (size if op == hvd.Sum else 1)
    error = (result.double() - everyone.double().mean(0) * factor).abs()
    assert (error <= bound(everyone, levels_for(8, size)) * abs(factor)).all()
    assert_same_on_all_ranks(result)


@pytest.mark.parametrize("numel", [1, 9000])
def test_one_rank_keeps_what_it_has(rank, size, comm, numel):
    """Nothing is exchanged, so nothing is rounded, whatever it goes over; and ``stats`` says so."""
    if size > 1:
        pytest.skip("for one rank")
    x = gradients(1, numel)[0]
    compressor = GlobalQSGD(bits=4, min_numel=0)
    for _ in range(3):
        assert torch.equal(allreduce(x, comm, bits=4), x)
        assert torch.equal(hvd.allreduce(x, compression=compressor), x)
        assert torch.equal(hvd.allreduce(x, op=hvd.Sum, compression=compressor), x)
    doubled = hvd.allreduce(x, prescale_factor=2.0, compression=compressor)
    assert torch.equal(doubled, 2 * x)
    stats = compressor.stats()
    assert stats.tensors_alone == stats.tensors_bypassed == stats.tensors == 7
    assert (stats.compressed_bytes_on_wire, stats.ratio) == (0, 1)
    assert "of a single rank" in str(stats)
    assert compressor.state_dict()["step"] == 7


@pytest.mark.core
def test_grouped(rank, size):
    groups = [gradients(size, numel, seed=numel) for numel in (5000, 10, 7000)]
    tensors = [everyone[rank].clone() for everyone in groups]
    tensors.append(tensors[0].double())
    compressor = GlobalQSGD()
    results = hvd.grouped_allreduce(tensors, compression=compressor)
    for everyone, result, exact in zip(groups, results, (False, True, False), strict=False):
        allowed = 1e-6 * everyone.abs().max() if exact else bound(everyone, levels_for(8, size))
        assert ((result.double() - everyone.double().mean(0)).abs() <= allowed).all()
    assert results[3].dtype == torch.float64
    assert torch.equal(tensors[0], groups[0][rank])
    assert compressor.stats().tensors_bypassed == (1 if size > 1 else 4)


def test_integers_and_small_tensors_pass_through(rank, size):
    compressor = GlobalQSGD()
    total = hvd.allreduce(torch.full((9000,), rank), op=hvd.Sum, compression=compressor)
    assert torch.equal(total, torch.full((9000,), size * (size - 1) // 2))
    small = hvd.allreduce(torch.full((10,), float(rank)), compression=compressor)
    assert torch.allclose(small, torch.full((10,), (size - 1) / 2))
    assert compressor.stats().bypassed_share == 1


def test_what_autograd_must_see_passes_through(rank, size):
    x = torch.full((9000,), float(rank), requires_grad=True)
    mean = hvd.allreduce(x, compression=GlobalQSGD)
    mean.backward(torch.ones(9000))
    assert torch.allclose(mean, torch.full((9000,), (size - 1) / 2))
    assert torch.allclose(x.grad, torch.ones(9000))
    with torch.no_grad():
        hvd.allreduce(x, compression=GlobalQSGD)


def test_decompress_without_context_returns_its_input():
    x = torch.ones(3)
    assert GlobalQSGD.decompress(x, None) is x
    assert GlobalQSGD().decompress(x, None) is x


def test_same_seed_same_bits_and_other_seed_other_bits(rank, size, several):
    everyone = gradients(size, 9000)
    first, again, other = (
        hvd.allreduce(everyone[rank], compression=GlobalQSGD(seed=seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_results_do_not_share_memory(rank, size):
    compressor = GlobalQSGD()
    results, copies = [], []
    for step in range(4):
        results.append(hvd.allreduce(gradients(size, 9000, step)[rank], compression=compressor))
        copies.append(results[-1].clone())
    for result, copy in zip(results, copies, strict=True):
        assert torch.equal(result, copy)


def test_too_many_ranks_for_the_lanes(rank, several):
    with pytest.raises(ValueError, match="bits must be at least"):
        hvd.allreduce(torch.ones(9000), compression=GlobalQSGD(bits=2, exchange="allreduce"))


@pytest.mark.core
def test_a_process_set_and_all_ranks_at_once(rank, size, process_set):
    """Ranks outside of a process set know nothing of what is in flight there."""
    everyone = gradients(size, 9000)
    in_set, of_all = GlobalQSGD(process_set=process_set), GlobalQSGD()
    even = rank % 2 == 0
    if even:
        probe, context = in_set.compress(everyone[rank])
        handle = hvd.allreduce_async_(probe, name="even", process_set=process_set)
    probe_of_all, context_of_all = of_all.compress(everyone[rank])
    handle_of_all = hvd.allreduce_async_(probe_of_all, name="all")
    if even:
        mean = in_set.decompress(hvd.synchronize(handle), context)
        assert torch.equal(mean, simulate(everyone[::2]))
    mean = of_all.decompress(hvd.synchronize(handle_of_all), context_of_all)
    assert torch.equal(mean, simulate(everyone))
    if not even:  # or the odd ranks would have counted fewer operations from here on
        hvd.allreduce(everyone[rank], compression=in_set, process_set=process_set, name="odd")


@pytest.mark.core
def test_process_sets(rank, size, process_set):
    everyone = gradients(size, 9000)
    compressor = GlobalQSGD(process_set=process_set)
    mean = hvd.allreduce(everyone[rank], compression=compressor, process_set=process_set)
    mine = everyone[rank % 2 :: 2]
    if len(mine) > 1:
        assert torch.equal(mean, simulate(mine))
    else:  # the only rank of its set does all that other ranks do
        assert ((mean - mine[0]).abs() <= bound(mine, 127)).all()
