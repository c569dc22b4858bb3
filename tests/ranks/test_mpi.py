"""What MPI alone has: communicators of all kinds, errors, and codes that MPI itself adds."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_same_on_all_ranks, gradients

from hvd_gqsgd import allreduce, build_info, simulate
from hvd_gqsgd._native import mpi as native_mpi
from hvd_gqsgd.options import digest
from hvd_gqsgd.reference import combine as reference_combine
from hvd_gqsgd.reference.kinds import EXPONENTIAL, Code, exponential, linear

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("needs MPI", allow_module_level=True)

from mpi4py import MPI

COMBINED = {"dither": "exponential", "exchange": "reduce_scatter"}


def test_the_native_part_is_in_use():
    assert "mpi" in build_info()["parts"]
    assert native_mpi.usable_with(MPI.Get_library_version())


@pytest.mark.few
@pytest.mark.parametrize("options", [{}, {"exchange": "two_phase"}], ids=str)
def test_communicators(rank, size, options):
    """Halves of the ranks, in reverse order, each with an exchange of its own."""
    world = MPI.COMM_WORLD
    half = world.Split(color=rank % 2, key=-rank)
    everyone = gradients(half.size, 5000, seed=rank % 2)
    mean = simulate(everyone, step=0, **options)
    assert torch.equal(allreduce(everyone[half.rank], half, step=0, **options), mean)
    group = half.group.Incl([0])
    first = half.Create(group)
    if first != MPI.COMM_NULL:
        alone = allreduce(everyone[half.rank], first, step=0, **options)
        assert torch.equal(alone, simulate(everyone[half.rank][None], step=0, **options))
        first.Free()
    cartesian = world.Create_cart([size])
    everyone = gradients(size, 5000)
    mean = simulate(everyone, step=0, **options)
    assert torch.equal(allreduce(everyone[cartesian.rank], cartesian, step=0, **options), mean)
    for comm in (cartesian, half):
        comm.Free()
    assert torch.equal(allreduce(everyone[rank], world, step=0, **options), mean)


@pytest.mark.few
def test_a_duplicate_counts_for_itself(rank, size):
    everyone = gradients(size, 5000)
    comm = MPI.COMM_WORLD.Dup()
    allreduce(everyone[rank], comm)
    again = comm.Dup()
    assert torch.equal(allreduce(everyone[rank], again), simulate(everyone, step=0))
    assert torch.equal(allreduce(everyone[rank], comm), simulate(everyone, step=1))
    again.Free()
    comm.Free()


@pytest.mark.few
def test_between_collectives_of_the_user(rank, size):
    """One that was started before and one after; MPI matches them by their order."""
    everyone = gradients(size, 5000)
    sums = [torch.ones(100), torch.ones(100)]
    requests = [MPI.COMM_WORLD.Iallreduce(MPI.IN_PLACE, sums[0].numpy(), MPI.SUM)]
    mean = allreduce(everyone[rank], MPI.COMM_WORLD, step=0)
    requests.append(MPI.COMM_WORLD.Iallreduce(MPI.IN_PLACE, sums[1].numpy(), MPI.SUM))
    MPI.Request.Waitall(requests)
    assert torch.equal(mean, simulate(everyone))
    assert all((x == size).all() for x in sums)


@pytest.mark.usefixtures("several")
def test_intercommunicators_are_refused(rank, size):
    half = MPI.COMM_WORLD.Split(color=rank % 2)
    between = half.Create_intercomm(0, MPI.COMM_WORLD, 1 - rank % 2)
    for comm in (between, MPI.COMM_NULL):
        with pytest.raises(ValueError, match="comm must be an intracommunicator"):
            allreduce(torch.ones(3), comm)
    between.Free()
    half.Free()


CODE = linear(8, 15)


def native(x, out, comm, code=CODE, chunk=1024, block=1024):
    native_mpi.allreduce(x, out, comm, block, *code, 0, 0, 0, True, 1.0, chunk)


@pytest.mark.few
def test_errors_of_the_native_op(size):
    x, world = torch.ones(5), MPI.COMM_WORLD.py2f()
    with pytest.raises(RuntimeError, match="MPI_Comm_size failed: MPI_ERR_COMM"):
        native(x, x, MPI.COMM_NULL.py2f())
    for message, arguments in {
        "bits must be from 2 to 16, got 17": {"code": linear(17, 1)},
        "levels must be from 1 to 15 for linear codes of 5 bits, got 0": {"code": linear(5, 0)},
        "levels must be from 1 to 127 for linear codes of 8 bits, got 200": {
            "code": linear(8, 200)
        },
        "levels must be 127 for exponential codes of 8 bits, got 0": {
            "code": Code(EXPONENTIAL, 8, 0)
        },
        "bits must be 4 or 8 for exponential codes, got 5": {"code": exponential(5)},
        "kind must be 0 .linear. or 1 .exponential. or 2 .nearest., got 3": {"code": Code(3, 8, 1)},
        "chunk must be from 1": {"chunk": 0},
        "block_size must be at least 1, got 0": {"block": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            native(x, x, world, **arguments)
    with pytest.raises(ValueError, match="out must have 5 elements, got 4"):
        native(x, x[:4].clone(), world)
    if size > 1:
        with pytest.raises(ValueError, match=f"at most 1 ranks .* and 127 levels, got {size}"):
            native(x, x, world, linear(8, 127))


@pytest.mark.few
@pytest.mark.parametrize("chunk", [1, 1000, 2**18])
def test_chunks_of_any_size(rank, size, chunk, monkeypatch):
    everyone = gradients(size, 20_000)
    monkeypatch.setattr(native_mpi, "CHUNK", chunk)
    assert torch.equal(allreduce(everyone[rank], MPI.COMM_WORLD, step=0), simulate(everyone))


@pytest.mark.few
def test_threads(rank, size, thread_count):
    thread_count(2)
    everyone = gradients(size, 400_000)
    mean = allreduce(everyone[rank], MPI.COMM_WORLD, step=0)
    assert torch.equal(mean, simulate(everyone))


# --- codes that are combined by an operator of our own --------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("numel", [0, 1, 3, 1023, 70_001])
@pytest.mark.parametrize("block_size", [1024, 100, None])
def test_combined_codes_agree_and_repeat(rank, size, bits, numel, block_size, several):
    if bits == 4 and size > 7:
        pytest.skip("no levels left")
    everyone = gradients(size, numel)
    options = {"bits": bits, "block_size": block_size, "seed": 3, **COMBINED}
    result = allreduce(everyone[rank], MPI.COMM_WORLD, step=4, **options)
    assert_same_on_all_ranks(result)
    again = allreduce(everyone[rank], MPI.COMM_WORLD, step=4, **options)
    assert torch.equal(result, again)
    if size <= 2 and 0 < numel < 5000:  # there is but one way to add them
        tensor_id = digest((0, 0, numel, "torch.float32"))
        expected = reference_combine.combined_mean(
            everyone.numpy(), list(range(size)), bits=bits, block_size=block_size,
            correlated=True, seed=3, step=4, tensor_id=tensor_id,
        )  # fmt: skip
        assert torch.equal(result, torch.from_numpy(expected))


@pytest.mark.few
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_combined_codes_of_all_types(rank, size, dtype):
    everyone = gradients(size, 3000, dtype=dtype)
    result = allreduce(everyone[rank], MPI.COMM_WORLD, **COMBINED)
    assert_same_on_all_ranks(result)
    error = (result.double() - everyone.double().mean(0)).norm() / everyone.double().norm()
    assert error < 0.5


@pytest.mark.parametrize("equal", [True, False])
def test_combined_codes_are_unbiased(rank, size, equal):
    """Over 300 steps, along three directions. Student's t with 299 degrees of freedom is beyond 6
    in 5 of 10^9 cases. The control: sums that always go down."""
    trials = 300
    everyone = gradients(size, 4096)
    if equal:  # the largest sums that there are
        everyone[:] = everyone[0]
    mean = everyone.double().mean(0)
    directions = torch.stack([torch.ones_like(mean), mean.sign(), mean]).double()
    results = [
        allreduce(everyone[rank], MPI.COMM_WORLD, step=step, **COMBINED).double()
        for step in range(trials)
    ]

    def worst(means):
        along = (torch.stack(means) - mean) @ directions.t()
        return (along.mean(0).abs() / (along.std(0) + 1e-30) * trials**0.5).max()

    assert worst(results) < 6
    down = [2.0 ** result.abs().log2().floor() * result.sign() for result in results]
    if size > 1:
        assert worst(down) > 60


def test_combined_codes_that_are_not_finite(rank, size, several):
    x = torch.ones(5000)
    x[2000] = torch.inf if rank == size - 1 else 1
    result = allreduce(x, MPI.COMM_WORLD, **COMBINED)
    assert torch.equal(result.isnan().nonzero().view(-1), torch.arange(1024, 2048))


def test_combined_codes_need_room(rank, size):
    if size < 8:
        pytest.skip("needs 8 ranks")
    with pytest.raises(ValueError, match="bits=4 is for at most 7 ranks, got 8"):
        allreduce(torch.ones(9), MPI.COMM_WORLD, bits=4, **COMBINED)
