"""Trains the language model of language.py with PyTorch's FSDP2: parameters, gradients and the
optimizer's state are sharded among the ranks.

    torchrun --nproc-per-node 4 examples/fsdp_language.py --bits 8
    torchrun --nproc-per-node 4 examples/fsdp_language.py --bits 0    # PyTorch's own reduce-scatter

The line that hvd_gqsgd adds is the one with ``fsdp``. At the end rank 0 prints the perplexity of a
byte in files that were not trained on, and what the gradients took on the wire.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.distributed as dist
from language import (
    Transformer,
    add_model_arguments,
    cross_entropy,
    draw,
    load_data,
    make_optimizer,
    make_schedule,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hvd_gqsgd import GlobalQSGD


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=8, help="lane width, 2 to 16; 0: plain FSDP")
    parser.add_argument("--dither", choices=("linear", "exponential"), default="linear")
    parser.add_argument("--seed", type=int, default=0)
    add_model_arguments(parser)
    return parser.parse_args()


@torch.no_grad()
def perplexity(model: nn.Module, data: Tensor, count: int, context: int) -> float:
    """On texts from all over the data; each rank takes as many as the others."""
    rank, size = dist.get_rank(), dist.get_world_size()
    starts = torch.linspace(0, len(data) - context - 1, count // size * size).long()[rank::size]
    nats = torch.zeros(1, dtype=torch.float64)
    for part in starts.split(32):
        texts = data[part[:, None] + torch.arange(context + 1)].long()
        nats += cross_entropy(model, texts).item() * len(part) / len(starts)
    dist.all_reduce(nats)
    return math.exp(nats.item() / size)


def main() -> None:
    args = parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)  # all ranks begin with one model
    train_data, validation_data = load_data(args.seed)

    model = Transformer(args.width, args.layers, args.context)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    compression = None
    if args.bits:
        compression = GlobalQSGD(bits=args.bits, dither=args.dither, seed=args.seed)
        compression.fsdp(model)

    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer)
    torch.manual_seed(1000 * args.seed + rank)  # and draws its own texts
    for _ in range(args.steps):
        optimizer.zero_grad()
        cross_entropy(model, draw(train_data, args.batch_size // size, args.context)).backward()
        optimizer.step()
        schedule.step()

    value = perplexity(model, validation_data, args.validate, args.context)
    if rank == 0:
        print(f"perplexity      {value:.3f}")
        if compression is not None:
            stats = compression.stats()
            print(
                f"gradient bytes  {stats.bytes_before:,} before, {stats.bytes_on_wire:,} on the "
                f"wire: {stats.ratio:.2f} times fewer"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
