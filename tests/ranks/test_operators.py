"""Every operator of the two papers, over real ranks: right, agreed on, and counted to the byte."""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, backward, gradients, mlp

from hvd_gqsgd import BlockBits, DynamicBits, GlobalQSGD, simulate

OPERATORS = [
    {"exchange": "two_phase"}, {"exchange": "two_phase", "bits": 5},
    {"exchange": "two_phase", "bits": 16, "norm": "l2"}, {"norm": "l2"},
    {"dither": "exponential"}, {"dither": "exponential", "bits": 4, "block_size": None},
    {"dither": "exponential", "norm": "l2", "correlated": False, "block_size": 100},
    {"bits": BlockBits(4)}, {"bits": BlockBits(5, block_size=96), "norm": "l2"},
    {"bits": BlockBits(8), "exchange": "allreduce"}, {"bits": BlockBits(DynamicBits(5))},
]  # fmt: skip
TWO_PHASE = [
    {"exchange": "two_phase"}, {"dither": "exponential", "bits": 4},
    {"bits": BlockBits(4, block_size=1024)},
]  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_has_the_bits_of_simulate(rank, size, options):
    compressor = GlobalQSGD(min_numel=0, **options)
    for step, numel in enumerate((10_001, 3000, 1, 0)):  # with 8 ranks, 3 of 8 own a tile of 3000
        everyone = gradients(size, numel, seed=step)
        mean = hvd.allreduce(everyone[rank], compression=compressor)
        assert torch.equal(mean, simulate(everyone, step=step, **options))
        assert_same_on_all_ranks(mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", TWO_PHASE, ids=str)
def test_types(rank, size, dtype, options):
    everyone = gradients(size, 5001, dtype=dtype)
    mean = hvd.allreduce(everyone[rank], compression=GlobalQSGD(**options))
    assert mean.dtype == dtype
    assert torch.equal(mean, simulate(everyone, **options))


@pytest.mark.parametrize("options", TWO_PHASE, ids=str)
def test_sum_and_scales(rank, size, options):
    """Codes of the mean are on the wire; the factor comes in when they are decoded."""
    everyone = gradients(size, 5001)
    compressor = GlobalQSGD(**options)
    mean = simulate(everyone, step=0, **options)
    total = hvd.allreduce(everyone[rank], op=hvd.Sum, compression=compressor)
    torch.testing.assert_close(total, mean * size, rtol=1e-6, atol=0)
    mean = simulate(everyone, step=1, **options)
    scaled = hvd.allreduce(everyone[rank], postscale_factor=-0.3, compression=compressor)
    torch.testing.assert_close(scaled, mean * -0.3, rtol=1e-6, atol=0)


@pytest.mark.core
def test_process_sets(rank, size, process_set):
    everyone = gradients(size, 9001)
    mine = everyone[rank % 2 :: 2]
    for bits in (8, BlockBits(8, power=0)):
        options = {"exchange": "two_phase", "bits": bits}
        compressor = GlobalQSGD(process_set=process_set, **options)
        mean = hvd.allreduce(everyone[rank], compression=compressor, process_set=process_set)
        if len(mine) > 1:
            assert torch.equal(mean, simulate(mine, **options))
        else:  # the only rank of its set does all that other ranks do
            limit = 2 / 127 * float(mine.abs().max())
            torch.testing.assert_close(mean, mine[0], atol=limit, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("options", [*TWO_PHASE, {"norm": "l2"}], ids=str)
def test_non_finite_on_one_rank_reaches_all(rank, size, bad, options, several):
    everyone = gradients(size, 5000)
    everyone[size - 1, 1500] = bad
    mean = hvd.allreduce(everyone[rank], compression=GlobalQSGD(**options))
    assert mean[1024:2048].isnan().all()
    assert not mean[:1024].isnan().any() and not mean[2048:].isnan().any()


def padded(numel, block, lanes, word, unit):
    """Bytes of words, and of means, of a tensor: by the layout of THEORY.md, tile by tile."""
    words = means = 0
    for begin in range(0, numel, block):
        for tile in range(begin, min(begin + block, numel), 1024):
            elements = min(tile + 1024, begin + block, numel) - tile
            size = -(-elements // lanes) * word
            words += size
            means += unit + -(-size // unit) * unit
    return words, means


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("options", "lanes", "word"),
    [({"bits": 8}, 4, 4), ({"bits": 5}, 12, 8), ({"bits": 4, "dither": "exponential"}, 8, 4)],
)
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.flat
def test_bytes_of_a_two_phase_exchange(rank, size, norm, options, lanes, word, dtype):
    """Two tensors in one bucket, neither of which splits evenly."""
    options = {"exchange": "two_phase", "norm": norm, "block_size": 1500, **options}
    compressor = GlobalQSGD(**options)
    tensors = [gradients(size, numel, numel, dtype)[rank] for numel in (5003, 10_001)]
    hvd.grouped_allreduce(tensors, compression=compressor)  # the first one may rehearse hvd.join()
    compressor.reset_stats()
    hvd.grouped_allreduce(tensors, compression=compressor)
    blocks = sum(-(-tensor.numel() // 1500) for tensor in tensors)
    unit = max(word, dtype.itemsize)
    sizes = [padded(tensor.numel(), 1500, lanes, word, unit) for tensor in tensors]
    words, means = (sum(each) for each in zip(*sizes, strict=True))
    expected = (
        2 * 56  # probes
        + dtype.itemsize * (16 + blocks)
        + (8 * blocks if norm == "l2" else 0)
        + words // 2  # the Alltoall
        + (means + size * unit) // 2  # the Allgather
    )
    if size > 1:
        # Without slots to fill, as neither filled its bucket.
        assert compressor.stats().compressed_bytes_on_wire == expected


@pytest.mark.core
@pytest.mark.parametrize("options", [*TWO_PHASE, {"norm": "l2"}], ids=str)
@pytest.mark.parametrize("bucket_mb", [0.02, 25])
def test_training_keeps_the_replicas_identical(rank, size, options, bucket_mb):
    """With the user's own unnamed operations in between, which Horovod names by counting."""
    model = mlp()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        named_parameters=model.named_parameters(),
        compression=GlobalQSGD(min_numel=64, bucket_mb=bucket_mb, **options),
    )
    for step in range(4):
        optimizer.zero_grad()
        backward(model, rank, step)
        hvd.allreduce(torch.ones(1))
        optimizer.step()
    for parameter in model.parameters():
        assert_same_on_all_ranks(parameter)


@pytest.mark.core
@pytest.mark.parametrize("options", [*TWO_PHASE, {"norm": "l2"}], ids=str)
def test_abandoned_exchanges_leave_the_next_one_in_step(rank, size, options):
    compressor = GlobalQSGD(bucket_mb=0.01, **options)
    for i in range(5):
        everyone = gradients(size, 9000, seed=i)
        dropped = [compressor.compress(everyone[rank]) for _ in range(1 + i % 3)]
        del dropped
        mean = hvd.allreduce(everyone[rank], compression=compressor)
        assert (mean - everyone.mean(0)).norm() < everyone.norm()
        assert_same_on_all_ranks(mean)


# --- dynamic widths ------------------------------------------------------------------------------


def gradients_of(size, step, numel=20_000):
    """Gradients that are larger for a while."""
    return gradients(size, numel, seed=1) * (8 if 20 <= step < 25 else 1)


@pytest.mark.flat
def test_dynamic_widths_are_the_same_everywhere(rank, size, several):
    compressor = GlobalQSGD(bits=DynamicBits(5, total_steps=40, min_bits=3), exchange="two_phase")
    widths = []
    for step in range(40):
        before = compressor.stats().compressed_bytes_on_wire
        mean = hvd.allreduce(gradients_of(size, step)[rank], compression=compressor)
        stats = compressor.stats()
        widths.append(stats.bits)
        lanes = (32 if 32 % stats.bits == 0 else 64) // stats.bits
        word = 4 if 32 % stats.bits == 0 else 8
        words, means = padded(20_000, 1024, lanes, word, word)
        spent = stats.compressed_bytes_on_wire - before
        assert spent == 56 + 4 * (16 + 20) + words // 2 + (means + size * word) // 2
    assert_same_on_all_ranks(mean)
    assert_same_on_all_ranks(torch.tensor(widths))
    assert sum(widths[21:26]) > sum(widths[15:20]) + 5  # a step behind
    lane_bits = [32 / (32 // w) if 32 % w == 0 else 64 / (64 // w) for w in widths]
    assert abs(sum(lane_bits) / len(widths) - 5) < 0.15


@pytest.mark.core
def test_a_newcomer_takes_over_the_widths_of_the_others(rank, size, several):
    """As a worker that joins an elastic job: its compressor knows of no step."""
    bits = DynamicBits(6, total_steps=30, min_bits=4)
    compressor = GlobalQSGD(bits=bits)
    widths = []
    for step in range(16):
        if step == 8 and rank == size - 1:
            compressor = GlobalQSGD(bits=bits)
        hvd.allreduce(gradients_of(size, 12 + step)[rank], compression=compressor)
        widths.append(compressor.stats().bits)
    assert_same_on_all_ranks(torch.tensor(widths))
    state = compressor.state_dict()
    assert state["step"] == 16 and state["schedule"]["steps"] == 16
    assert_same_on_all_ranks(torch.tensor(list(state["schedule"].values())))


def test_a_state_goes_on_where_it_was_saved(rank, size, several):
    compressor = GlobalQSGD(bits=DynamicBits(6, total_steps=30, min_bits=4))
    for step in range(6):
        hvd.allreduce(gradients_of(size, step)[rank], compression=compressor)
    restored = GlobalQSGD(bits=DynamicBits(6, total_steps=30, min_bits=4))
    restored.load_state_dict(compressor.state_dict())
    for step in range(6, 9):
        one, other = (
            hvd.allreduce(gradients_of(size, step)[rank], compression=c)
            for c in (compressor, restored)
        )
        assert torch.equal(one, other)
