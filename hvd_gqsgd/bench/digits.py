"""The CNN of ``examples/digits_cnn.py``: a small model that computes, for ``bench auto``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BATCH", "Digits"]

BATCH = 16
"""Images of a rank."""


class Digits(nn.Module):
    """The loss of one batch of random images; its gradient differs between ranks.

    Args:
        rank: seed of the images.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        generator = torch.Generator().manual_seed(rank)
        self._images = torch.randn(BATCH, 1, 8, 8, generator=generator)
        self._labels = torch.randint(10, (BATCH,), generator=generator)
        self.slopes = {
            name: torch.randn(parameter.numel(), generator=generator)
            for name, parameter in self.named_parameters()
        }
        """Gradients for the exchange alone."""

    def forward(self, scale: Tensor) -> Tensor:
        """The loss times ``scale``."""
        return nn.functional.cross_entropy(self.layers(self._images), self._labels) * scale
