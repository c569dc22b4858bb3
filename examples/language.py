"""Language: trains a small Transformer on the sources of Python's standard library, byte by byte.

    mpirun -n 4 python examples/language.py
    mpirun -n 4 python examples/language.py --compression none
    mpirun -n 4 python examples/language.py --bits 4 --logdir logs --checkpoint language.pt

This is a plain Horovod script; the line that hvd_gqsgd changes is ``compression=``. The metric is
the perplexity of a byte in files that were not trained on: every tenth of the library's modules;
``--seed`` chooses the first of them.

With ``--checkpoint`` it goes on where an earlier run was interrupted. It ends with the same bits as
an uninterrupted run if sums do not depend on their order: on 2 ranks they never do.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import horovod.torch as hvd
import torch
from common import add_compression_arguments, make_compression
from torch import Tensor, nn
from training import Run, add_run_arguments, seed_step
from transformer import (
    Transformer,
    add_model_arguments,
    cross_entropy,
    draw,
    load_data,
    make_optimizer,
    make_schedule,
)

from hvd_gqsgd.bench.trainer import Training


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_compression_arguments(parser)
    add_model_arguments(parser)
    add_run_arguments(parser)
    return parser.parse_args(arguments)


@torch.no_grad()
def perplexity(model: nn.Module, data: Tensor, count: int, context: int) -> float:
    """On texts from all over the data; each rank takes a part."""
    model.eval()
    starts = torch.linspace(0, len(data) - context - 1, count).long()[hvd.rank() :: hvd.size()]
    total = torch.zeros(2, dtype=torch.float64)  # nats, texts
    for part in starts.split(32):
        texts = data[part[:, None] + torch.arange(context + 1)].long()
        total += torch.tensor([cross_entropy(model, texts).item() * len(part), len(part)])
    nats, texts_seen = hvd.allreduce(total, op=hvd.Sum, name="perplexity").tolist()
    return math.exp(nats / texts_seen)


def make_training(args: argparse.Namespace, ranks: int) -> Training:
    """All ranks of a run in this process, for ``hvd-gqsgd bench frontier --train``."""
    hvd.init()
    torch.manual_seed(args.seed)
    train_data, validation_data = load_data(args.seed)
    model = Transformer(args.width, args.layers, args.context)
    optimizer = make_optimizer(args, model)
    # As in main(): this takes a step of weight decay, and DistributedOptimizer has a new state.
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer.state.clear()

    def loss(step: int, rank: int) -> Tensor:
        seed_step(args.seed, step, rank)
        return cross_entropy(model, draw(train_data, args.batch_size // ranks, args.context))

    return Training(
        model, optimizer, make_schedule(args, optimizer), args.steps, loss, "perplexity",
        lambda: perplexity(model, validation_data, args.validate, args.context),
    )  # fmt: skip


def main() -> None:
    args = parse_args()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train_data, validation_data = load_data(args.seed)

    model = Transformer(args.width, args.layers, args.context)
    optimizer = make_optimizer(args, model)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    compression = make_compression(args, model, args.steps)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression
    )
    schedule = make_schedule(args, optimizer)

    run = Run(args, model, [optimizer], [schedule], compression, args.steps)
    model.train()
    for step in run.steps():
        texts = draw(train_data, args.batch_size // hvd.size(), args.context)
        optimizer.zero_grad()
        loss = cross_entropy(model, texts)
        loss.backward()
        optimizer.step()
        schedule.step()
        run.log(step, loss)
    value = perplexity(model, validation_data, args.validate, args.context)
    run.finish("language", "perplexity", value)


if __name__ == "__main__":
    main()
