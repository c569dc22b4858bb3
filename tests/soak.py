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
import torch.distributed as dist
from horovod.torch import mpi_ops
from torch import nn

from hvd_gqsgd import DynamicBits, GlobalQSGD, ddp_hook
from hvd_gqsgd.bench.training import start_process_group
from hvd_gqsgd.engine.operation_names import OperationNames
from hvd_gqsgd.registry import horovod_states

# How much each may grow a step, by a straight line through the second half.
BOUNDS = {"objects": 0.01, "threads": 0.001, "files": 0.001, "in flight": 0.001}
# And the memory, in bytes over all of the second half: it comes in pages, of which the allocator
# keeps some for later. With 20,000 steps that is 943 bytes a step.
MOST_MEMORY = 2**20
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
        "1/16, MARINA": {"keep": 1 / 16, "error_feedback": "marina"},
        "2 bits, two phases": OWED,
        "2 bits, DDP": OWED,
        "auto": {"bits": "auto"},
    }


OWED = {"bits": 2, "rounding": "nearest", "exchange": "two_phase", "error_feedback": "ef21"}
"""The owner of a segment keeps a memory too."""


def slope(times: list[float], values: list[float]) -> float:
    """Of the straight line with the least squares of errors."""
    mean_time, mean = sum(times) / len(times), sum(values) / len(values)
    away = [t - mean_time for t in times]
    return sum(a * (v - mean) for a, v in zip(away, values, strict=True)) / sum(a * a for a in away)


def sample(compressor: GlobalQSGD) -> dict[str, float]:
    """What must not grow."""
    objects = []
    for _ in range(3):  # what DDP's threads still have in hand comes and goes
        time.sleep(0.002)
        gc.collect()
        objects.append(len(gc.get_objects()))
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    names = horovod_states(OperationNames)
    in_flight = len(mpi_ops._handle_map) + sum(len(each.unfinished) for each in names)
    in_flight += sum(pipeline.in_flight for each in names for pipeline in each.pipelines)
    if compressor.options.bits == "auto":  # a message is read in the step after its own
        in_flight = max(in_flight - 1, 0)
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "objects": min(objects),
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


def under_horovod(
    model: nn.Module, options: dict[str, Any]
) -> tuple[nn.Module, torch.optim.Optimizer, GlobalQSGD]:
    """The model, its optimizer and its compressor; each weight is a bucket of its own."""
    compressor = GlobalQSGD(bucket_mb=0.03, **options)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        named_parameters=model.named_parameters(),
        compression=compressor,
    )
    return model, optimizer, compressor


def under_ddp(
    model: nn.Module, options: dict[str, Any]
) -> tuple[nn.Module, torch.optim.Optimizer, GlobalQSGD]:
    """The same under DistributedDataParallel."""
    start_process_group(None)
    compressor = GlobalQSGD(**options)
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.03)
    wrapped.register_comm_hook(compressor.ddp_state(), ddp_hook)
    return wrapped, torch.optim.SGD(model.parameters(), lr=0.05), compressor


def train(
    name: str, options: dict[str, Any], steps: int, leak: Leak | None
) -> tuple[list[float], list[str]]:
    """Trains with one setting; returns what goes in the table, and what is wrong."""
    inner = make_model()
    if "error_feedback" in options or "keep" in options:
        options = options | {"named_parameters": inner.named_parameters()}
    under = under_ddp if "DDP" in name else under_horovod
    model, optimizer, compressor = under(inner, options)
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
    if "DDP" in name:
        dist.destroy_process_group()
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
    expected = {"steps": steps, "tensors": steps * len(sizes), "state": steps}
    if compressor.options.bits != "auto":
        expected |= {
            "tensors_bypassed": steps * (len(sizes) - len(compressed)),
            "elements": steps * sum(compressed),
            "compressed_bytes_before": 4 * steps * sum(compressed),
            "bypassed_bytes": 4 * steps * (sum(sizes) - sum(compressed)),
        }
    got = dataclasses.asdict(stats) | {"state": compressor.state_dict()["step"]}
    alike = compressor.options.error_feedback != "marina"
    if alike and isinstance(compressor.options.bits, int):  # all steps take the same
        expected["compressed_bytes_on_wire"] = wire[0] + (steps - 1) * (wire[1] - wire[0])
    return [f"{name} is {got[name]}, not {n}" for name, n in expected.items() if got[name] != n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20000, help="over all settings")
    parser.add_argument("--leak", action="store_true")
    parser.add_argument("--settings", nargs="+", help="those with these names alone")
    args = parser.parse_args()
    names = args.settings or list(settings(1))
    hvd.init()
    torch.set_num_threads(1)
    each = args.steps // len(names)
    leak = Leak() if args.leak else None
    broken = False
    if hvd.rank() == 0:
        print(f"{'':12}{''.join(f'{name:>10}' for name in COLUMNS)}", flush=True)
    for name in names:
        options = settings(each)[name]
        own, wrong = train(name, options, each, leak)
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
