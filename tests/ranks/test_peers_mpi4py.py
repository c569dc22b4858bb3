"""The cases of mpi4py's own tests of ``Allreduce`` (``test_cco_buf.py``), with ``allreduce`` in its
place: communicators, types, reductions, buffers, in place.
"""

from __future__ import annotations

import array
import os

import numpy as np
import pytest

from hvd_gqsgd import allreduce

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("needs mpirun", allow_module_level=True)

from mpi4py import MPI

pytestmark = pytest.mark.few

COMMS = {
    "self": lambda: MPI.COMM_SELF.Dup(),
    "world": lambda: MPI.COMM_WORLD.Dup(),
    "dup": lambda: MPI.COMM_WORLD.Dup().Dup(),
}
FLOATS, INTEGERS = "fd", "hil"


@pytest.fixture(params=COMMS)
def peers(request):
    comm = COMMS[request.param]()
    yield comm
    comm.Free()


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("exchange", ["allreduce", "two_phase"])
def test_sums(peers, code, exchange):
    """To a hundredth, as mpi4py has it."""
    size = peers.size
    sent = np.array(range(size), code)
    total = allreduce(sent, peers, MPI.SUM, bits=16, exchange=exchange)
    assert total.dtype == sent.dtype
    np.testing.assert_allclose(total, size * sent, rtol=1e-2, atol=1e-3 * size * size)


@pytest.mark.parametrize("code", FLOATS)
def test_in_place(peers, code):
    """With one to nine elements, which ranks fill with one number."""
    for count in range(1, 10):
        buffer = np.full(count, peers.rank, code)
        assert allreduce(buffer, peers, MPI.SUM, out=buffer, bits=16) is buffer
        expected = peers.size * (peers.size - 1) / 2
        np.testing.assert_allclose(buffer, expected, rtol=1e-2)


def test_no_elements(peers):
    assert allreduce(np.zeros(0), peers, MPI.SUM).size == 0


@pytest.mark.parametrize("op", [MPI.MAX, MPI.MIN, MPI.PROD])
def test_what_no_sum_of_codes_gives(peers, op):
    with pytest.raises(ValueError, match="op must be"):
        allreduce(np.ones(3), peers, op)


@pytest.mark.parametrize("code", INTEGERS)
def test_integers_are_refused(peers, code):
    with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64"):
        allreduce(np.ones(3, code), peers, MPI.SUM)


def test_other_buffers(peers):
    """Arrays and views of memory go by way of NumPy, which shares their memory."""
    buffer = array.array("f", range(8))
    for given in (buffer, memoryview(buffer)):
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor or a NumPy array"):
            allreduce(given, peers)
    shared = np.frombuffer(buffer, np.float32)
    allreduce(shared, peers, MPI.SUM, out=shared, bits=16)
    np.testing.assert_allclose(buffer, peers.size * np.arange(8), rtol=1e-2, atol=1e-2)


def test_every_other_element(peers):
    """What mpi4py's vectors of indices take, a view takes here."""
    buffer = np.arange(20, dtype=np.float64)
    allreduce(buffer[::2], peers, MPI.SUM, out=buffer[::2], bits=16)
    np.testing.assert_allclose(buffer[::2], peers.size * np.arange(0, 20, 2), rtol=1e-2, atol=0.01)
    assert (buffer[1::2] == np.arange(1, 20, 2)).all()


def test_null_is_no_communicator():
    with pytest.raises((TypeError, ValueError)):
        allreduce(np.ones(3), MPI.COMM_NULL)
