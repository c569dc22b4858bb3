"""Under ``torch.compile`` front ends are called and not traced, which would take minutes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import horovod.torch as hvd
import pytest
import torch
import torch._dynamo
from helpers import gradients
from torch._dynamo.utils import counters

from hvd_gqsgd import GlobalQSGD, allreduce, simulate

pytestmark = pytest.mark.few


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What Dynamo warns of meanwhile, and why it breaks graphs."""
    torch.compiler.reset()
    counters.clear()
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
        lines += [str(warning.message) for warning in caught]
    torch.compiler.reset()


def check(said):
    """Nothing was traced within the package."""
    reasons = [*said, *counters["graph_break"]]
    assert not [reason for reason in reasons if "hvd_gqsgd/engine" in reason], reasons
    assert counters["frames"]["total"] < 60, dict(counters["frames"])


def test_calls(rank, size, said):
    compressor = GlobalQSGD(min_numel=0)

    @torch.compile(backend="eager")
    def call(x):
        probe, context = compressor.compress(x * 2)
        return allreduce(x + 1, step=3), probe, context

    everyone = gradients(size, 5000)
    mean, probe, context = call(everyone[rank])
    assert torch.equal(mean, simulate(everyone + 1, step=3))
    doubled = compressor.decompress(hvd.allreduce(probe, name="probe"), context)
    assert torch.equal(doubled, simulate(everyone * 2))
    assert counters["frames"]["total"] < 12, dict(counters["frames"])
    check(said)
