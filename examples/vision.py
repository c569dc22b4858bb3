"""Vision: trains a small residual network on scikit-learn's handwritten digits.

    mpirun -n 4 python examples/vision.py
    mpirun -n 4 python examples/vision.py --compression none
    mpirun -n 4 python examples/vision.py --bits dynamic --logdir logs --checkpoint vision.pt

This is a plain Horovod script; the line that hvd_gqsgd changes is ``compression=``. The metric is
the accuracy on test images, a quarter of all, which ``--seed`` chooses.

With ``--checkpoint`` it goes on where an earlier run was interrupted. It ends with the same bits as
an uninterrupted run if sums do not depend on their order: on 2 ranks they never do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import horovod.torch as hvd
import torch
from common import add_compression_arguments, make_compression
from digits import accuracy, distorted, load_data
from torch import Tensor, nn
from torch.nn import functional as F
from training import Order, Run, add_run_arguments, seed_step

from hvd_gqsgd.bench.trainer import Training


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_compression_arguments(parser)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32, help="images a step, over all ranks")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate at its highest")
    parser.add_argument("--channels", type=int, default=32, help="of the first half of the blocks")
    add_run_arguments(parser)
    return parser.parse_args(arguments)


class Block(nn.Module):
    """Two convolutions and a way around them.

    Each rank has running means and variances of its own; rank 0 tests the model with its ones.
    """

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        nn.init.zeros_(self.second_norm.weight)  # each block starts as the way around it
        self.around = nn.Conv2d(inside, outside, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.around(x))


def make_model(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        Block(channels, channels),
        Block(channels, channels),
        Block(channels, 2 * channels, stride=2),
        Block(2 * channels, 2 * channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def make_schedule(
    args: argparse.Namespace, optimizer: Any, total: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total, cycle_momentum=False)


def make_training(args: argparse.Namespace, ranks: int) -> Training:
    """All ranks of a run in this process, for ``hvd-gqsgd bench frontier --train``."""
    hvd.init()
    torch.manual_seed(args.seed)
    train_data, test_data = load_data(args.seed)
    images, labels = train_data.tensors
    order = Order(len(images), args.batch_size, args.seed)
    total = args.epochs * order.steps_per_epoch
    model = make_model(args.channels)
    optimizer = make_optimizer(args, model)
    # As in main(): this takes a step of weight decay, and DistributedOptimizer has a new state.
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer.state.clear()

    def loss(step: int, rank: int) -> Tensor:
        seed_step(args.seed, step, rank)
        rows = order.rows(step, rank, ranks)
        return F.cross_entropy(model(distorted(images[rows])), labels[rows])

    return Training(
        model, optimizer, make_schedule(args, optimizer, total), total, loss, "accuracy",
        lambda: accuracy(model, test_data),
    )  # fmt: skip


def main() -> None:
    args = parse_args()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train_data, test_data = load_data(args.seed)
    images, labels = train_data.tensors
    order = Order(len(images), args.batch_size, args.seed)
    total = args.epochs * order.steps_per_epoch

    model = make_model(args.channels)
    optimizer = make_optimizer(args, model)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    compression = make_compression(args, model, total)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression
    )
    schedule = make_schedule(args, optimizer, total)

    run = Run(args, model, [optimizer], [schedule], compression, total)
    model.train()
    for step in run.steps():
        rows = order.rows(step, hvd.rank(), hvd.size())
        optimizer.zero_grad()
        loss = F.cross_entropy(model(distorted(images[rows])), labels[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        run.log(step, loss)
    run.finish("vision", "accuracy", accuracy(model, test_data))


if __name__ == "__main__":
    main()
