"""Trains the model of language.py while workers come and go: elastic Horovod.

    horovodrun --gloo -np 2 --min-np 2 --max-np 3 --host-discovery-script ./hosts.sh \\
        --blacklist-cooldown-range 5 10 python examples/language_elastic.py

``hosts.sh`` prints the hosts that there are, as ``name:slots`` in lines; Horovod asks it each
second. When a worker is lost, the others go back to what they committed last and go on without it;
a new one takes over from them the model, the optimizer, and the state of the compression.

Horovod takes no more workers from a host on which one has failed; with a cool-down it does again,
after a while.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import horovod.torch as hvd
import torch
from common import add_compression_arguments, make_compression, replica_difference
from language import perplexity
from training import seed_step
from transformer import (
    Transformer,
    add_model_arguments,
    cross_entropy,
    draw,
    load_data,
    make_optimizer,
    make_schedule,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_compression_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--commit-every", type=int, default=5, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the dither")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train_data, validation_data = load_data(args.seed)
    model = Transformer(args.width, args.layers, args.context)
    compression = make_compression(args, model, args.steps)
    optimizer = hvd.DistributedOptimizer(
        make_optimizer(args, model),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    schedule = make_schedule(args, optimizer)

    @hvd.elastic.run
    def train(state: Any) -> None:
        """Called anew, with the committed state of rank 0, whenever workers have come or gone."""
        schedule.load_state_dict(state.schedule)
        compression.load_state_dict(state.compression)
        place = f"rank {hvd.rank()} of {hvd.size()}, {os.environ['HOROVOD_HOSTNAME']}"
        print(f"{place}, {os.getpid()}: from step {state.step} on", flush=True)
        model.train()
        while state.step < args.steps:
            seed_step(args.seed, state.step, hvd.rank())
            texts = draw(train_data, args.batch_size // hvd.size(), args.context)
            optimizer.zero_grad()
            loss = cross_entropy(model, texts)
            loss.backward()
            optimizer.step()
            schedule.step()
            state.step += 1
            if state.step % args.commit_every == 0:
                if hvd.rank() == 0:
                    print(f"step {state.step}, {hvd.size()} ranks: {loss.item():.4f}", flush=True)
                state.schedule = schedule.state_dict()
                state.compression = compression.state_dict()
                state.commit()  # where workers that have come or gone are noticed, too

    # Under another name than ``optimizer`` it is brought to a newcomer before the model is: there
    # Horovod makes the optimizer take a step, which decays the weights.
    state = hvd.elastic.TorchState(
        model, adam=optimizer, step=0,
        schedule=schedule.state_dict(), compression=compression.state_dict(),
    )  # fmt: skip
    train(state)
    value = perplexity(model, validation_data, args.validate, args.context)
    print(f"rank {hvd.rank()} of {hvd.size()}: perplexity {value:.3f}, "
          f"replica difference {replica_difference(model):g}, "
          f"compression {compression.state_dict()}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
