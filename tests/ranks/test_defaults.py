"""PyTorch's default device and type, as users set them for models, are not for our tensors."""

from __future__ import annotations

from collections.abc import Iterator

import horovod.torch as hvd
import pytest
import torch
from conftest import process_group
from helpers import gradients

from hvd_gqsgd import DynamicBits, GlobalQSGD, allreduce, simulate

OPTIONS = [
    {}, {"exchange": "two_phase"}, {"dither": "exponential"}, {"norm": "l2"},
    {"bits": DynamicBits(8), "block_size": None},
]  # fmt: skip

pytestmark = pytest.mark.few


@pytest.fixture
def others() -> Iterator[None]:
    """A default device without memory, and another default type."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_allreduce(rank, size, comm, options, request):
    everyone = gradients(size, 5000)
    mean = simulate(everyone, step=3, **options)
    request.getfixturevalue("others")
    assert torch.equal(simulate(everyone, step=3, **options), mean)
    assert torch.equal(allreduce(everyone[rank], comm, step=3, **options), mean)
    array = allreduce(everyone.numpy()[rank], comm, step=3, **options)
    assert torch.equal(torch.from_numpy(array), mean)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_compressor_and_hook(rank, size, options, request):
    everyone = gradients(size, 5000)
    mean = simulate(everyone, **options)
    group = process_group() if hvd.mpi_enabled() else None
    request.getfixturevalue("others")
    compressor = GlobalQSGD(min_numel=0, **options)
    assert torch.equal(hvd.allreduce(everyone[rank], compression=compressor), mean)
    if group is not None:
        state = GlobalQSGD(min_numel=0, **options).ddp_state(group)
        buffer = everyone[rank].clone()
        assert torch.equal(state.average(buffer, first=True).wait(), mean)
        state.close()
