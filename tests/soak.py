"""Trains for very many steps, and fails if anything grows that should not.

    mpirun -n 4 python tests/soak.py --steps 20000
    horovodrun --gloo -np 4 python tests/soak.py

Several settings take their turn, each for a share of the steps. After each the memory, the objects
of Python, the threads, the open files and what is in flight must not have grown over its second
half; all ranks must have the same model, to the bit; and the statistics must be what the steps
make. Prints a table, and what is wrong, and then exits with 1.

``--leak`` leaks some of everything on purpose: then all of that must be found.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import os
import sys
import threading
import time
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops
from torch import nn

from hvd_gqsgd import DynamicBits, GlobalQSGD
from hvd_gqsgd.engine.operation_names import OperationNames
from hvd_gqsgd.registry import horovod_states

# How much each may grow a step, by a straight line through the second half.
BOUNDS = {"objects": 0.01, "threads": 0.001, "files": 0.001, "in flight": 0.001}
# And the memory, in bytes over all of the second half: it comes in pages, of which the allocator
# keeps some for later. With 20,000 steps that is 157 bytes a step.
MOST_MEMORY = 2**19
# And in few steps the objects: some come and go with what is late.
MOST_OBJECTS = 10
SAMPLES = 50  # for each setting

COLUMNS = (
    "rank",
    "steps",
    "ms a step",
    "MiB",
    "bytes/step",
    "objects",
    "threads",
    "files",
    "in flight",
    "mean bits",
)
WIDTH = 96


def settings(steps: int) -> dict[str, dict[str, Any]]:
    """The options that take their turn."""
    return {
        "default": {},
        "4 bits, two phases": {"bits": 4, "exchange": "two_phase"},
        "dynamic, 5 bits": {"bits": DynamicBits(5, total_steps=steps)},
        "1/16 by a leader": {"keep": 1 / 16, "select": "leader"},
        "1/16 in turn, EF21": {"keep": 1 / 16, "error_feedback": "ef21"},
    }


def slope(times: list[float], values: list[float]) -> float:
    """Of the straight line with the least squares of errors."""
    mean_time, mean = sum(times) / len(times), sum(values) / len(values)
    away = [t - mean_time for t in times]
    return sum(a * (v - mean) for a, v in zip(away, values, strict=True)) / sum(a * a for a in away)


def sample(compressor: GlobalQSGD) -> dict[str, float]:
    """What must not grow."""
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    names = horovod_states(OperationNames)
    in_flight = len(mpi_ops._handle_map) + sum(len(each.unfinished) for each in names)
    in_flight += sum(pipeline.in_flight for each in names for pipeline in each.pipelines)
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "objects": len(gc.get_objects()),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "in flight": in_flight,
    }


class Leak:
    """Some of everything that must not grow."""

    def __init__(self) -> None:
        self.memory: list[Any] = []
        self.stop = threading.Event()

    def step(self, step: int) -> None:
        self.memory.append([torch.ones(2**14)])
        if step % 10 == 0:
            os.dup(0)
            threading.Thread(target=self.stop.wait, daemon=True).start()
            self.memory.append(hvd.allreduce_async(torch.zeros(1), name=f"leak.{step}"))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def train(options: dict[str, Any], steps: int, leak: Leak | None) -> tuple[list[float], list[str]]:
    """Trains with one setting; returns what goes in the table, and what is wrong."""
    model = make_model()
    # Each weight is a bucket, so that several are in flight, and slots are used.
    names = {"named_parameters": model.named_parameters()} if "keep" in options else {}
    compressor = GlobalQSGD(bucket_mb=0.03, **names, **options)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        named_parameters=model.named_parameters(),
        compression=compressor,
    )
    generator = torch.Generator().manual_seed(hvd.rank())
    every = max(steps // SAMPLES, 1)
    samples: dict[int, dict[str, float]] = {}
    wire = []
    began = time.monotonic()
    for step in range(1, steps + 1):
        x = torch.randn(8, WIDTH, generator=generator)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        if leak is not None:
            leak.step(step)
        if step in (1, 2):
            wire.append(compressor.stats().compressed_bytes_on_wire)
            gc.unfreeze()
            gc.collect()
            gc.freeze()  # what there is by now need not be counted each time
        if step > steps // 2 and step % every == 0:
            samples[step] = sample(compressor)
    took = time.monotonic() - began

    last = samples[max(samples)]
    at = [float(step) for step in samples]
    slopes = {kind: slope(at, [each[kind] for each in samples.values()]) for kind in last}
    half = steps - steps // 2
    objects = max(BOUNDS["objects"], MOST_OBJECTS / half)
    bounds = BOUNDS | {"memory": MOST_MEMORY / half, "objects": objects}
    wrong = [
        f"{kind}: {slopes[kind]:.3g} more a step, where {bound:.3g} may be"
        for kind, bound in bounds.items()
        if slopes[kind] > bound
    ]
    if last["in flight"]:
        wrong.append(f"in flight after the last step: {last['in flight']:g} operations")
    wrong += wrong_counts(compressor, model, steps, wire)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    digests = hvd.allgather(torch.tensor([list(digest.digest())]), name="digests")
    if len(digests.unique(dim=0)) > 1:
        wrong.append("the replicas differ")
    numbers = [steps, 1e3 * took / steps, last["memory"] / 2**20, slopes["memory"]]
    numbers += [last[kind] for kind in ("objects", "threads", "files", "in flight")]
    return [*numbers, compressor.stats().mean_bits], wrong


def wrong_counts(
    compressor: GlobalQSGD, model: nn.Module, steps: int, wire: list[int]
) -> list[str]:
    """What the statistics have wrong; ``wire``: bytes after one and after two steps."""
    stats = compressor.stats()
    sizes = [p.numel() for p in model.parameters()]
    compressed = [numel for numel in sizes if numel >= compressor.options.min_numel]
    expected = {
        "steps": steps,
        "tensors": steps * len(sizes),
        "tensors_bypassed": steps * (len(sizes) - len(compressed)),
        "elements": steps * sum(compressed),
        "compressed_bytes_before": 4 * steps * sum(compressed),
        "bypassed_bytes": 4 * steps * (sum(sizes) - sum(compressed)),
        "state": steps,
    }
    got = dataclasses.asdict(stats) | {"state": compressor.state_dict()["step"]}
    if isinstance(compressor.options.bits, int):  # all steps take the same
        expected["compressed_bytes_on_wire"] = wire[0] + (steps - 1) * (wire[1] - wire[0])
    return [f"{name} is {got[name]}, not {n}" for name, n in expected.items() if got[name] != n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20000, help="over all settings")
    parser.add_argument("--leak", action="store_true")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    each = args.steps // len(settings(1))
    leak = Leak() if args.leak else None
    broken = False
    if hvd.rank() == 0:
        print(f"{'':12}{''.join(f'{name:>10}' for name in COLUMNS)}", flush=True)
    for name, options in settings(each).items():
        own, wrong = train(options, each, leak)
        rows = hvd.allgather(torch.tensor([own], dtype=torch.float64), name="rows")
        for rank, numbers in enumerate(rows.tolist() if hvd.rank() == 0 else []):
            cells = "".join(f"{number:>10.6g}" for number in numbers)
            print(f"{name if rank == 0 else '':20}{rank:>2}{cells}", flush=True)
        for what in wrong:
            print(f"  WRONG on rank {hvd.rank()}: {what}", flush=True)
        broken |= bool(hvd.allreduce(torch.tensor(len(wrong)), op=hvd.Max, name="wrong"))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
