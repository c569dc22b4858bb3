"""A training step of a model's shape: Horovod with and without GlobalQSGD, and the hooks of DDP.

``hvd-gqsgd bench step [--rate 1gbit]``. The model does no more than a dot product for each
parameter, so that nearly all of the time is the exchange; it overlaps with the backward pass as in
training. Each arm has its own copy of the parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from hvd_gqsgd import GlobalQSGD, ddp_hook
from hvd_gqsgd.bench.gradients import MODELS, shapes_of
from hvd_gqsgd.bench.operators import OPERATORS
from hvd_gqsgd.bench.rounds import interleaved, progress_bar
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.tools.launch import INTERFACE, add_arguments, is_rank, launch

__all__ = ["ARMS", "FP32", "chosen", "main", "measure"]

_T = TypeVar("_T")

OURS = {f"GlobalQSGD {name}": options for name, options in OPERATORS.items()}
FP32, FP16 = "Horovod fp32", "Horovod fp16"
DDP_ARMS = ("DDP fp32", "DDP fp16", "DDP PowerSGD rank 4", "DDP GlobalQSGD 8 bits")
ARMS = (FP32, FP16, *OURS, *DDP_ARMS)
"""What can be measured."""

COMPUTE = "compute"
"""A step without any exchange."""


def measure(
    model: str,
    arms: Sequence[str],
    repeats: int,
    *,
    exchange_alone: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Times a step of each arm on all ranks of Horovod.

    Args:
        model: one of ``gradients.MODELS``.
        arms: of ``ARMS``; DDP's need a process group.
        repeats: rounds that count.
        exchange_alone: with the gradients ready beforehand; for Horovod's arms.
        progress: called after each round.

    Returns:
        By arm: milliseconds of the slowest rank, in the median and in each round; how many times
        faster than the first arm; megabytes that a rank handed to collectives; and rounds
        discarded. An arm that does not run has its ``error`` instead. ``compute_ms`` is
        what a step takes without any exchange, and ``peak_megabytes`` the most memory that a rank
        ever took, all arms together.
    """
    made, errors = {}, {}
    for name in arms:
        try:
            arm = _together(partial(_make, name, model))
            _together(arm.step)
            made[name] = arm
        except Exception as error:  # a peer that does not run is a result too
            errors[name] = f"{type(error).__name__}: {error}"
    timed = dict(made)
    if not exchange_alone:
        alone = _Model(model)
        timed[COMPUTE] = _Arm("", alone, [], _optimizer(alone), None, 0)
    calls = {name: arm.exchange if exchange_alone else arm.step for name, arm in timed.items()}
    timings = interleaved(
        calls,
        repeats,
        prepare=lambda name: timed[name].get_ready(exchange_alone),
        progress=progress,
    )
    compute = timings.pop(COMPUTE).median * 1e3 if not exchange_alone else 0.0
    first = timings[next(iter(timings))].median
    arms_ = {
        name: {
            "ms": timing.median * 1e3,
            "times_faster": first / timing.median,
            "rounds_ms": [seconds * 1e3 for seconds in timing.seconds],
            "load": timing.load,
            "discarded": timing.discarded,
            "megabytes": made[name].megabytes(),
        }
        for name, timing in timings.items()
    }
    tensors = shapes_of(model)
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6])
    return {
        "peak_megabytes": hvd.allreduce(peak, op=hvd.Max, name="bench.peak").item(),
        "model": model,
        "ranks": hvd.size(),
        "tensors": len(tensors),
        "parameters": sum(math.prod(shape) for _, shape in tensors),
        "what": "exchange" if exchange_alone else "step",
        "compute_ms": compute,
        "arms": arms_ | {name: {"error": text} for name, text in errors.items()},
    }


def _together(call: Callable[[], _T]) -> _T:
    """What a call returns; raises on all ranks if it does on one."""
    raised = None
    try:
        result = call()
    except Exception as error:
        raised = error
    failed = torch.tensor(int(raised is not None))
    if hvd.allreduce(failed, op=hvd.Max, name="bench.error"):
        raise raised or RuntimeError("failed on another rank")
    return result


class _Model(nn.Module):
    """Its loss is linear in the parameters, with a gradient that differs between ranks."""

    def __init__(self, model: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(hvd.rank())
        self.weights = nn.ParameterDict()
        self.slopes: dict[str, Tensor] = {}
        for name, shape in shapes_of(model):
            key = name.replace(".", "_")
            self.weights[key] = nn.Parameter(torch.zeros(shape))
            self.slopes[key] = torch.randn(math.prod(shape), generator=generator)

    def forward(self, scale: Tensor) -> Tensor:
        dots = [torch.dot(p.flatten(), self.slopes[key]) for key, p in self.weights.items()]
        return torch.stack(dots).sum() * scale


@dataclass
class _Arm:
    """One way to train."""

    label: str
    network: nn.Module
    named: list[tuple[str, nn.Parameter]]
    optimizer: torch.optim.Optimizer
    compression: Any
    bytes_an_element: float

    def step(self) -> None:
        """Forward, backward, exchange and update."""
        self.optimizer.zero_grad()
        self.network(torch.ones(())).backward()
        self.optimizer.step()

    def exchange(self) -> None:
        """Of gradients that are there, in the order of a backward pass: what Horovod's optimizer
        does, which would take them in the order of a set."""
        handles = []
        for name, parameter in reversed(self.named):
            assert parameter.grad is not None
            sent, context = self.compression.compress(parameter.grad)
            handle = hvd.allreduce_async(sent, name=f"{self.label}.{name}")
            handles.append((parameter, handle, context))
        for parameter, handle, context in handles:
            parameter.grad = self.compression.decompress(hvd.synchronize(handle), context)

    def get_ready(self, exchange_alone: bool) -> None:
        """For the coming call."""
        if exchange_alone:
            assert isinstance(self.network, _Model)
            slopes = self.network.slopes.values()
            for parameter, slope in zip(self.network.parameters(), slopes, strict=True):
                parameter.grad = slope.view_as(parameter).clone()

    def megabytes(self) -> float:
        """That a rank hands to collectives in a step."""
        if isinstance(self.compression, GlobalQSGD):
            stats = self.compression.stats()
            wire = stats.compressed_bytes_on_wire + stats.bypassed_bytes
            return wire / max(stats.steps, 1) / 1e6
        elements = sum(p.numel() for p in self.network.parameters())
        return elements * self.bytes_an_element / 1e6


def _make(name: str, model: str) -> _Arm:
    network = _Model(model)
    named = list(network.named_parameters())
    optimizer = _optimizer(network)
    if name in DDP_ARMS:
        return _make_ddp(name, network, optimizer)
    compression: Any = hvd.Compression.fp16 if name == FP16 else hvd.Compression.none
    if name in OURS:
        compression = GlobalQSGD(named_parameters=reversed(named), **OURS[name])
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=named, compression=compression
    )  # fmt: skip
    return _Arm(name, network, named, optimizer, compression, 2 if name == FP16 else 4)


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-3)


def _make_ddp(name: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> _Arm:
    if not dist.is_initialized():
        raise RuntimeError("there is no process group")
    # PowerSGD's hook starts collectives when others are done, on whatever thread: with two buckets
    # in flight ranks start them in different orders, and Gloo ends the program.
    one_bucket = name == "DDP PowerSGD rank 4"
    default: Any = dist
    first = default._DEFAULT_FIRST_BUCKET_BYTES
    try:
        if one_bucket:
            default._DEFAULT_FIRST_BUCKET_BYTES = 2**31
        ddp = nn.parallel.DistributedDataParallel(
            network, bucket_cap_mb=2048 if one_bucket else None
        )
    finally:
        default._DEFAULT_FIRST_BUCKET_BYTES = first
    compressor, size = None, 4.0
    if name == "DDP fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        size = 2
    elif name == "DDP PowerSGD rank 4":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=4, start_powerSGD_iter=2
        )  # fmt: skip
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        size = math.nan
    elif name == "DDP GlobalQSGD 8 bits":
        compressor = GlobalQSGD(bits=8)
        ddp.register_comm_hook(compressor.ddp_state(), ddp_hook)
    return _Arm(name, ddp, [], optimizer, compressor, size)


def main(arguments: Sequence[str] | None = None) -> None:
    """Launches itself on several ranks, measures there, and prints on rank 0."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd bench step",
        description="Times training steps of a model's shape against plain Horovod and DDP.",
    )
    add_arguments(parser)
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument(
        "--arms", default="", help="only those with one of these names, or one of these words in "
        f"their name, separated by commas: {', '.join(ARMS)}; the first one is what others are "
        "compared with",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument(
        "--exchange", action="store_true", help="the exchange alone, with gradients ready"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the medians, as FILE.png")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    arms = chosen(options.arms)
    if options.exchange:
        arms = [name for name in arms if name not in DDP_ARMS]
    if not arms or options.repeats < 1:
        parser.error("--arms must leave something to measure, and --repeats be at least 1")
    if not is_rank():
        sys.exit(launch("hvd_gqsgd.bench.step", given, options.ranks, options.rate))
    hvd.init()
    torch.set_num_threads(1)
    if with_ddp := any(name in DDP_ARMS for name in arms):
        start_process_group(os.environ.get(INTERFACE))
    with progress_bar(options.repeats) as progress:
        result = measure(
            options.model, arms, options.repeats,
            exchange_alone=options.exchange, progress=progress,
        )  # fmt: skip
    if hvd.rank() == 0:
        if options.plot is not None:
            _plot(result, options.plot)
        if options.json:
            print(json.dumps(result))
        else:
            _show(result)
    if with_ddp:
        dist.destroy_process_group()


def chosen(words: str) -> list[str]:
    """The arms with one of these names, or else words in their name, separated by commas."""
    split = [word.strip() for word in words.split(",")]
    parts = [word for word in split if word not in ARMS]
    return [name for name in ARMS if name in split or any(part in name for part in parts)]


def start_process_group(interface: str | None) -> None:
    """PyTorch's, over Gloo, of all ranks of Horovod."""
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    store, address = None, torch.zeros(5, dtype=torch.int32)
    if hvd.rank() == 0:
        one_host = interface is None and hvd.local_size() == hvd.size()
        host = "127.0.0.1" if one_host else socket.gethostbyname(socket.gethostname())
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, 0, hvd.size(), is_master=True, wait_for_workers=False
        )
        address = torch.tensor([*socket.inet_aton(host), store.port], dtype=torch.int32)
    *host_bytes, port = hvd.broadcast(address, root_rank=0, name="bench.store").tolist()
    host = socket.inet_ntoa(bytes(host_bytes))
    store = store or dist.TCPStore(  # type: ignore[attr-defined]
        host, port, hvd.size(), is_master=False
    )
    dist.init_process_group("gloo", store=store, rank=hvd.rank(), world_size=hvd.size())


def _plot(result: dict[str, Any], file: Path) -> None:
    """Bars of the medians; lines from the fastest round to the slowest."""
    from matplotlib.figure import Figure

    ran = {name: arm for name, arm in result["arms"].items() if "error" not in arm}
    medians = [arm["ms"] for arm in ran.values()]
    spread = [
        [arm["ms"] - min(arm["rounds_ms"]) for arm in ran.values()],
        [max(arm["rounds_ms"]) - arm["ms"] for arm in ran.values()],
    ]
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(ran)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(ran), medians, xerr=spread, color="tab:blue", ecolor="gray")
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=f"{_title(result)}, {result['ranks']} ranks")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=110)


def _title(result: dict[str, Any]) -> str:
    what = {"step": "a step", "exchange": "the exchange alone"}[result["what"]]
    return f"{result['model']}: {what}"


def _show(result: dict[str, Any]) -> None:
    print(
        f"{_title(result)}; {result['parameters']:,} parameters in {result['tensors']} tensors, "
        f"{result['ranks']} ranks; medians of the slowest rank"
    )
    rows = []
    for name, arm in result["arms"].items():
        if "error" in arm:
            rows.append([name, "does not run", "", "", ""])
            continue
        low, high = min(arm["rounds_ms"]), max(arm["rounds_ms"])
        rows.append(
            [
                name, f"{arm['ms']:.1f}", f"{low:.0f} to {high:.0f}",
                f"{arm['times_faster']:.2f}", f"{arm['megabytes']:.1f}",
            ]
        )  # fmt: skip
    show_table(["", "ms", "rounds", "times faster", "MB"], rows)
    for name, arm in result["arms"].items():
        if "error" in arm:
            print(f"{name}: {arm['error']}")
    ran = [arm for arm in result["arms"].values() if "error" not in arm]
    if result["compute_ms"]:
        print(f"a step without any exchange: {result['compute_ms']:.1f} ms")
    print(
        f"rounds discarded, as others took the cores: {sum(arm['discarded'] for arm in ran)}; "
        f"most that others took in those that count: {max(max(a['load']) for a in ran):.2f} cores"
    )


if __name__ == "__main__":
    main()
