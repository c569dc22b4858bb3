"""Errors of one rank, before its first message and between two: the others are told, and go on."""

from __future__ import annotations

import functools
import os

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from conftest import process_group
from helpers import assert_same_on_all_ranks, gradients
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hvd_gqsgd import AgreementError, GlobalQSGD, allreduce, simulate
from hvd_gqsgd._native import ops

pytestmark = pytest.mark.timeout(60)


def next_one_is_right(rank, size, comm):
    everyone = gradients(size, 5000)
    assert torch.equal(allreduce(everyone[rank], comm, step=2), simulate(everyone, step=2))


@functools.cache
def mesh() -> DeviceMesh:
    process_group()
    return init_device_mesh("cpu", (hvd.size(),))


def distributed(x, comm):
    from torch.distributed.tensor import DTensor, Replicate  # takes a second

    return allreduce(DTensor.from_local(x, mesh(), [Replicate()], run_check=False), comm)


def within(transform):
    return lambda x, comm: transform(lambda row: allreduce(row, comm).sum())(x)


def faked(call):
    def within_mode(x, comm):
        from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

        with FakeTensorMode(allow_non_fake_inputs=True):
            call(x, comm)

    return within_mode


# What rank 0 does with a tensor of 5000 ones, the error, and its text.
TENSORS = {
    "DTensor": (distributed, TypeError, r"plain tensor, got a .*DTensor.*: pass its to_local\(\)"),
    "vmap": (within(torch.func.vmap), TypeError, r"within torch\.func .*: call this outside"),
    "grad": (within(torch.func.grad), TypeError, r"within torch\.func .*: call this outside"),
    "fake": (faked(allreduce), TypeError, r"plain tensor, got a .*FakeTensor"),
    "fake array": (
        lambda x, comm: faked(allreduce)(x.numpy(), comm), TypeError, "plain tensor, got a .*Fake",
    ),
    "meta": (lambda x, comm: allreduce(x.to("meta"), comm), NotImplementedError, "x is on meta"),
    "nested": (
        lambda x, comm: allreduce(torch.nested.nested_tensor([x], layout=torch.strided), comm),
        TypeError, "layout nested",
    ),
    "masked": (
        lambda x, comm: allreduce(np.ma.masked_array(x.numpy(), x.numpy() > 0), comm),
        TypeError, r"x must not be a masked array.*filled\(0\)",
    ),
    "masked out": (
        lambda x, comm: allreduce(x.numpy(), comm, out=np.ma.masked_array(x.numpy(), False)),
        TypeError, "out must not be a masked array",
    ),
    "expanded": (
        lambda x, comm: allreduce(x, comm, out=torch.ones(1).expand(5000)),
        ValueError, r"out must have memory for each element.*pass its clone\(\)",
    ),
    "sparse out": (
        lambda x, comm: allreduce(x, comm, out=x.to_sparse()), TypeError, "out must be dense",
    ),
}  # fmt: skip


@pytest.mark.few
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_without_plain_memory(rank, size, comm, name):
    call, kind, message = TENSORS[name]
    if name == "DTensor":
        if "OMPI_COMM_WORLD_SIZE" not in os.environ:
            pytest.skip("the process group is under mpirun")
        mesh()  # on all ranks
    x = torch.ones(5000)
    if rank == 0:
        with pytest.raises(kind, match=message):
            call(x, comm)
    else:
        with pytest.raises(AgreementError, match="could not take part"):
            allreduce(x, comm)
    next_one_is_right(rank, size, comm)


STAGES = {
    "norms": ("block_max_each", {"exchange": "two_phase"}),
    "squares": ("block_squares", {"norm": "l2"}),
    "l2 norms": ("l2_norms", {"norm": "l2", "dither": "exponential"}),
    "codes": ("quantize_each", {"norm": "l2"}),
    "codes in two phases": ("quantize_each", {"dither": "exponential"}),
    "means": ("requantize_each", {"exchange": "two_phase"}),
}
"""Native calls between two messages, and options with which they are made over MPI too."""


def fails(*arguments):
    raise MemoryError("on purpose")


@pytest.mark.few
@pytest.mark.parametrize("name", STAGES)
def test_an_error_between_two_messages(rank, size, comm, name, monkeypatch):
    """As of memory that runs out, on the last rank alone."""
    stage, options = STAGES[name]
    if rank == size - 1:
        monkeypatch.setattr(ops, stage, fails)
    x = gradients(size, 5000)[rank]
    with pytest.raises(MemoryError if rank == size - 1 else AgreementError):
        allreduce(x, comm, **options)
    monkeypatch.undo()
    next_one_is_right(rank, size, comm)


@pytest.mark.few
@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("options", [{}, {"exchange": "two_phase"}], ids=str)
@pytest.mark.parametrize("stage", ["block_max_each", "quantize_each"])
def test_an_error_in_a_compressor_s_step(rank, size, options, stage, monkeypatch):
    """The step is lost on all ranks, and the next one is right."""
    compressor = GlobalQSGD(**options)
    if rank == size - 1:
        monkeypatch.setattr(ops, stage, fails)
    everyone = gradients(size, 5000)
    with pytest.raises(MemoryError if rank == size - 1 else AgreementError):
        hvd.allreduce(everyone[rank], name="fails", compression=compressor)
    monkeypatch.undo()
    mean = hvd.allreduce(everyone[rank], name="works", compression=compressor)
    assert_same_on_all_ranks(mean)
    assert torch.equal(mean, simulate(everyone, step=1, **options))


@pytest.mark.parametrize("gradients", [
    torch.ones(3, 50).to_sparse(), torch.ones(3, 50, device="meta"),
    np.ma.masked_array(np.ones((3, 50)), False),
], ids=["sparse", "meta", "masked"])  # fmt: skip
def test_simulate_says_what_it_takes(gradients):
    with pytest.raises((TypeError, NotImplementedError), match=r"gradients (must|is on meta)"):
        simulate(gradients)


@pytest.mark.few
def test_a_matrix_stays_one(rank, size, comm):
    everyone = gradients(size, 6000).view(size, 60, 100)
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(everyone[rank].numpy())
    mean = allreduce(matrix, comm, step=1)
    assert isinstance(mean, np.matrix)
    assert np.array_equal(mean, simulate(everyone.flatten(1), step=1).view(60, 100))
