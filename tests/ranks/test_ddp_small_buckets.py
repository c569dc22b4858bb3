"""The communication hook with more small buckets than can be exchanged one after the other."""

from __future__ import annotations

import os

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, gradients

from hvd_gqsgd import BlockBits, simulate
from hvd_gqsgd._native import ops

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)

BUCKETS = 80
HEADER_BYTES = 128  # of each exchange, whatever goes in it


def average(state, buffers):
    """As by one backward pass."""
    hvd.barrier()
    return [state.average(buffer, first=i == 0) for i, buffer in enumerate(buffers)]


@pytest.mark.few
@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("options", [
    {}, {"exchange": "two_phase"}, {"norm": "l2", "dither": "exponential"}, {"bits": BlockBits(4)},
], ids=str)  # fmt: skip
def test_the_bits_do_not_depend_on_when_they_come(new_state, rank, size, options):
    """In one go, or each after the one before it is back."""
    everyone = gradients(size, 2000 * BUCKETS)[rank].view(BUCKETS, 2000)
    in_one_go, one_by_one = (everyone.clone() for _ in range(2))
    for future in average(new_state(**options), in_one_go):
        future.wait()
    state = new_state(**options)
    for i, buffer in enumerate(one_by_one):
        state.average(buffer, first=i == 0).wait()
    assert torch.equal(in_one_go, one_by_one)
    assert_same_on_all_ranks(in_one_go)


@pytest.mark.few
@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float64]], ids=str)
@pytest.mark.flat
def test_they_go_together(new_state, rank, size, dtypes):
    """In fewer exchanges than half as many, which is to be seen by their bytes."""
    state = new_state(bits=8)
    buffers = [torch.ones(1000, dtype=dtypes[i // 20 % len(dtypes)]) for i in range(BUCKETS)]
    for future in average(state, buffers):
        future.wait()
    for buffer in buffers:
        assert torch.allclose(buffer, torch.ones_like(buffer))
    sent = state.stats().compressed_bytes_on_wire
    payload = BUCKETS * 1000
    assert payload < sent < payload + BUCKETS * (HEADER_BYTES // 2 + 32)


@pytest.mark.few
@pytest.mark.usefixtures("several")
def test_mixed_with_large_ones_in_training(new_state, rank, size):
    """Of which none is overtaken; waited for at once now and then, as by a hook of a user."""
    state = new_state()
    for step in range(2):
        numels = [[300_000, 3000, 3000, 3000, 3000][(i + step) % 5] for i in range(40)]
        everyone = [gradients(size, numel, seed=i) for i, numel in enumerate(numels)]
        buffers = [each[rank].clone() for each in everyone]
        hvd.barrier()
        futures = []
        for i, buffer in enumerate(buffers):
            futures.append(state.average(buffer, first=i == 0))
            if i % 11 == 10:
                futures[-1].wait()
        for future in futures:
            future.wait()
        assert torch.equal(buffers[0], simulate(everyone[0], step=step))
        assert_same_on_all_ranks(torch.cat(buffers))


@pytest.mark.few
@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("fault", ["another length", "an error of one rank"])
@pytest.mark.parametrize("options", [{}, {"bits": BlockBits(4)}], ids=str)
def test_an_error_in_the_midst_loses_the_step_alone(
    new_state, rank, size, options, fault, monkeypatch
):
    """Also where buckets do not go together, and ranks have come to different points of those that
    are in flight: the next step finds none of their messages."""
    state, everyone = new_state(**options), gradients(size, 5000)
    encode = "quantize_blocks" if options else "quantize_each"
    buffers = [everyone[rank].clone() for _ in range(BUCKETS)]
    if rank == size - 1 and fault == "another length":
        buffers[40] = buffers[40][:4000]
    if rank == size - 1 and fault == "an error of one rank":
        quantize, calls = getattr(ops, encode), []

        def fails_once(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise MemoryError("on purpose")
            return quantize(*arguments)

        monkeypatch.setattr(ops, encode, fails_once)
    failed = []
    for future in average(state, buffers):
        try:
            future.wait()
        except RuntimeError:
            failed.append(1)
        else:
            failed.append(0)
    assert sum(failed) > 0
    assert failed == sorted(failed), "from one bucket on"
    if not options:
        assert_same_on_all_ranks(torch.tensor(failed))
    monkeypatch.undo()
    buffers = [everyone[rank].clone() for _ in range(BUCKETS)]
    for future in average(state, buffers):
        future.wait()
    assert torch.equal(buffers[0], simulate(everyone, step=1, **options))
    assert_same_on_all_ranks(torch.stack(buffers))
