"""Trains a small CNN on scikit-learn's handwritten digits, on several Horovod ranks.

    mpirun -n 2 python examples/digits_cnn.py --compression gqsgd --bits 8
    mpirun -n 2 python examples/digits_cnn.py --bits dynamic --budget 5 --plot

This is a plain Horovod script; the line that hvd_gqsgd changes is ``compression=``. At the end it
prints what the gradients took on the wire and checks that all ranks hold the same model.

With 1 rank it trains too, but Horovod then exchanges nothing and never calls the compression.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from common import (
    add_compression_arguments,
    make_compression,
    replica_difference,
    report_bytes,
)
from digits import accuracy, distorted, load_data, make_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm
from training import Order, seed_step

from hvd_gqsgd.bench.trainer import Training
from hvd_gqsgd.codecs.bit_schedule import wire_bits


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_compression_arguments(parser)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32, help="images a step, over all ranks")
    parser.add_argument("--width", type=int, default=128, help="of the hidden layer")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", nargs="?", const=Path("digits_bits.png"),
        help="plot bits and gradient norm of each step to this file (default: %(const)s)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def make_loader(data: TensorDataset, args: argparse.Namespace) -> DataLoader[Any]:
    """Every rank takes another part of the images, and as many of them as any other."""
    sampler = DistributedSampler(
        data, num_replicas=hvd.size(), rank=hvd.rank(), seed=args.seed, drop_last=True
    )
    batch_size = args.batch_size // hvd.size()
    if not 1 <= batch_size <= len(sampler):
        sys.exit(f"--batch-size {args.batch_size} does not split into steps for {hvd.size()} ranks")
    return DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=True)


@dataclass
class Log:
    """What happened: seconds of training, and of these blocked in the optimizer's synchronize();
    seconds and accuracy after each epoch; and two numbers a step."""

    seconds: float = 0.0
    seconds_blocked: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def train(
    model: nn.Module, optimizer: Any, loader: DataLoader[Any], test: TensorDataset, epochs: int,
    stats: Any,
) -> Log:  # fmt: skip
    """Trains with a DistributedOptimizer."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    log = Log()
    with tqdm(total=epochs * len(loader), unit="step", disable=hvd.rank() != 0) as progress:
        for epoch in range(epochs):
            progress.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)
            loader.sampler.set_epoch(epoch)
            model.train()
            began = time.perf_counter()
            for images, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(distorted(images)), labels).backward()
                # optimizer.step() alone does both; apart, the first can be timed.
                start = time.perf_counter()
                optimizer.synchronize()
                log.seconds_blocked += time.perf_counter() - start
                with optimizer.skip_synchronize():
                    optimizer.step()
                log.bits.append(stats().bits)
                log.norms.append(nn.utils.get_total_norm(p.grad for p in model.parameters()).item())
                progress.update()
            schedule.step()
            log.seconds += time.perf_counter() - began
            log.curve.append((log.seconds, accuracy(model, test)))
    return log


def plot(log: Log, path: Path) -> None:
    """Bits of each step and their mean so far, above the norm of the gradient."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    # Lanes of 5 bits take 64/12 bits of an int64, and so on.
    on_wire = [wire_bits(width) for width in log.bits]
    means = [total / step for step, total in enumerate(accumulate(on_wire), 1)]
    above.step(range(len(on_wire)), on_wire, lw=0.7, color="0.6", label="this step")
    above.plot(means, color="0.0", label="mean so far")
    above.set_ylabel("bits an element on the wire")
    above.legend()
    below.semilogy(log.norms, lw=0.7, color="0.0")
    below.set(xlabel="step", ylabel="gradient norm")
    figure.savefig(path)
    print(f"plot                {path}")


def report(result: dict[str, Any]) -> None:
    bits = f", {result['dither']}, {result['bits']} bits" if result["dither"] else ""
    if result["bits"] == "dynamic" and result["bits_per_step"]:
        on_wire = 32 * result["compressed_bytes_on_wire"] / result["compressed_bytes_before"]
        low, high = min(result["bits_per_step"]), max(result["bits_per_step"])
        bits += f": {low} to {high} a step, {on_wire:.2f} an element on the wire with all overhead"
    if result["setting"]:
        bits = f", auto, at the end {result['setting']}"
    print(f"compression         {result['compression']}{bits}; {result['ranks']} rank(s)")
    print(f"test accuracy       {result['accuracy']:.2%}")
    report_bytes(result)
    if result["ranks"] == 1:
        print(
            "gradient bytes      none: a single rank exchanges nothing, so nothing was compressed"
        )
    print(
        f"communication       {result['seconds_blocked']:.2f} s in optimizer.synchronize(), "
        f"of {result['seconds']:.2f} s of training"
    )
    print(f"replica difference  {result['replica_difference']:g}")


def make_training(args: argparse.Namespace, ranks: int) -> Training:
    """All ranks in this process, for ``hvd-gqsgd bench frontier --train``."""
    hvd.init()
    torch.manual_seed(args.seed)
    train_data, test_data = load_data(args.seed)
    images, labels = train_data.tensors
    order = Order(len(images), args.batch_size, args.seed)
    model = make_model(args.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (1 + math.cos(math.pi * (step // order.steps_per_epoch) / args.epochs)) / 2,
    )

    def loss(step: int, rank: int) -> Tensor:
        seed_step(args.seed, step, rank)
        rows = order.rows(step, rank, ranks)
        return F.cross_entropy(model(distorted(images[rows])), labels[rows])

    return Training(
        model, optimizer, schedule, args.epochs * order.steps_per_epoch, loss, "accuracy",
        lambda: accuracy(model, test_data),
    )  # fmt: skip


def main() -> None:
    args = parse_args()
    hvd.init()
    torch.set_num_threads(1)  # so small a model gains nothing from more

    # Each rank distorts its images in its own way. The model is rank 0's, by the broadcast below.
    torch.manual_seed(args.seed + hvd.rank())
    train_data, test_data = load_data(args.seed)
    model = make_model(args.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    loader = make_loader(train_data, args)
    compression = make_compression(args, model, args.epochs * len(loader))
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression
    )

    log = train(model, optimizer, loader, test_data, args.epochs, compression.stats)

    stats = compression.stats()
    difference = replica_difference(model)
    if hvd.rank() == 0:
        result = {
            "compression": args.compression,
            "bits": args.bits,
            "bits_per_step": log.bits if max(log.bits) > 0 else [],
            "dither": args.dither if args.compression == "gqsgd" else "",
            "ranks": hvd.size(),
            "seed": args.seed,
            "setting": stats.setting,
            "steps": len(log.bits),
            "accuracy": log.curve[-1][1],
            "curve": log.curve,
            "bytes_before": stats.bytes_before,
            "bytes_on_wire": stats.bytes_on_wire,
            "compressed_bytes_before": stats.compressed_bytes_before,
            "compressed_bytes_on_wire": stats.compressed_bytes_on_wire,
            "seconds_blocked": log.seconds_blocked,
            "seconds": log.seconds,
            "replica_difference": difference,
        }
        report(result)
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
        if args.plot:
            plot(log, args.plot)
    if difference != 0:
        sys.exit(f"rank {hvd.rank()}: the replicas differ, by up to {difference:g}")


if __name__ == "__main__":
    main()
