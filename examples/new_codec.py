"""A new codec in one file: the idea, its error on recorded gradients, and trainings with it.

    python examples/new_codec.py                       # all ranks in this process, within a minute
    mpirun -n 2 python examples/new_codec.py --ranks   # the last cell, on real ranks

``hvd_gqsgd/docs/RESEARCH.md`` walks through the cells, which begin with ``# %%``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from digits import distorted, load_data, make_model
from torch import Tensor
from torch.nn import functional as F

from hvd_gqsgd import GlobalQSGD, simulate
from hvd_gqsgd.bench.trainer import Training, train
from hvd_gqsgd.codecs import PlainCodec, register_codec
from hvd_gqsgd.options import Options

RANKS, STEPS = 4, 100
REAL = "--ranks" in sys.argv

# %% 1. The idea. Most elements of a gradient are far smaller than the norm, the largest of their
# block. Linear codes have even levels up to it; those of this codec are +-(k / s)^2, dense around
# zero. An element between two levels takes the upper one as often as makes it right on average.
# Once the class is registered, its name is a value of the option ``dither``.


class QuadraticCodec(PlainCodec):
    """Levels that are squares."""

    def grid(self) -> Tensor:
        """The levels, as shares of a norm; ``self.levels`` is s, 7 in lanes of 4 bits."""
        k = torch.arange(-self.levels, self.levels + 1) / self.levels
        return k * k.abs()

    def round(self, shares: Tensor, dither: Tensor) -> Tensor:
        """A code is a level's place in the grid."""
        grid = self.grid().to(shares)
        below = (torch.searchsorted(grid, shares, right=True) - 1).clamp(max=len(grid) - 2)
        up = (shares - grid[below]) / (grid[below + 1] - grid[below])
        return below + (dither < up)

    def values(self, codes: Tensor) -> Tensor:
        """The level of each code."""
        return self.grid().to(codes.device)[codes]


class NearestCodec(QuadraticCodec):
    """The same levels without chance: what tests of unbiasedness must refuse."""

    def round(self, shares: Tensor, dither: Tensor) -> Tensor:
        return super().round(shares, torch.full_like(dither, 0.5))


NAMES = register_codec("quadratic", QuadraticCodec), register_codec("nearest", NearestCodec)

# %% A tiny training: a CNN on handwritten digits. Each rank draws images of its own in each step.

IMAGES, TEST = load_data(seed=0)


def make_training() -> Training:
    """Begins anew, always the same."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)

    def loss(step: int, rank: int) -> Tensor:
        torch.manual_seed(1 + step * 64 + rank)
        images, labels = IMAGES[torch.randint(len(IMAGES), (16,))]
        return F.cross_entropy(model(distorted(images)), labels)

    def evaluate() -> float:
        with torch.no_grad():
            return F.cross_entropy(model(TEST.tensors[0]), TEST.tensors[1]).item()

    return Training(model, optimizer, schedule, STEPS, loss, "test loss", evaluate)


# %% 2. Record the gradients of all ranks, here those of the last step in float32. The file has a
# tensor of shape (ranks, ...) for each parameter, as `hvd-gqsgd bench frontier FILE` takes it.

if not REAL:
    with tempfile.TemporaryDirectory() as folder:
        train(exact := make_training(), RANKS, None, record := Path(folder, "gradients.pt"))
        recorded = [rows.flatten(1) for rows in torch.load(record, weights_only=True)]
    large = [rows for rows in recorded if rows[0].numel() >= 4096]  # others are not compressed
    rows = max(large, key=Tensor.numel)[:, :32_768]  # enough to measure errors

# %% Is it unbiased? Each step has a dither of its own, so the average over T steps has the error of
# one step times sqrt(1 / T). Without chance the error stays: the check can fail.
# The error at equal bytes: in two phases, lanes of as many bits are as many bytes.

SETTINGS = {f"{dither}, {bits} bits": {"bits": bits, "dither": dither, "exchange": "two_phase"}
            for bits in (4, 8) for dither in ("linear", NAMES[0])}  # fmt: skip


def error(steps: int = 1, **options: Any) -> float:
    """The relative error of the average over some steps."""
    mean = rows.mean(0)
    means = [simulate(rows, step=step, **options) for step in range(steps)]
    return float((torch.stack(means).mean(0) - mean).norm() / mean.norm())


if not REAL:
    print("error of the average over 64 steps, to that of one step: 0.125 if unbiased")
    left = {name: error(64, bits=4, dither=name) / error(bits=4, dither=name) for name in NAMES}
    print("".join(f"  {name:<11}{ratio:.3f}\n" for name, ratio in left.items()))
    assert left["quadratic"] < 0.15 < 0.9 < left["nearest"]
    print(f"relative error of the mean of {RANKS} ranks")
    print("".join(f"  {name:<19}{error(**SETTINGS[name]):.3f}\n" for name in SETTINGS))

# %% 3. Train with it. All ranks are in this process; their means have the bits of real ranks' ones.

if not REAL:
    elements = sum(rows[0].numel() for rows in large)
    print(f"{f'{STEPS} steps':<21}{'test loss':>9}{'bytes a step':>15}{'squared error':>16}")
    print(f"  {'fp32':<19}{exact.evaluate():>9.4f}{4 * elements:>15,}")
    for name in ("linear, 4 bits", "quadratic, 4 bits"):
        bits, off = train(training := make_training(), RANKS, Options(**SETTINGS[name]))
        print(f"  {name:<19}{training.evaluate():>9.4f}{bits * elements / 8:>15,.0f}{off:>16.3f}")

# %% 4. Real ranks, under Horovod: the option is the only change.

if REAL:
    import horovod.torch as hvd
    from common import replica_difference

    hvd.init()
    training, compressor = make_training(), GlobalQSGD(bits=4, dither=NAMES[0])
    sgd, named = training.optimizer, training.model.named_parameters()
    optimizer = hvd.DistributedOptimizer(sgd, named, compression=compressor)
    for step in range(STEPS):
        optimizer.zero_grad()
        training.loss(step, hvd.rank()).backward()
        optimizer.step()
    assert replica_difference(training.model) == 0
    if hvd.rank() == 0:
        print(f"test loss {training.evaluate():.4f}, the same on {hvd.size()} ranks")
        print(compressor.stats())
