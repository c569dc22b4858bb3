"""What the tests on several ranks share."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from torch import Tensor, nn


def gradients(size: int, numel: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gradients of all ranks, (size, numel), the same on every rank; heavy-tailed."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, numel, generator=generator, dtype=torch.float64)
    return (normal * torch.randn(numel, generator=generator, dtype=torch.float64).exp()).to(dtype)


def assert_same_on_all_ranks(tensor: Tensor) -> None:
    """Every rank must have the same bits."""
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    everyone = hvd.allgather(bits.unsqueeze(0), name="assert_same_on_all_ranks")
    assert (everyone == everyone[0]).all()


def bound(all_gradients: Tensor, levels: int, block_size: int | None = 1024) -> Tensor:
    """How far a decoded mean may be from the mean: one level of its block's norm."""
    wide = all_gradients.double()
    numel = wide.shape[1]
    block = block_size or max(numel, 1)
    padded = nn.functional.pad(wide.abs().amax(0), (0, -numel % block))
    norms = padded.view(-1, block).amax(1) if numel else padded
    return norms.repeat_interleave(block)[:numel] * (1 / levels + 1e-6)


def mlp(seed: int = 0, width: int = 96) -> nn.Sequential:
    """A small model, the same on every rank, with tensors above and below the default min_numel."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(),
                         nn.Linear(width, 10))  # fmt: skip


def batch(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    """One rank's inputs and labels."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return (
        torch.randn(16, 64, generator=generator),
        torch.randint(0, 10, (16,), generator=generator),
    )


def backward(model: nn.Module, rank: int, step: int = 0) -> None:
    """Leaves the gradients of one rank's batch in the model."""
    inputs, labels = batch(rank, step)
    nn.functional.cross_entropy(model(inputs), labels).backward()
