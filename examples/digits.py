"""What the digits examples share: scikit-learn's handwritten digits, and a small CNN for them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """1797 images of 8 x 8 pixels; a quarter of them, the same on all ranks, is to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def make_model(width: int = 128) -> nn.Module:
    """GlobalQSGD compresses tensors of 4096 elements and more: two here, 99 % of the model.

    Args:
        width: of the hidden layer, which has most of the parameters.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def distorted(images: Tensor) -> Tensor:
    """Every image turned, moved and scaled a little, so that no two epochs see the same."""
    count = len(images)
    angle, scale, right, down = 2 * torch.rand(4, count) - 1  # from -1 to 1
    angle, scale, right, down = 0.2 * angle, 1 + 0.15 * scale, 0.25 * right, 0.25 * down
    sine, cosine = scale * angle.sin(), scale * angle.cos()
    matrix = torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    model.eval()
    return (model(images).argmax(dim=1) == labels).double().mean().item()
