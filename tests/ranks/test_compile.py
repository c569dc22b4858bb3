"""Under ``torch.compile`` front ends are called and not traced, which would take minutes."""

from __future__ import annotations

import warnings

import horovod.torch as hvd
import pytest
import torch
from helpers import gradients

from hvd_gqsgd import GlobalQSGD, allreduce, simulate

pytestmark = pytest.mark.few


def test_calls(rank, size):
    from torch._dynamo.utils import counters  # takes seconds, which most jobs need not spend

    torch.compiler.reset()
    counters.clear()
    compressor = GlobalQSGD(min_numel=0)

    @torch.compile(backend="eager")
    def call(x):
        probe, context = compressor.compress(x * 2)
        return allreduce(x + 1, step=3), probe, context

    everyone = gradients(size, 5000)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mean, probe, context = call(everyone[rank])
    assert torch.equal(mean, simulate(everyone + 1, step=3))
    doubled = compressor.decompress(hvd.allreduce(probe, name="probe"), context)
    assert torch.equal(doubled, simulate(everyone * 2))
    # Under coverage they are 13.
    assert counters["frames"]["total"] < 16, dict(counters["frames"])
    reasons = [*(str(warning.message) for warning in said), *counters["graph_break"]]
    assert not [reason for reason in reasons if "hvd_gqsgd/engine" in reason], reasons
    torch.compiler.reset()
