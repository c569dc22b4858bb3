"""The cases of PyTorch's own tests of DDP's communication hooks (``test_ddp_hooks.py``), with
``ddp_hook`` in the place of each hook. ``test_hook_citizen.py`` has what else a hook must bear.
"""

from __future__ import annotations

import os

import pytest
import torch
from conftest import process_group
from helpers import assert_same_on_all_ranks
from hooked import gradient, wrap
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from hvd_gqsgd import DDPState, GlobalQSGD, ddp_hook

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)

pytestmark = pytest.mark.few


class Powers(nn.Module):
    """A parameter times a power of the input that differs between ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(40, 20))

    def forward(self, x, rank):
        return self.weight * x ** (1 + rank)


def gradient_of(model, rank):
    torch.manual_seed(2020)
    model(torch.randn(40, 20), rank).mean().backward()
    return gradient(model)


@pytest.mark.parametrize("exchange", ["allreduce", "two_phase"])
@pytest.mark.parametrize("view", [False, True])
def test_close_to_no_hook(new_state, rank, exchange, view):
    """As close as the hooks that compress to fp16, or quantize, must be: to 1e-4."""
    exact = gradient_of(wrap(Powers()), rank)
    state = new_state(bits=16, exchange=exchange)
    found = gradient_of(wrap(Powers(), state, gradient_as_bucket_view=view), rank)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)
    assert_same_on_all_ranks(found)


def test_within_a_wrapper(new_state, rank):
    """Of PyTorch, which hands in buckets of half the bytes. (That for bfloat16 wants NCCL.)"""
    exact = gradient_of(wrap(Powers()), rank)
    model = wrap(Powers())
    model.register_comm_hook(new_state(bits=16), default_hooks.fp16_compress_wrapper(ddp_hook))
    found = gradient_of(model, rank)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-4)
    assert_same_on_all_ranks(found)


def test_the_last_bucket_is_known(new_state, rank):
    """All buckets of a deep model go through the hook, and the last one says that it is."""
    layers = [nn.Linear(2, 400, bias=False), *(nn.Linear(400, 400, bias=False) for _ in range(10))]
    model = DistributedDataParallel(
        nn.Sequential(*layers), process_group=process_group(), bucket_cap_mb=1
    )
    flags = []

    def hook(state: DDPState, bucket):
        flags.append(bucket.is_last())
        return ddp_hook(state, bucket)

    model.register_comm_hook(new_state(), hook)
    for _ in range(2):  # PyTorch makes buckets of this size in the second step
        flags.clear()
        model(torch.randn(10, 2)).sum().backward()
        assert flags[-1] and not any(flags[:-1])
    assert len(flags) > 3


def test_a_hook_is_registered_once(new_state):
    model = wrap(Powers(), new_state())
    with pytest.raises(RuntimeError, match="can only be called once"):
        model.register_comm_hook(new_state(), ddp_hook)


def test_no_hook_takes_another_state(rank):
    """PyTorch passes on whatever it is given: the hook says what it accepts."""
    model = wrap(Powers(), GlobalQSGD())
    with pytest.raises(TypeError, match="ddp_state"):
        gradient_of(model, rank)
