"""Trains a small model with Horovod, and commits a fault in the middle of a backward pass.

The gradients of the upper half of the model are on their way then: of GlobalQSGD their norms, and
maybe codes. ``test_faults.py`` starts this on several ranks; the last one is at fault.

A fault that only delays must not change the result, so the same training without it goes ahead.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor, nn

from hvd_gqsgd import GlobalQSGD

WIDTH = 128
FAULTY_STEP = 6  # the first one


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ArithmeticError("on purpose")


def sleep() -> None:
    time.sleep(0.7)


# What a rank does, and at how many steps. Of what is done to it from outside it knows nothing.
FAULTS = {"killed": (kill, 1), "raises": (fail, 1), "slow": (sleep, 2), "outside": (None, 0)}
COMPRESSIONS = {
    "fp32": lambda: hvd.Compression.none,
    "gqsgd": lambda: GlobalQSGD(bucket_mb=0.01),  # each weight's norms are sent off at once
    "node": lambda: GlobalQSGD(bucket_mb=0.01, hierarchy=(hvd.size() - 1, 1)),
}


class Midway(torch.autograd.Function):
    """Calls a function in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.function()
        return grad, None


def train(compression: str, steps: int, pause: float, midway: Callable[[int], None]) -> str:
    """Trains from the start on; returns a digest of all bits of the model."""
    torch.manual_seed(0)
    lower, upper = (
        nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Tanh()) for _ in range(2)
    )
    model = nn.Sequential(lower, upper)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=COMPRESSIONS[compression](),
    )
    for step in range(steps):
        generator = torch.Generator().manual_seed(step * hvd.size() + hvd.rank())
        x = torch.randn(16, WIDTH, generator=generator)
        optimizer.zero_grad()
        middle = Midway.apply(lower(x), lambda step=step: midway(step))
        (upper(middle) - x).square().mean().backward()
        optimizer.step()
        if hvd.rank() == 0:
            print(f"{compression}: step {step}", flush=True)
        time.sleep(pause)
    bits = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(bits).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("compressions", nargs="+", choices=COMPRESSIONS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0, help="seconds after each step")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    function, times = FAULTS[args.fault]
    happened = 0

    def midway(step: int) -> None:
        nonlocal happened
        if FAULTY_STEP <= step < FAULTY_STEP + times and hvd.rank() == hvd.size() - 1:
            happened += 1
            print(f"rank {hvd.rank()} is at fault in step {step}", flush=True)
            function()

    for compression in args.compressions:
        if args.fault in ("killed", "raises"):
            # The launcher ends the others then. Let them say first what Horovod tells them.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                train(compression, args.steps, args.pause, midway)
            except HorovodInternalError as error:
                print(f"rank {hvd.rank()}: {error!r}", flush=True)
                raise
            except ArithmeticError as error:
                print(repr(error), flush=True)
                hvd.shutdown()  # as at exit, but before the launcher ends the other ranks
                time.sleep(2)
                raise
            continue
        before = train(compression, args.steps, 0, lambda step: None)
        print(f"rank {hvd.rank()}: now with the fault", flush=True)
        after = train(compression, args.steps, args.pause, midway)
        print(f"rank {hvd.rank()}, {compression}: {before} {after}", flush=True)


if __name__ == "__main__":
    main()
