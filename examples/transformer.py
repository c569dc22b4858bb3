"""A small Transformer on the sources of Python's standard library, byte by byte: model, data and
optimizer of ``language.py``, ``language_elastic.py`` and ``fsdp_language.py``.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32, help="texts a step, over all ranks")
    parser.add_argument("--context", type=int, default=64, help="bytes of a text")
    parser.add_argument("--width", type=int, default=128, help="of the model; heads have 32")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1.2e-3, help="learning rate at its highest")
    parser.add_argument(
        "--validate", type=int, default=512, help="texts to validate on, over all ranks"
    )


def load_data(seed: int, most: int = 8 * 2**20) -> tuple[Tensor, Tensor]:
    """Bytes to train on and to validate on: modules of the standard library, without packages."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, file in enumerate(files):
        parts[i % 10 == seed % 10].append(file.read_bytes())
    train, validate = (np.frombuffer(b"".join(part)[:most], np.uint8).copy() for part in parts)
    return torch.from_numpy(train), torch.from_numpy(validate)


class Layer(nn.Module):
    """Causal attention and a perceptron, each with a normalization before it.

    Attention knows of places by ALiBi (arXiv 2108.12409), and so looks at what is near from the
    start.
    """

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.heads = width // 32
        places = torch.arange(context)
        distances = places[:, None] - places
        slopes = 2.0 ** (-8 * torch.arange(1, self.heads + 1) / self.heads)
        bias = (-slopes[:, None, None] * distances).masked_fill(distances < 0, -math.inf)
        self.bias: Tensor
        self.register_buffer("bias", bias, persistent=False)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, 32)
        bias = self.bias[:, :length, :length]
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=bias)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Tells the next byte from the ones before."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.layers = nn.Sequential(*(Layer(width, context) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.bytes(text))))


def cross_entropy(model: nn.Module, texts: Tensor) -> Tensor:
    """Of each byte but the first, given those before it: its mean, in nats."""
    return F.cross_entropy(model(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten())


def draw(data: Tensor, count: int, context: int) -> Tensor:
    """Texts from anywhere, of one byte more than the model reads."""
    starts = torch.randint(len(data) - context, (count, 1))
    return data[starts + torch.arange(context + 1)].long()


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0.01)


def make_schedule(args: argparse.Namespace, optimizer: Any) -> torch.optim.lr_scheduler.OneCycleLR:
    """A learning rate that rises for a tenth of the steps, and then falls."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, args.steps, pct_start=0.1, cycle_momentum=False
    )
