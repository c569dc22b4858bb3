"""Trains the model of transformer.py with PyTorch's FSDP2: parameters, gradients and the state of
the optimizer are sharded among the ranks.

    torchrun --nproc-per-node 4 examples/fsdp_language.py --bits 8
    torchrun --nproc-per-node 4 examples/fsdp_language.py --bits 8 --weight-bits 8
    torchrun --nproc-per-node 4 examples/fsdp_language.py --bits 0    # PyTorch's own collectives

The line that hvd_gqsgd adds is the one with ``fsdp``; Horovod is not needed. At the end rank 0
prints the perplexity of a byte in files that were not trained on, and what gradients and weights
took on the wire. ``fsdp_compare.py`` runs it with several settings and seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformer import (
    Transformer,
    add_model_arguments,
    cross_entropy,
    draw,
    load_data,
    make_optimizer,
    make_schedule,
)

from hvd_gqsgd import GlobalQSGD


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=8, help="lane width, 2 to 16; 0: plain FSDP")
    parser.add_argument("--dither", choices=("linear", "exponential"), default="linear")
    parser.add_argument("--weight-bits", type=int, help="of weights; left out: they are exact")
    parser.add_argument("--weight-exceptions", nargs="*", default=[], help="patterns of names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the results, in JSON")
    add_model_arguments(parser)
    args = parser.parse_args()
    if args.weight_bits and not args.bits:
        parser.error("--weight-bits goes with --bits 2 to 16")
    return args


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


def exact(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """A model of the sharded parameters themselves, which are not rounded."""
    full: Any = {name: p.full_tensor() for name, p in model.named_parameters()}  # type: ignore[operator]
    whole = Transformer(args.width, args.layers, args.context)
    whole.load_state_dict(full)
    return whole


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
        compression.fsdp(
            model, weight_bits=args.weight_bits, weight_exceptions=args.weight_exceptions
        )

    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer)
    torch.manual_seed(1000 * args.seed + rank)  # and draws its own texts
    for _ in range(args.steps):
        optimizer.zero_grad()
        cross_entropy(model, draw(train_data, args.batch_size // size, args.context)).backward()
        optimizer.step()
        schedule.step()

    stats = None if compression is None else compression.stats()  # of the training alone
    results: dict[str, Any] = vars(args) | {"output": None, "ranks": size}
    on_these = validation_data, args.validate, args.context
    results["perplexity"] = perplexity(exact(args, model), *on_these)
    if rank == 0:
        print(f"perplexity      {results['perplexity']:.3f}")
    if args.weight_bits:
        results["perplexity_rounded"] = perplexity(model, *on_these)
        if rank == 0:
            print(f"... rounded     {results['perplexity_rounded']:.3f}")
    if rank == 0 and stats is not None:
        results |= {
            "gradient_bytes": [stats.bytes_before, stats.bytes_on_wire],
            "weight_bytes": [stats.weight_bytes_before, stats.weight_bytes_on_wire],
        }
        for kind in ("gradient", "weight") if args.weight_bits else ("gradient",):
            before, after = results[f"{kind}_bytes"]
            print(
                f"{kind} bytes".ljust(15),
                f"{before:,} before, {after:,} on the wire: {before / after:.2f} times fewer",
            )
    if rank == 0 and args.output is not None:
        args.output.write_text(json.dumps(results) + "\n")
    dist.barrier()  # FSDP's Gloo threads outlive the group; one still busy at exit would abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
