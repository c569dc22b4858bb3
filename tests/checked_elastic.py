"""Runs examples/language_elastic.py, and holds a mean of every step against ``simulate``.

So nothing of an exchange that was broken off may be in a later one, and the width, the number of
the step and the number of ranks must be right. What each rank sees is printed for
``test_elastic.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvd_gqsgd import DynamicBits, GlobalQSGD, simulate

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import language_elastic

PAUSE = 0.25  # seconds, a step of two ranks: the third one must find them still at work


class Checked(GlobalQSGD):
    """Knows the gradients of all ranks, and so what their mean must be."""

    def __init__(self, bits: DynamicBits) -> None:
        super().__init__(bits)
        # Of the step's first tensor, which `simulate` knows: its context and itself.
        self._first: Any = None
        self._gradient = torch.empty(0)
        self._steps_seen = 0

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        probe, ctx = super().compress(tensor)
        if self.stats().steps > self._steps_seen:
            self._first, self._steps_seen = ctx, self.stats().steps
            self._gradient = tensor.detach()
        return probe, ctx

    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
        mean = super().decompress(tensor, ctx)
        if ctx is not None and ctx is self._first:
            bits, step = self.stats().bits, self.state_dict()["step"] - 1
            gradients = hvd.allgather(self._gradient.view(1, -1), name="gradients")
            exchange = self.options.exchange_for(hvd.size())  # it follows the budget, not the width
            expected = simulate(gradients, bits=bits, exchange=exchange, step=step)
            verdict = "right" if torch.equal(mean.view(-1), expected) else "wrong"
            place = f"rank {hvd.rank()} of {hvd.size()}"
            print(f"{place}: number {step}, {bits} bits, {verdict}", flush=True)
            if hvd.size() == 2:
                time.sleep(PAUSE)
        return mean

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        print(f"rank {hvd.rank()} of {hvd.size()} goes on from {state}", flush=True)


def make_compression(args: argparse.Namespace, model: nn.Module, steps: int) -> Checked:
    return Checked(DynamicBits(args.budget, total_steps=steps))


language_elastic.make_compression = make_compression

if __name__ == "__main__":
    language_elastic.main()
