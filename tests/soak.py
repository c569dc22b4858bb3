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

# How much each may grow a step, by a straight line through the second half. Memory comes in pages,
# and the allocator keeps some for later; the other counts are exact.
BOUNDS = {"memory": 64.0, "objects": 0.01, "threads": 0.001, "files": 0.001, "in flight": 0.001}
SAMPLES = 100  # for each setting

WIDTH = 96


def settings(steps: int) -> dict[str, dict[str, Any]]:
    """The options that take their turn."""
    return {
        "default": {},
        "4 bits, two phases": {"bits": 4, "exchange": "two_phase"},
        "dynamic, 5 bits": {"bits": DynamicBits(5, total_steps=steps)},
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
    pipeline = compressor._pipeline
    assert pipeline is not None
    in_flight = (
        pipeline._live, pipeline._open, pipeline._in_flight, pipeline._orphans,
        pipeline._turns._in_flight, pipeline._namespace.unfinished, mpi_ops._handle_map,
    )  # fmt: skip
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "objects": len(gc.get_objects()),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "in flight": sum(map(len, in_flight)),
    }


class Leak:
    """Some of everything that must not grow."""

    def __init__(self) -> None:
        self.memory: list[Any] = []
        self.stop = threading.Event()

    def step(self, step: int) -> None:
        self.memory.append([torch.zeros(64)])
        if step % 10 == 0:
            os.dup(0)
            threading.Thread(target=self.stop.wait, daemon=True).start()
            self.memory.append(hvd.allreduce_async(torch.zeros(1), name=f"leak.{step}"))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def train(options: dict[str, Any], steps: int, leak: Leak | None) -> tuple[dict[str, Any], str]:
    """Trains with one setting; returns what goes in the table, and what is wrong."""
    model = make_model()
    # Each weight is a bucket, so that several are in flight, and turns are taken.
    compressor = GlobalQSGD(bucket_mb=0.03, **options)
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
        if step > steps // 2 and step % every == 0:
            samples[step] = sample(compressor)
    took = time.monotonic() - began

    last = samples[max(samples)]
    at = [float(step) for step in samples]
    slopes = {kind: slope(at, [each[kind] for each in samples.values()]) for kind in BOUNDS}
    wrong = [
        f"{kind} grow by {slopes[kind]:.3g} a step" for kind, bound in BOUNDS.items()
        if slopes[kind] > bound
    ]  # fmt: skip
    wrong += wrong_counts(
        compressor, model, steps, wire if type(compressor.options.bits) is int else None
    )
    if last["in flight"] and leak is None:
        wrong.append(f"{last['in flight']} operations are in flight after the last step")
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    if len(set(hvd.allgather_object(digest.hexdigest()))) > 1:
        wrong.append("the replicas differ")
    row = {"ms a step": 1e3 * took / steps, "MiB": last["memory"] / 2**20}
    row |= {kind: last[kind] for kind in ("objects", "threads", "files", "in flight")}
    row |= {"bytes a step": slopes["memory"], "mean bits": compressor.stats().mean_bits}
    return row, "; ".join(wrong)


def wrong_counts(
    compressor: GlobalQSGD, model: nn.Module, steps: int, wire: list[int] | None
) -> list[str]:
    """What the statistics have wrong; ``wire``: bytes after one and two steps, if all are alike."""
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
    if wire is not None:
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
    broken = False
    for name, options in settings(each).items():
        row, wrong = train(options, each, Leak() if args.leak else None)
        rows = hvd.allgather_object((row, wrong))
        if hvd.rank() == 0:
            print(f"{name}: {each} steps on {hvd.size()} ranks", flush=True)
            for rank, (values, problem) in enumerate(rows):
                shown = ", ".join(f"{key} {value:.6g}" for key, value in values.items())
                print(
                    f"  rank {rank}: {shown}{'; WRONG: ' + problem if problem else ''}", flush=True
                )
        broken = broken or any(problem for _, problem in rows)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
