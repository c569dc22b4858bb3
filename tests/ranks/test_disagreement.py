"""What has no right answer is an error on every rank: no hang, no wrong gradient.

All operations have names: after a disagreement ranks may have started different numbers of them,
and Horovod names those without a name by counting.
"""

from __future__ import annotations

import re

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, bound, gradients
from horovod.common.exceptions import HorovodInternalError

from hvd_gqsgd import AgreementError, DynamicBits, GlobalQSGD, simulate
from hvd_gqsgd.codecs.linear import levels_for

pytestmark = [pytest.mark.usefixtures("several"), pytest.mark.unanswered]


@pytest.mark.parametrize("options", [
    ({"bits": 8}, {"bits": 16}), ({"bits": 8}, {"bits": 7}),
    ({"block_size": 1024}, {"block_size": None}), ({"block_size": 1024}, {"block_size": 1025}),
    ({"correlated": True}, {"correlated": False}),
    ({"seed": 0}, {"seed": 1}), ({"bucket_mb": 25}, {"bucket_mb": 1}),
    ({}, {"exchange": "two_phase"}), ({}, {"norm": "l2"}), ({"norm": "l2"}, {}),
    ({"exchange": "two_phase"}, {"dither": "exponential"}),
    ({}, {"keep": 1 / 8}), ({"bits": 4}, {"bits": 4, "hierarchy": "node"}),
    ({"keep": 1 / 4}, {"keep": 1 / 8}),
    ({"bits": 5}, {"bits": DynamicBits(5)}), ({"bits": DynamicBits(6)}, {"bits": DynamicBits(5)}),
])  # fmt: skip
def test_options(rank, size, options):
    compressor = GlobalQSGD(**options[rank == size - 1])
    own, other = compressor.options, GlobalQSGD(**options[rank != size - 1]).options
    (name, value), *_ = [(n, v) for n, (v, _) in own.values().items() if v != getattr(other, n)]
    # All options, where neither has the default and their marks are the same.
    told = rf"different options(: {name}|, or builds).* has .*{name}={re.escape(repr(value))}"
    if name in ("block_size", "keep"):  # Horovod sees other lengths or types before
        told += "|they use different options or different tensors"
    with pytest.raises(AgreementError, match=told):
        hvd.allreduce(torch.ones(9000), name="x", compression=compressor)


@pytest.mark.core
def test_options_that_average_out(rank, several):
    """Three ranks with digests around the middle one's must not look alike to it."""
    with pytest.raises(AgreementError, match="different options"):
        hvd.allreduce(torch.ones(9000), name="x", compression=GlobalQSGD(seed=rank))


def test_compressed_on_some_ranks_only(rank):
    """Horovod itself sees that one sends a gradient and another a probe."""
    compressor = GlobalQSGD(min_numel=10_000 if rank == 0 else 0)
    with pytest.raises(HorovodInternalError, match="Mismatched"):
        hvd.allreduce(torch.ones(9000), name="x", compression=compressor)


@pytest.mark.parametrize("name", ["Min", "Max", "Product", "Adasum"])
def test_reductions_that_are_not_linear(rank, size, name):
    if name == "Adasum" and (not hvd.mpi_enabled() or size & (size - 1)):
        pytest.skip("Horovod's Adasum needs MPI and a power of two")
    compressor = GlobalQSGD()
    with pytest.raises(AgreementError, match="linear"):
        hvd.allreduce(torch.ones(9000), name="x", op=getattr(hvd, name), compression=compressor)
    everyone = gradients(size, 9000)
    mean = hvd.allreduce(everyone[rank], name="x", compression=compressor)  # and it still works
    assert ((mean - everyone.mean(0)).abs() <= bound(everyone, levels_for(8, size))).all()


OPERATORS = [{}, {"exchange": "two_phase"}, {"norm": "l2"}, {"norm": "l2", "dither": "exponential"}]


@pytest.mark.core
@pytest.mark.parametrize("numels", [(9000,), (9000, 5000)])  # the second one stays in its bucket
@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_a_rank_that_gave_up_a_step_spoils_none(rank, size, options, numels):
    """As after an exception that it caught. What it then sends for the others' sake must not count
    as a gradient, and the next step is right."""
    compressor = GlobalQSGD(bucket_mb=0.03, **options)
    waiting = []
    for i, numel in enumerate(numels):
        probe, context = compressor.compress(gradients(size, numel)[rank])
        waiting.append((hvd.allreduce_async_(probe, name=f"given up {i}"), context))
    reduced = [hvd.synchronize(handle) for handle, _ in waiting]
    if rank == size - 1:
        del context, waiting
    else:
        with pytest.raises(AgreementError, match="abandoned this step"):
            compressor.decompress(reduced[0], waiting[0][1])
    everyone = gradients(size, 9000)
    mean = hvd.allreduce(everyone[rank], name="the next one", compression=compressor)
    assert_same_on_all_ranks(mean)
    assert torch.equal(mean, simulate(everyone, step=1, **options))


@pytest.mark.core
@pytest.mark.parametrize("exchange", ["allreduce", "two_phase"])
# The second one is two tiles, so that in two phases most ranks are not sent anything.
@pytest.mark.parametrize(("bucket_mb", "numel"), [(25, 7_200_000), (1e-3, 2048)])
def test_a_newcomer_that_gave_up_with_another_width(rank, size, exchange, bucket_mb, numel):
    """What it sends has another length than the others'."""
    options = {"exchange": exchange, "bucket_mb": bucket_mb, "min_numel": 0}
    compressor = GlobalQSGD(bits=DynamicBits(7, total_steps=9, min_bits=5), **options)
    x = gradients(size, 9000)[rank]
    for step in range(4):  # norms that make the others' width another one than the newcomer's
        hvd.allreduce(x / 4**step, name="x", compression=compressor)
    x_now = x.repeat(800)[:numel]  # its bucket is full
    if rank == size - 1:
        compressor = GlobalQSGD(bits=compressor.options.bits, **options)
        probe, context = compressor.compress(x_now)
        # The others begin only now, so that it gives up before it has their norms.
        hvd.allreduce(torch.zeros(1), name="begun")
    else:
        compressor.load_state_dict(compressor.state_dict() | {"step": 4})
        hvd.allreduce(torch.zeros(1), name="begun")
        probe, context = compressor.compress(x_now)
    reduced = hvd.synchronize(hvd.allreduce_async_(probe, name="given up"))
    if rank == size - 1:
        del context
    else:
        with pytest.raises(AgreementError):
            compressor.decompress(reduced, context)
    for _ in range(2):
        mean = hvd.allreduce(x, name="the next one", compression=compressor)
        assert_same_on_all_ranks(mean)


@pytest.mark.parametrize("options", OPERATORS, ids=str)
@pytest.mark.parametrize("bucket_mb", [25, 0.03])
def test_a_rank_that_drops_a_part_of_a_completed_step(rank, size, options, bucket_mb):
    """It has done its part, so the others complete the step, and the next one is right."""
    compressor = GlobalQSGD(bucket_mb=bucket_mb, **options)
    waiting = []
    for i in range(3):
        probe, context = compressor.compress(gradients(size, 9000, seed=i)[rank])
        waiting.append((hvd.allreduce_async_(probe, name=f"part {i}"), context))
    reduced = [hvd.synchronize(handle) for handle, _ in waiting]
    for i in range(1 if rank == 0 else 3):
        compressor.decompress(reduced[i], waiting[i][1])
    del waiting, context
    everyone = gradients(size, 9000)
    mean = hvd.allreduce(everyone[rank], name="the next one", compression=compressor)
    assert torch.equal(mean, simulate(everyone, step=1, **options))


@pytest.mark.core
@pytest.mark.parametrize("options", [
    {"exchange": "two_phase"}, {"dither": "exponential", "bits": 4}, {"norm": "l2"},
    {"bits": DynamicBits(6, min_bits=4)}, {"keep": 1 / 8},
])  # fmt: skip
def test_all_operators_abandon_what_is_not_linear(rank, size, options):
    compressor = GlobalQSGD(**options)
    with pytest.raises(AgreementError, match="linear"):
        hvd.allreduce(torch.ones(9000), name="x", op=hvd.Max, compression=compressor)
    everyone = gradients(size, 9000)
    mean = hvd.allreduce(everyone[rank], name="x", compression=compressor)  # and it still works
    assert_same_on_all_ranks(mean)


def test_other_process_set_than_the_compressor_s(rank, process_set):
    with pytest.raises(AgreementError, match="process_set"):
        hvd.allreduce(torch.ones(9000), name="x", compression=GlobalQSGD(), process_set=process_set)


def test_two_named_compressors_in_another_order(rank, size):
    parameters = {name: torch.nn.Parameter(torch.zeros(9000)) for name in "ab"}
    compressors = {n: GlobalQSGD(named_parameters=[(n, p)]) for n, p in parameters.items()}
    everyone = {name: gradients(size, 9000, seed=ord(name)) for name in parameters}
    waiting = {}
    for name in "ab" if rank == 0 else "ba":
        parameters[name].grad = everyone[name][rank].clone()
        probe, context = compressors[name].compress(parameters[name].grad)
        waiting[name] = hvd.allreduce_async_(probe, name=name), context
    for name in "ab":  # an optimizer's step() comes at the same place on all ranks
        handle, context = waiting[name]
        mean = compressors[name].decompress(hvd.synchronize(handle), context)
        limit = bound(everyone[name], levels_for(8, size))
        assert ((mean - everyone[name].mean(0)).abs() <= limit).all()


def exchange_in_order(compressor, tensors, order):
    """As an optimizer's hooks do: all gradients in, in some order, then all of them out."""
    waiting = []
    for name in order:
        probe, context = compressor.compress(tensors[name])
        waiting.append((name, hvd.allreduce_async_(probe, name=name), context))
    return {
        name: compressor.decompress(hvd.synchronize(handle), context)
        for name, handle, context in waiting
    }


@pytest.mark.parametrize("numels", [(9000, 9000, 9000), (9000, 5000, 7000)])
@pytest.mark.parametrize("bucket_mb", [25, 0.03])
@pytest.mark.parametrize("exchange", ["allreduce", "two_phase"])
def test_other_order_without_names(rank, size, numels, bucket_mb, exchange):
    tensors = {f"t{i}": torch.ones(numel) for i, numel in enumerate(numels)}
    order = list(tensors)
    if rank == size - 1:
        order = [order[1], order[0], order[2]]
    with pytest.raises(AgreementError, match="order"):
        exchange_in_order(GlobalQSGD(exchange=exchange, bucket_mb=bucket_mb), tensors, order)
    hvd.barrier()


@pytest.mark.parametrize("numels", [(9000, 9000, 9000, 9000), (9000, 5000, 7000, 8000)])
@pytest.mark.parametrize("bucket_mb", [25, 0.03, 0.06])
def test_other_order_with_names(rank, size, numels, bucket_mb):
    parameters = {f"p{i}": torch.nn.Parameter(torch.zeros(n)) for i, n in enumerate(numels)}
    compressor = GlobalQSGD(named_parameters=parameters.items(), bucket_mb=bucket_mb)
    for step in range(3):
        everyone = {
            name: gradients(size, p.numel(), seed=10 * step + i)
            for i, (name, p) in enumerate(parameters.items())
        }
        for name, parameter in parameters.items():
            parameter.grad = everyone[name][rank].clone()
        order = list(parameters)
        order = order[rank % 4 :] + order[: rank % 4]
        grads = {name: p.grad for name, p in parameters.items()}
        results = exchange_in_order(compressor, grads, order)
        for name in parameters:
            error = (results[name] - everyone[name].mean(0)).abs()
            assert (error <= bound(everyone[name], levels_for(8, size))).all()
            assert_same_on_all_ranks(results[name])


@pytest.mark.parametrize("who", ["all", "rank 0"])
def test_a_parameter_without_a_name(rank, who):
    """Under error feedback: where the name is there, ranks do not wait for the others."""
    model = torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.Linear(80, 80))
    missing = who == "all" or rank == 0
    names = [*model.named_parameters()][: 2 if missing else None]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=GlobalQSGD(
            keep=1 / 4, error_feedback="residual", named_parameters=names, min_numel=100
        ),
    )
    model(torch.ones(2, 80)).sum().backward()
    error, told = AgreementError, r"options or names of parameters.*keep=0.25"
    if missing:
        error, told = ValueError, r"got another tensor of shape \(80, 80\): pass its parameter"
    with pytest.raises(error, match=told):
        optimizer.step()
    hvd.barrier()
