"""The transports for tensors on GPUs, with tensors of the host in their place: copied to the host's
memory and back, and over NCCL, which MPI stands in for; see ``emulated_cuda``.
"""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
import torch
from conftest import process_group
from helpers import assert_same_on_all_ranks, gradients

from hvd_gqsgd import AgreementError, BlockBits, simulate
from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd.codecs import CodeKind
from hvd_gqsgd.engine.agreement import Ahead, WithNorms
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.options import Options
from hvd_gqsgd.transports.horovod import HorovodTransport
from hvd_gqsgd.transports.host_staging import StagedTransport
from hvd_gqsgd.transports.nccl import NcclTransport
from hvd_gqsgd.transports.torch_distributed import TorchDistributedTransport

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)

from emulated_cuda.build import load_kernels, load_nccl
from mpi4py import MPI

from hvd_gqsgd.transports.mpi import MpiTransport

pytestmark = pytest.mark.few
CPU = torch.device("cpu")
OPTIONS = [
    {},
    {"bits": 4, "seed": -3},
    {"bits": 6, "block_size": 1500, "correlated": False},
    {"bits": 16, "block_size": None},
    {"norm": "l2"},
    {"exchange": "two_phase"},
    {"exchange": "two_phase", "bits": 5, "block_size": 7},
    {"dither": "exponential"},
    {"dither": "exponential", "bits": 4, "norm": "l2", "block_size": 64},
]


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest) -> type:
    """The class that is NCCL's on a GPU; rank 0 compiles it for all."""
    cache = request.config.cache.mkdir("emulated-cuda")
    shown = subprocess.run(["mpicxx", "-show"], capture_output=True, text=True, check=True).stdout
    for turn in (True, False):
        if turn == (MPI.COMM_WORLD.Get_rank() == 0):
            load_kernels(cache)
            load_nccl(cache, tuple(shlex.split(shown)[1:]))
        MPI.COMM_WORLD.Barrier()
    return torch.classes.hvd_gqsgd_emulated.NcclCommunicator


@pytest.fixture
def nccl(emulated: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the place of NCCL."""
    monkeypatch.setattr(native_nccl, "unique_id", torch.ops.hvd_gqsgd_emulated.nccl_unique_id)
    monkeypatch.setattr(native_nccl, "communicator", emulated)


@pytest.fixture(params=["horovod", "mpi", "torch"])
def base(request: pytest.FixtureRequest) -> object:
    """Transports for the host."""
    if request.param == "horovod":
        return HorovodTransport()
    if request.param == "mpi":
        return MpiTransport(MPI.COMM_WORLD)
    return TorchDistributedTransport(process_group())


@pytest.fixture(params=["nccl", "staged"])
def transport(request: pytest.FixtureRequest, base: object) -> object:
    """Transports for GPUs on top of them."""
    if request.param == "staged":
        return StagedTransport(base, staged=lambda tensor: tensor.numel() > 16)  # no header
    request.getfixturevalue("nccl")
    return NcclTransport(base, CPU)


def exchange(transport, x, ahead=True, **options):
    """What ``hvd_gqsgd.allreduce`` does with a tensor."""
    pipeline = Pipeline(Options(**options), transport, protocol=Ahead if ahead else WithNorms)
    ticket = pipeline.submit(x, scale=1 / transport.size)
    pipeline.wait(ticket)
    return pipeline.decode(ticket, 1 / transport.size)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bits_of_simulate(rank, size, transport, options):
    if options.get("exchange") != "two_phase" and size > 2 ** (options.get("bits", 8) - 1) - 1:
        pytest.skip("too many ranks for these lanes")
    for numel in (0, 1, 2500, 30_001):
        everyone = gradients(size, numel)
        mean = exchange(transport, everyone[rank], **options)
        assert torch.equal(mean, simulate(everyone, **options)), numel
        assert_same_on_all_ranks(mean)


@pytest.mark.parametrize("options", [
    {}, {"bits": 5, "exchange": "allreduce"}, {"bits": BlockBits(4)}, {"norm": "l2"},
    {"dither": "exponential"},
], ids=str)  # fmt: skip
def test_by_node(rank, size, transport, options):
    """The Alltoalls among some ranks, with parts of different lengths."""
    if size < 3:
        pytest.skip("needs two nodes, one of them with two ranks")
    nodes = (size // 2, size - size // 2)
    for numel in (0, 1, 2500, 30_001):
        everyone = gradients(size, numel)
        mean = exchange(transport, everyone[rank], hierarchy=nodes, **options)
        assert torch.equal(mean, simulate(everyone, hierarchy=nodes, **options)), numel
        assert_same_on_all_ranks(mean)


@pytest.mark.parametrize("bits", [8, 5])
def test_gathered_tensors(rank, size, transport, bits):
    """As FSDP's weights are: on this transport the bits that all others have."""
    if size == 1:
        pytest.skip("one rank gathers nothing")
    everyone = gradients(size, 30_001)
    kept = torch.arange(7, dtype=torch.int16) + everyone[:, :7].to(torch.int16)
    found = []
    for each in (transport, TorchDistributedTransport(process_group())):
        pipeline = Pipeline(Options(bits=bits, exchange="gather"), each, protocol=Ahead)
        pipeline.begin_step(3)
        outs = torch.empty(size, 30_001), torch.empty(size, 7, dtype=torch.int16)
        tickets = [
            pipeline.submit(x, scale=1.0, out=out)
            for x, out in zip((everyone[rank], kept[rank]), outs, strict=True)
        ]
        for ticket in tickets:
            pipeline.wait(ticket)
            pipeline.decode(ticket, 1.0)
        assert torch.equal(outs[1], kept)
        found.append(outs[0])
    assert torch.equal(*found)
    assert_same_on_all_ranks(found[0])
    assert (found[0] - everyone).abs().max() <= everyone.abs().max() / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(rank, size, transport, dtype):
    everyone = gradients(size, 5000, dtype=dtype)
    assert torch.equal(exchange(transport, everyone[rank]), simulate(everyone))


def test_bad_elements_come_through(rank, size, transport):
    """NaN and infinity on one rank make their blocks NaN on all."""
    x = torch.ones(4096)
    if rank == size - 1:
        x[5], x[1030] = torch.nan, -torch.inf
    mean = exchange(transport, x)
    assert mean[:2048].isnan().all()
    assert (mean[2048:] == 1).all()


def test_disagreement(rank, size, transport):
    """Nothing is started over NCCL before all ranks have agreed."""
    if size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(AgreementError, match="different options"):
        exchange(transport, torch.ones(3000), bits=8 if rank == 0 else 16)
    assert torch.equal(exchange(transport, torch.ones(3000)), torch.ones(3000))


def test_staged_horovod_optimizer(rank, size):
    """As GlobalQSGD takes it where Horovod has no NCCL: norms, agreement and all are copied."""
    transport = StagedTransport(HorovodTransport(), staged=lambda tensor: True)
    everyone = gradients(size, 5000)
    mean = exchange(transport, everyone[rank], ahead=False)
    assert torch.equal(mean, simulate(everyone))


def test_nccl_that_does_not_start(rank, base, nccl, monkeypatch):
    """Rank 0's error is known to all."""

    def fail():
        raise RuntimeError("ncclGetUniqueId failed: out of luck")

    if rank == 0:
        monkeypatch.setattr(native_nccl, "unique_id", fail)
    told = "out of luck" if rank == 0 else "could not be initialized on rank 0"
    with pytest.raises(RuntimeError, match=told):
        exchange(NcclTransport(base, CPU), torch.ones(3000))


def test_a_communicator_checks_its_arguments(rank, size, nccl):
    group = NcclTransport(MpiTransport(MPI.COMM_WORLD), CPU).nccl.connect()
    x, words = torch.ones(3000), torch.ones(750, dtype=torch.int32)
    norms = torch.ones(3, dtype=torch.int32)
    block, rest = 1024, (0, 0, 0, True, 1.0)  # seed, step, tensor, correlated, scale
    place = (block, CodeKind.LINEAR, 8, 1, *rest)
    for call, error, match in [
        (lambda: group.max(x), TypeError, "must be Int or Long, got Float"),
        (lambda: group.sum(words[::2]), ValueError, "must be contiguous"),
        (lambda: group.all_to_all(words, words, *[[1] * (size + 1)] * 2), ValueError, "one a rank"),
        (lambda: group.all_to_all(words, words, *[[-1] * size] * 2), ValueError, "0, got -1"),
        (lambda: group.all_to_all(words, words, [0] * size, [1]), ValueError, "one a rank"),
        (lambda: group.all_gather(words, words, [7] * size), ValueError, "from must have 7 el"),
        (lambda: group.allreduce(x, x, norms, None, words[1:], *place), ValueError, "words must"),
        (lambda: group.allreduce(x, x.double(), norms, None, words, *place), TypeError, "out mu"),
        (lambda: group.allreduce(x, x, norms, norms, words, *place), TypeError, "squares must"),
        (
            lambda: group.allreduce(x, x, norms, None, words, block, 3, 8, 1, *rest),
            ValueError,
            "kind must be 0 .linear. or 1 .exponential. or 2 .nearest., got 3",
        ),
        (
            lambda: group.allreduce(
                x, x, norms, None, words, block, CodeKind.EXPONENTIAL, 8, 127, *rest
            ),
            ValueError,
            "kind must be one of codes that can be added, got 1 .exponential.",
        ),
        (
            lambda: native_nccl.communicator(torch.zeros(128, dtype=torch.uint8), size, size, CPU),
            ValueError,
            f"rank must be from 0 to {size - 1}, got {size}",
        ),
        (
            lambda: native_nccl.communicator(torch.zeros(128, dtype=torch.uint8), rank, size, CPU),
            RuntimeError,
            "ncclCommInitRank failed: system error; MPI has failed",
        ),
    ]:
        with pytest.raises(error, match=match):
            call()
    group.close()
    with pytest.raises(RuntimeError, match="was closed"):
        group.sum(words)
