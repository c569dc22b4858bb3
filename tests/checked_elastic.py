"""Runs examples/language_elastic.py, and holds a mean of every step against ``simulate``.

So nothing of an exchange that was broken off may be in a later one, and the width, the number of
the step and the number of ranks must be right. What each rank sees is printed for
``test_elastic.py``.

Hosts are told apart by their names, as one machine has several: codes go by node where there are
two, and flat where one is left.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvd_gqsgd import BlockBits, DynamicBits, GlobalQSGD, simulate
from hvd_gqsgd.auto.arms import options_of
from hvd_gqsgd.exchanges import by_node
from hvd_gqsgd.options import digest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import language_elastic

PAUSE = 0.25  # seconds, a step of two ranks: the third one must find them still at work


def host_number() -> int:
    """That of the host's name."""
    return 1 + digest(os.environ["HOROVOD_HOSTNAME"])


class Checked(GlobalQSGD):
    """Knows the gradients of all ranks, and so what their mean must be."""

    def __init__(self, bits: DynamicBits | Literal["auto"]) -> None:
        super().__init__(bits, hierarchy="auto" if bits == "auto" else "node")
        self._gradient = torch.empty(0)  # the step's first tensor, which `simulate` knows
        self._steps_seen = 0

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        probe, ctx = super().compress(tensor)
        first = self.stats().steps > self._steps_seen
        if first:
            self._steps_seen = self.stats().steps
            self._gradient = tensor.detach().clone()  # Horovod may reduce it in place
        return probe, (ctx, first)

    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
        ctx, first = ctx
        mean = super().decompress(tensor, ctx)
        if first:
            step = self.state_dict()["step"] - 1
            gradients = hvd.allgather(self._gradient.view(1, -1), name="gradients")
            name, right = self._judge(mean.view(-1), gradients, step)
            place = f"rank {hvd.rank()} of {hvd.size()}"
            verdict = "right" if right else "wrong"
            print(f"{place}: number {step}, {name}, {verdict}", flush=True)
            if hvd.size() == 2:
                time.sleep(PAUSE)
        return mean

    def _judge(self, mean: Tensor, gradients: Tensor, step: int) -> tuple[str, bool]:
        """The setting of a step, and whether the mean is right."""
        stats, options = self.stats(), self.options
        if options.bits != "auto":
            hosts = hvd.allgather(torch.tensor([host_number()]), name="hosts of all").tolist()
            nodes = [len([*ranks]) for _, ranks in itertools.groupby(hosts)]
            # It follows the budget, not the width.
            exchange = options.exchange_for(hvd.size()) if len(nodes) == 1 else "two_phase"
            expected = simulate(
                gradients, bits=stats.bits, exchange=exchange, step=step, hierarchy="node",
                nodes=nodes,
            )  # fmt: skip
            return f"{stats.bits} bits on {len(nodes)} nodes", torch.equal(mean, expected)
        if stats.setting == "fp32":  # in an order of Horovod's own
            return stats.setting, torch.allclose(mean, gradients.mean(0), atol=1e-7)
        bits = options_of(options, stats.setting).bits
        if isinstance(bits, BlockBits):  # widths depend on other tensors
            exact = gradients.mean(0)
            return stats.setting, bool((mean - exact).norm() < exact.norm() / 3)
        return stats.setting, torch.equal(mean, simulate(gradients, bits=bits, step=step))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        print(f"rank {hvd.rank()} of {hvd.size()} goes on from {state}", flush=True)


def make_compression(args: argparse.Namespace, model: nn.Module, steps: int) -> Checked:
    return Checked("auto" if args.bits == "auto" else DynamicBits(args.budget, total_steps=steps))


by_node.host_number = host_number  # type: ignore[assignment, attr-defined]
language_elastic.make_compression = make_compression

if __name__ == "__main__":
    language_elastic.main()
