"""Trains the CNN of digits_cnn.py with PyTorch's DistributedDataParallel, without Horovod.

    torchrun --nproc-per-node 2 examples/digits_ddp.py --bits 8

The line that hvd_gqsgd adds is the one with ``register_comm_hook``. At the end rank 0 prints what
the gradients took on the wire, and that all ranks hold the same model.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
from digits import accuracy, distorted, load_data, make_model
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from hvd_gqsgd import GlobalQSGD, ddp_hook


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=8, help="lane width, 2 to 16")
    parser.add_argument("--dither", choices=("linear", "exponential"), default="linear")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32, help="images a step, over all ranks")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate at the start")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed + rank)  # ranks distort images in their own ways
    train, test = load_data(args.seed)
    sampler = DistributedSampler(train, seed=args.seed, drop_last=True)
    loader = DataLoader(train, args.batch_size // size, sampler=sampler, drop_last=True)

    model = DistributedDataParallel(make_model())  # with the parameters of rank 0
    compression = GlobalQSGD(bits=args.bits, dither=args.dither, seed=args.seed)
    model.register_comm_hook(compression.ddp_state(), ddp_hook)

    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(distorted(images)), labels).backward()
            optimizer.step()
        schedule.step()

    parameters = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    replicas = [torch.empty_like(parameters) for _ in range(size)]
    dist.all_gather(replicas, parameters)
    same = all(torch.equal(replica, parameters) for replica in replicas)
    if rank == 0:
        stats = compression.stats()
        print(f"test accuracy   {accuracy(model.module, test):.2%}")
        print(
            f"gradient bytes  {stats.bytes_before:,} before, {stats.bytes_on_wire:,} on the wire: "
            f"{stats.ratio:.2f} times fewer"
        )
        print(f"replicas        {'identical' if same else 'DIFFERENT'}")
    dist.destroy_process_group()
    if not same:
        sys.exit(f"rank {rank}: the replicas differ")


if __name__ == "__main__":
    main()
