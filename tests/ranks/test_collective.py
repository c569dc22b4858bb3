"""``hvd_gqsgd.allreduce`` over MPI, PyTorch's process groups and Horovod."""

from __future__ import annotations

import functools
import os

import horovod.torch as hvd
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_on_all_ranks, gradients

from hvd_gqsgd import AgreementError, BlockBits, DynamicBits, allreduce, simulate

SIZES = [0, 1, 3, 1023, 300_001]
OPERATORS = [
    {"exchange": "two_phase"},
    {"dither": "exponential"},
    {"dither": "exponential", "bits": 4, "block_size": 64},
    {"norm": "l2"},
    {"norm": "l2", "dither": "exponential"},
    {"bits": 4, "seed": -3},
    {"bits": BlockBits(4)},
]
LANES = [
    {"bits": 16, "correlated": False, "block_size": None},
    {"bits": 5, "block_size": 1500},
    {"bits": 12, "block_size": 100},
    {"bits": 8, "block_size": 7},
]

# What reductions are called, which may travel over another library.
SUMS = {
    "torch": dist.ReduceOp.SUM, "torch, an instance": dist.ReduceOp(dist.ReduceOp.SUM),
    "Horovod": hvd.Sum,
}  # fmt: skip
MEANS = {"torch": dist.ReduceOp.AVG, "Horovod": hvd.Average}
OTHER_OPS = [
    (ValueError, "got 'max'$", "max"),
    (ValueError, r"got 'average': did you mean 'mean'\?", "average"),
    (ValueError, r"got 'SUM': did you mean 'sum'\?", "SUM"),
    (ValueError, r"got ReduceOp\.PRODUCT", dist.ReduceOp.PRODUCT),
    (ValueError, r"got ReduceOp\.PREMUL_SUM", dist._make_nccl_premul_sum(2.0)),
    (ValueError, r"got hvd\.Adasum", hvd.Adasum),
    (ValueError, "got 99", 99),
    (TypeError, "got True", True),
    (TypeError, "got None", None),
    (TypeError, "got 1.0", 1.0),
]
if "OMPI_COMM_WORLD_SIZE" in os.environ:
    from mpi4py import MPI

    SUMS["MPI"] = MPI.SUM
    OTHER_OPS.append((ValueError, r"got MPI\.MAX", MPI.MAX))


@functools.lru_cache(maxsize=4)  # for one transport after the other
def expected(size, numel, **options):
    """The gradients of all ranks, and what they all get."""
    everyone = gradients(size, numel)
    return everyone, simulate(everyone, step=5, **options)


@pytest.mark.core
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("options", [{}, {"dither": "exponential"}], ids=str)
def test_all_transports_give_the_bits_of_simulate(rank, size, options, numel, comm):
    everyone, mean = expected(size, numel, **options)
    assert torch.equal(allreduce(everyone[rank], comm, step=5, **options), mean)


@pytest.mark.few
@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_operators(rank, size, comm, options):
    everyone, mean = expected(size, 5000, **options)
    assert torch.equal(allreduce(everyone[rank], comm, step=5, **options), mean)


@pytest.mark.parametrize("options", LANES, ids=str)
def test_lanes(rank, size, comm, options):
    """Several chunks, with the last one cut short."""
    if 2 * size >= 2 ** options["bits"]:
        pytest.skip("too many ranks for these lanes")
    options = {"exchange": "allreduce", **options}
    for numel in (1, 2, 300_001):
        everyone, mean = expected(size, numel, **options)
        assert torch.equal(allreduce(everyone[rank], comm, step=5, **options), mean)


@pytest.mark.parametrize("bits", [5, 8, 16])
def test_extremes_overflow_no_lane(rank, size, comm, bits):
    """Every rank at the same end, with signs to both sides."""
    x = torch.tensor([3.0, -3.0, 3.0]).repeat(1500)
    assert torch.equal(allreduce(x, comm, bits=bits, exchange="allreduce"), x)


@pytest.mark.few
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(rank, size, comm, dtype):
    everyone = gradients(size, 3001, dtype=dtype)
    result = allreduce(everyone[rank], comm, step=0)
    assert result.dtype == dtype
    assert torch.equal(result, simulate(everyone))


@pytest.mark.few
def test_where_the_result_goes(rank, size, comm):
    everyone = gradients(size, 6000)
    mean, x = simulate(everyone, step=1), everyone[rank]
    out = torch.full_like(x, -1)
    assert allreduce(x, comm, out=out, step=1) is out
    assert torch.equal(out, mean)
    assert torch.equal(x, everyone[rank]), "the input is left alone"

    strided = torch.full((6000, 2), -1.0)
    allreduce(x, comm, out=strided[:, 1], step=1)
    assert torch.equal(strided[:, 1], mean)
    assert (strided[:, 0] == -1).all()

    both = torch.cat([x, torch.full((10,), -1.0)])  # an output that begins within the input
    allreduce(both[:6000], comm, out=both[10:], step=1)
    assert torch.equal(both[10:], mean)

    in_place = x.clone()
    assert allreduce(in_place, comm, out=in_place, step=1) is in_place
    assert torch.equal(in_place, mean)

    kept = allreduce(x, comm, step=1)
    allreduce(x, comm, step=2)
    assert torch.equal(kept, mean), "a result is not written over"


@pytest.mark.few
def test_shapes(rank, size, comm):
    everyone = gradients(size, 6000).view(size, 60, 100)
    mean = simulate(everyone.flatten(1), step=1)
    assert torch.equal(allreduce(everyone[rank], comm, step=1), mean.view(60, 100))
    columns = everyone[rank].t().contiguous().t()
    assert torch.equal(allreduce(columns, comm, step=1), mean.view(60, 100))
    assert allreduce(torch.tensor(2.5), comm).shape == ()
    assert allreduce(torch.zeros(3, 0, 2), comm).shape == (3, 0, 2)
    with_gradient = everyone[rank].clone().requires_grad_()
    assert not allreduce(with_gradient, comm).requires_grad


@pytest.mark.few
def test_numpy(rank, size, comm):
    everyone = gradients(size, 6000).numpy()
    mean = simulate(everyone, step=1)
    x = everyone[rank]
    result = allreduce(x, comm, step=1)
    assert isinstance(result, np.ndarray)
    assert np.array_equal(result, mean)
    assert np.array_equal(allreduce(x[::-1], comm, step=1), simulate(everyone[:, ::-1], step=1))
    x.flags.writeable = False
    assert np.array_equal(allreduce(x, comm, step=1), mean)
    out = np.empty((6000, 2), np.float32)
    allreduce(x, comm, out=out[:, 0], step=1)
    assert np.array_equal(out[:, 0], mean)
    x.flags.writeable = True
    assert allreduce(x, comm, out=x, step=1) is x
    assert np.array_equal(x, mean)
    assert allreduce(np.ones(()), comm).shape == ()


@pytest.mark.few
def test_sum(rank, size, comm):
    everyone = torch.ones(size, 5000)
    assert torch.equal(allreduce(everyone[rank], comm, "sum"), torch.full((5000,), float(size)))
    result = allreduce(everyone[rank], comm, "sum", exchange="two_phase")
    assert torch.equal(result, torch.full((5000,), float(size)))


@pytest.mark.few
@pytest.mark.parametrize("name", SUMS)
def test_sums_of_all_libraries(rank, size, comm, name):
    everyone = gradients(size, 5000)
    total = allreduce(everyone[rank], comm, "sum", step=3)
    assert torch.allclose(total, size * simulate(everyone, step=3))
    assert torch.equal(allreduce(everyone[rank], comm, SUMS[name], step=3), total)


@pytest.mark.few
@pytest.mark.parametrize("name", MEANS)
def test_means_of_all_libraries(rank, size, comm, name):
    everyone = gradients(size, 5000)
    mean = simulate(everyone, step=3)
    assert torch.equal(allreduce(everyone[rank], comm, MEANS[name], step=3), mean)


@pytest.mark.few
def test_steps_are_counted(rank, size, comm):
    """For each set of options; a step that was given is gone on from."""
    everyone = gradients(size, 3000)
    options = {"seed": 4711}  # that no other test has used
    results = [allreduce(everyone[rank], comm, **options) for _ in range(2)]
    results.append(allreduce(everyone[rank], comm, step=7, **options))
    results.append(allreduce(everyone[rank], comm, **options))
    for step, result in zip((0, 1, 7, 8), results, strict=True):
        assert torch.equal(result, simulate(everyone, step=step, **options))
    assert not torch.equal(results[0], results[1])


@pytest.mark.few
def test_not_finite(rank, size, comm):
    x = torch.ones(5000)
    x[2000] = torch.nan if rank == size - 1 else 1
    for options in ({}, {"exchange": "two_phase"}):
        result = allreduce(x, comm, **options)
        assert_same_on_all_ranks(result.isnan())
        assert torch.equal(result.isnan().nonzero().view(-1), torch.arange(1024, 2048))


@pytest.mark.few
def test_dynamic_bits(rank, size, comm):
    """The schedule goes on from call to call."""
    everyone = gradients(size, 5000)
    options = {"bits": DynamicBits(6, total_steps=12, min_bits=5), "exchange": "allreduce"}
    results = [allreduce(everyone[rank] / 2**step, comm, **options) for step in range(12)]
    for result in results:
        assert_same_on_all_ranks(result)
    widths = {len(result.div(result.abs().max()).unique()) for result in results}
    assert len(widths) > 1


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("what", ["shape", "type", "option", "op", "exchange", "block size"])
def test_ranks_that_disagree(rank, size, comm, what):
    x, op, options = torch.ones(5000), "mean", {}
    if rank == size - 1:
        x = {"shape": torch.ones(700), "type": torch.ones(5000).double()}.get(what, x)
        op = "sum" if what == "op" else op
        options = {
            "option": {"seed": 1}, "exchange": {"dither": "exponential"},
            "block size": {"block_size": 10},
        }.get(what, options)  # fmt: skip
    with pytest.raises(AgreementError, match=r"different (options|tensors)"):
        allreduce(x, comm, op, **options)
    everyone = gradients(size, 5000)
    mean = allreduce(everyone[rank], comm, step=2)
    assert torch.equal(mean, simulate(everyone, step=2)), "the next one is right"


@pytest.mark.few
@pytest.mark.parametrize("error", [
    (TypeError, "got torch.int32", {"x": torch.ones(5000, dtype=torch.int32)}),
    (TypeError, "NumPy array, got <class 'list'>", {"x": [1.0]}),
    (TypeError, "dense", {"x": torch.ones(50, 50).to_sparse()}),
    (ValueError, "bits must be from 2 to 16, .*, got 99", {"bits": 99}),
    (ValueError, "step must be from 0", {"step": -1}),
    (ValueError, "out must be like x", {"out": torch.ones(4)}),
    (ValueError, "out must be writeable", {"out": np.broadcast_to(np.float32(1), 5000)}),
    (TypeError, r"allreduce\(\) got an unknown option 'bit': did you mean 'bits'", {"bit": 8}),
    (TypeError, r"allreduce\(\) takes no option 'bucket_mb': .* leave it out", {"bucket_mb": 25}),
    (TypeError, r"allreduce\(\) takes no option 'min_numel': .* leave it out", {"min_numel": 1}),
    *((kind, f"op must be .*MPI.SUM.*, {got}", {"op": op}) for kind, got, op in OTHER_OPS),
])  # fmt: skip
def test_an_error_of_one_rank_is_one_on_all(rank, size, comm, error):
    kind, message, arguments = error
    everyone = gradients(size, 5000)
    if rank == 0:
        with pytest.raises(kind, match=message):
            allreduce(**({"x": everyone[rank], "comm": comm} | arguments))
    else:
        with pytest.raises(AgreementError, match="could not take part"):
            allreduce(everyone[rank], comm)
    mean = allreduce(everyone[rank], comm, step=2)
    assert torch.equal(mean, simulate(everyone, step=2))


def test_what_is_no_communicator():
    with pytest.raises(TypeError, match=r"comm must be an mpi4py.MPI.Comm, .* got 'world'"):
        allreduce(torch.ones(3), "world")
    with pytest.raises(TypeError, match=r"comm must be an mpi4py.MPI.Comm, .* got tensor\("):
        allreduce(torch.ones(3), torch.ones(3))  # two tensors do not compare to one truth


@pytest.mark.usefixtures("several")
def test_an_error_leaves_horovod_in_step(rank):
    """Horovod names what its users do not by counting operations: all ranks must have started as
    many."""
    with pytest.raises((TypeError, AgreementError)):
        allreduce([1.0] if rank == 0 else torch.ones(5000))
    assert hvd.allreduce(torch.ones(1)).item() == 1
