"""GlobalQSGD on GPUs, by whatever way Horovod was built for; ranks may share a GPU."""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, gradients, mlp
from torch import nn

from hvd_gqsgd import GlobalQSGD, simulate

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def gpu(rank: int) -> None:
    """This rank's."""
    torch.cuda.set_device(rank % torch.cuda.device_count())


@pytest.mark.parametrize("options", [{}, {"bits": 16}, {"dither": "exponential"}], ids=str)
def test_the_bits_of_the_cpu(rank, size, options):
    everyone = gradients(size, 50_000)
    compressor = GlobalQSGD(min_numel=1, **options)
    found = hvd.allreduce(everyone[rank].cuda(), name="gpu", compression=compressor)
    assert torch.equal(found.cpu(), simulate(everyone, **options))
    total = hvd.allreduce(everyone[rank].cuda(), name="sum", op=hvd.Sum, compression=compressor)
    assert torch.allclose(total.cpu(), everyone.sum(0), atol=everyone.abs().max() * size / 5)
    assert_same_on_all_ranks(total.cpu())


def test_an_overflow_on_one_rank_skips_the_step_on_all(rank, size):
    """With torch.amp.GradScaler, as its users write it for Horovod."""
    if size == 1:
        pytest.skip("Horovod's optimizer reduces nothing on one rank")
    model = mlp().cuda()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=GlobalQSGD(named_parameters=model.named_parameters()),
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for bad in (True, False):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            outputs = model(torch.randn(16, 64, device="cuda"))
        loss = nn.functional.cross_entropy(outputs.float(), torch.zeros(16).long().cuda())
        scaler.scale(loss * (torch.inf if bad and rank == size - 1 else 1.0)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == bad
        for parameter in model.parameters():
            assert_same_on_all_ranks(parameter.cpu())
