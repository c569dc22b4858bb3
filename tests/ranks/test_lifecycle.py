"""Exchanges that are never finished, steps that get lost, and what is counted."""

from __future__ import annotations

import copy
import gc
import pickle  # noqa: TID251  (of objects of our own)
import time

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, bound, gradients

from hvd_gqsgd import DynamicBits, GlobalQSGD, simulate
from hvd_gqsgd.codecs.linear import levels_for


def test_a_dropped_exchange_leaves_the_next_one_in_step(rank, size):
    everyone = gradients(size, 9000)
    compressor = GlobalQSGD(bucket_mb=0.01)
    dropped = [compressor.compress(everyone[rank]) for _ in range(2)]  # sent off
    del dropped  # and never asked for
    mean = hvd.allreduce(everyone[rank], compression=compressor)
    assert ((mean - everyone.mean(0)).abs() <= bound(everyone, levels_for(8, size))).all()
    assert_same_on_all_ranks(mean)


@pytest.mark.core
def test_half_of_a_step_is_dropped(rank, size):
    """Whatever was in flight by then on each rank: the next step goes right, again and again."""
    compressor = GlobalQSGD(bucket_mb=0.01)
    for i in range(20):
        everyone = gradients(size, 9000, seed=i)
        waiting = []
        for name in ("first", "second"):
            probe, context = compressor.compress(everyone[rank])
            waiting.append((hvd.allreduce_async_(probe, name=f"{name} {i}"), context))
            time.sleep(0.001 * ((rank * 7 + i) % 4))
        mean = compressor.decompress(hvd.synchronize(waiting[0][0]), waiting[0][1])
        hvd.synchronize(waiting[1][0])
        del waiting, context
        assert ((mean - everyone.mean(0)).abs() <= bound(everyone, levels_for(8, size))).all()


@pytest.mark.core
def test_a_rank_that_lost_a_step_falls_in_line(rank, size, several):
    """As a rejoining worker of an elastic job: it has no idea what step the others are at."""
    everyone = gradients(size, 9000)
    compressor = GlobalQSGD()
    for _ in range(3):
        hvd.allreduce(everyone[rank], compression=compressor)
    if rank == 0:
        compressor = GlobalQSGD()
    mean = hvd.allreduce(everyone[rank], compression=compressor)
    assert torch.equal(mean, simulate(everyone, step=3))
    assert torch.equal(hvd.allreduce(everyone[rank], compression=compressor),
                       simulate(everyone, step=4))  # fmt: skip


def test_garbage_is_collected_at_other_times(rank, size, several):
    """Gradients in flight in a cycle, as an exception leaves those of an optimizer: freed on some
    ranks already, and not yet on others."""
    everyone = gradients(size, 9000)
    gc.disable()
    try:
        for step in range(3):
            cycle = [GlobalQSGD(bucket_mb=0.01)]
            cycle += [cycle, cycle[0].compress(everyone[rank])]
            del cycle
            if rank == step % size:
                gc.collect()
            mean = hvd.allreduce(everyone[rank], compression=GlobalQSGD())
            assert torch.equal(mean, simulate(everyone))
    finally:
        gc.enable()


def test_horovod_starts_anew(rank, size, restart):
    """With exchanges in flight, and more of them on some ranks; old handles mean nothing then."""
    if not hvd.mpi_enabled():
        pytest.skip("hvd.init() may abort when a static Gloo job is started anew")
    everyone = gradients(size, 9000)
    compressor = GlobalQSGD(bucket_mb=0.01)
    hvd.allreduce(everyone[rank], compression=compressor)
    state = compressor.state_dict()
    lost = [compressor.compress(everyone[rank]) for _ in range(1 + rank % 3)]
    restart()
    compressor.load_state_dict(state)  # as elastic training does, whoever still holds what is lost
    del lost
    if rank == size - 1:
        compressor = GlobalQSGD(bucket_mb=0.01)  # a new worker
    for _ in range(3):
        mean = hvd.allreduce(everyone[rank], compression=compressor)
        assert ((mean - everyone.mean(0)).abs() <= bound(everyone, levels_for(8, size))).all()
        assert_same_on_all_ranks(mean)


@pytest.mark.flat
def test_stats_count_every_byte(rank, size, several):
    compressor = GlobalQSGD()
    hvd.allreduce(torch.ones(4096 * 10), compression=compressor)
    hvd.allreduce(torch.ones(100), compression=compressor)
    stats = compressor.stats()
    codes, norms = 4096 * 10, 4 * 40
    headers, probe = 4 * (16 + 16), 7 * 8
    assert stats.steps == 1
    assert stats.tensors == 2
    assert stats.bypassed_share == 0.5
    assert stats.compressed_bytes_before == 4 * 4096 * 10
    assert stats.compressed_bytes_on_wire == codes + norms + headers + probe
    assert stats.bytes_before - stats.compressed_bytes_before == stats.bypassed_bytes == 400
    assert stats.compressed_ratio > 3.95


def test_the_default_ratio_on_large_tensors_with_several_buckets(rank, size, several):
    compressor = GlobalQSGD(bucket_mb=1)
    for step in range(2):
        sizes = (300_000, 200_000, 100_000)
        tensors = [gradients(size, n, seed=step)[rank] for n in sizes]
        hvd.grouped_allreduce(tensors, compression=compressor)
    assert compressor.stats().compressed_ratio > 3.98


def test_memory_is_used_again(rank, size):
    compressor = GlobalQSGD(bucket_mb=0.01)
    x = gradients(size, 9000)[rank]
    addresses = set()
    for _ in range(6):
        result = hvd.allreduce(x, compression=compressor)
        addresses.add(result.data_ptr())
        del result
    assert len(addresses) == 1


@pytest.mark.few
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])  # noqa: S301
def test_a_copy_of_a_compressor_in_use(rank, size, copied):
    """It has the state of the training, and nothing of what is in flight."""
    everyone, options = gradients(size, 9000), {"bits": DynamicBits(9, min_bits=6)}
    compressor = GlobalQSGD(**options)
    hvd.allreduce(everyone[rank], name="before", compression=compressor)
    probe, context = compressor.compress(everyone[rank])
    handle = hvd.allreduce_async_(probe, name="in flight")
    again = copied(compressor)
    assert again.state_dict() == compressor.state_dict()
    assert again.state_dict()["step"] == 2
    compressor.decompress(hvd.synchronize(handle), context)
    means = [hvd.allreduce(everyone[rank], name="after", compression=c) for c in (again,) * 2]
    assert again.state_dict()["step"] == 4
    for mean in means:
        assert_same_on_all_ranks(mean)
