"""Training steps of a model's shape, under Horovod, DDP and FSDP2, with and without GlobalQSGD.

The model computes one dot product per parameter, so that the exchange takes nearly all of the time;
``digits`` is a small CNN that computes what it does in training.
It overlaps with the backward pass as in training. Each arm has its own copy of the parameters.
"""

from __future__ import annotations

import math
import os
import resource
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from hvd_gqsgd import GlobalQSGD, ddp_hook
from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.bench.digits import Digits
from hvd_gqsgd.bench.gradients import shapes_of
from hvd_gqsgd.bench.operators import AUTO_DDP, DDP_ARMS, FP16, FSDP_ARMS, OURS
from hvd_gqsgd.bench.rounds import MOST_LOAD, interleaved, progress_bar

if TYPE_CHECKING:
    from hvd_gqsgd.bench.fsdp import FsdpArm

__all__ = ["Arm", "make_arm", "measure", "run", "start_process_group"]

_T = TypeVar("_T")

COMPUTE = "compute"
"""A step without any exchange."""

MOST_STEPS = 100
"""Steps that ``bits="auto"`` may take to choose a setting before it is timed."""


def run(
    model: str,
    arms: Sequence[str],
    repeats: int,
    *,
    exchange_alone: bool = False,
    most_load: float = MOST_LOAD,
    interface: str | None = None,
) -> dict[str, Any]:
    """Initializes Horovod and, for arms of DDP and FSDP2, a process group, and returns
    ``measure``'s result.

    Args:
        interface: network interface of this rank; None: Gloo chooses one.
    """
    # Each arm has names of its own; Horovod remembers the messages of 1024 names, and warns then.
    os.environ.setdefault("HOROVOD_CACHE_CAPACITY", "16384")
    hvd.init()
    torch.set_num_threads(1)
    with_group = any(name in (*DDP_ARMS, *FSDP_ARMS) for name in arms)
    if with_group:
        start_process_group(interface)
    with progress_bar(repeats) as progress:
        result = measure(
            model, arms, repeats,
            exchange_alone=exchange_alone, most_load=most_load, progress=progress,
            interface=interface,
        )  # fmt: skip
    if with_group:
        dist.destroy_process_group()
    return result


def measure(
    model: str,
    arms: Sequence[str],
    repeats: int,
    *,
    exchange_alone: bool = False,
    most_load: float = MOST_LOAD,
    progress: Callable[[], object] = lambda: None,
    interface: str | None = None,
) -> dict[str, Any]:
    """Times a step of each arm on all ranks of Horovod; a collective call.

    Args:
        model: one of ``gradients.MODELS``.
        arms: of ``operators.ARMS``; those of DDP and FSDP2 need a process group.
        repeats: number of rounds that count.
        exchange_alone: time only the exchange, with gradients ready; for Horovod's arms.
        most_load: cores that other processes may use in a round that counts.
        progress: called after each round.
        interface: network interface of this rank, whose bytes are counted; None: no count.

    Returns:
        ``arms``: by name, ``ms`` and ``rounds_ms`` of the slowest rank (the median and all
        rounds), ``times_faster`` than the first arm, ``megabytes`` that a rank passed to
        collectives, ``link_megabytes`` that a host sent in a step by its interface (the most of any
        host; 0 if they were not counted), ``load`` by other processes, and the number of rounds
        ``discarded``; or the ``error`` of an arm that does not run. Arms of FSDP2 are compared with
        the first of them, and have ``gradient_ms``, ``gradient_times_faster`` and
        ``gradient_megabytes`` of the reduction alone, and the same of weights. ``compute_ms``: a
        step without any exchange.
        ``peak_megabytes``: the peak memory of a rank, of all arms together. And ``model``,
        ``ranks``, ``hosts``, ``tensors``, ``parameters``, and ``what`` was timed, "step" or
        "exchange".
    """
    made: dict[str, Arm | FsdpArm] = {}
    errors = {}
    for name in arms:
        try:
            arm = _together(partial(make_arm, name, model))
            _together(arm.step)
            if isinstance(arm, Arm):
                _together(partial(arm.settle, exchange_alone))
            made[name] = arm
        except Exception as error:  # reported as the result of this arm
            errors[name] = f"{type(error).__name__}: {error}"
    timed: dict[str, Arm | FsdpArm] = dict(made)
    if not exchange_alone:
        alone = _network(model)
        timed[COMPUTE] = Arm("", alone, [], _optimizer(alone), None, 0)
    calls = {name: arm.exchange if exchange_alone else arm.step for name, arm in timed.items()}
    links = {name: _Link(interface) for name in calls}
    timings = interleaved(
        {name: partial(links[name].count, call) for name, call in calls.items()},
        repeats,
        prepare=lambda name: timed[name].get_ready(exchange_alone),
        progress=progress,
        most_load=most_load,
    )
    compute = timings.pop(COMPUTE).median * 1e3 if not exchange_alone else 0.0
    arms_: dict[str, dict[str, Any]] = {
        name: {
            "ms": timing.median * 1e3,
            "rounds_ms": [seconds * 1e3 for seconds in timing.seconds],
            "load": timing.load,
            "discarded": timing.discarded,
            "megabytes": made[name].megabytes(),
            "link_megabytes": links[name].megabytes(),
        }
        for name, timing in timings.items()
    }
    for section in (
        [name for name in arms_ if name not in FSDP_ARMS],
        [name for name in arms_ if name in FSDP_ARMS],
    ):
        for name in section:
            arm = made[name]
            if not isinstance(arm, Arm):
                arms_[name] |= arm.parts()
            for kind in ("", "gradient_", "weight_"):
                if f"{kind}ms" in arms_[name]:
                    first = arms_[section[0]][f"{kind}ms"]
                    arms_[name][f"{kind}times_faster"] = first / arms_[name][f"{kind}ms"]
    tensors = shapes_of(model)
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6])
    return {
        "peak_megabytes": hvd.allreduce(peak, op=hvd.Max, name="bench.peak").item(),
        "model": model,
        "ranks": hvd.size(),
        "hosts": hvd.size() // hvd.local_size(),
        "tensors": len(tensors),
        "parameters": sum(math.prod(shape) for _, shape in tensors),
        "what": "exchange" if exchange_alone else "step",
        "compute_ms": compute,
        "arms": arms_ | {name: {"error": text} for name, text in errors.items()},
    }


class _Link:
    """Counts the bytes that this host sends during calls."""

    def __init__(self, interface: str | None) -> None:
        self._interface = interface
        self._bytes = self._calls = 0

    def count(self, call: Callable[[], object]) -> None:
        """Calls between barriers, as other ranks of the host use the same interface."""
        if self._interface is None:
            call()
            return
        before = self._sent()
        call()
        hvd.barrier()
        self._bytes += self._sent() - before
        self._calls += 1

    def megabytes(self) -> float:
        """Megabytes per call of the host that sends most."""
        mean = torch.tensor([self._bytes / max(self._calls, 1) / 1e6])
        return float(hvd.allreduce(mean, op=hvd.Max, name="bench.link"))

    def _sent(self) -> int:
        for line in Path("/proc/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == self._interface:
                return int(counts.split()[8])
        raise RuntimeError(f"there is no network interface {self._interface!r}")


def _together(call: Callable[[], _T]) -> _T:
    """Returns the result of a call; raises on all ranks if it raises on one."""
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
    """A model with a loss that is linear in the parameters; its gradient differs between ranks."""

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


def _network(model: str) -> _Model | Digits:
    return Digits(hvd.rank()) if model == "digits" else _Model(model)


@dataclass
class Arm:
    """A way to train, and the state of its model."""

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
        """Exchanges gradients that are ready, in the order of a backward pass.

        Horovod's optimizer does the same in the order of a set.
        """
        handles = []
        for name, parameter in reversed(self.named):
            assert parameter.grad is not None
            sent, context = self.compression.compress(parameter.grad)
            handle = hvd.allreduce_async(sent, name=f"{self.label}.{name}")
            handles.append((parameter, handle, context))
        for parameter, handle, context in handles:
            parameter.grad = self.compression.decompress(hvd.synchronize(handle), context)

    @property
    def conductor(self) -> Conductor | None:
        """Chooses the setting of an arm with ``bits="auto"``."""
        steps = getattr(self.compression, "_steps", None)
        return steps if isinstance(steps, Conductor) else None

    def settle(self, exchange_alone: bool) -> None:
        """Trains until ``bits="auto"`` has chosen a setting."""
        for _ in range(MOST_STEPS):
            if self.conductor is None or self.conductor.settled:
                return
            self.get_ready(exchange_alone)
            if exchange_alone:
                self.exchange()
            else:
                self.step()

    def get_ready(self, exchange_alone: bool) -> None:
        """Prepares the next call: sets the gradients, if the exchange alone is timed."""
        if exchange_alone:
            assert isinstance(self.network, _Model | Digits)
            slopes = self.network.slopes.values()
            for parameter, slope in zip(self.network.parameters(), slopes, strict=True):
                parameter.grad = slope.view_as(parameter).clone()

    def megabytes(self) -> float:
        """Megabytes that a rank passes to collectives in a step."""
        if isinstance(self.compression, GlobalQSGD):
            stats = self.compression.stats()
            wire = stats.compressed_bytes_on_wire + stats.bypassed_bytes
            return wire / max(stats.steps, 1) / 1e6
        elements = sum(p.numel() for p in self.network.parameters())
        return elements * self.bytes_an_element / 1e6


def make_arm(name: str, model: str) -> Arm | FsdpArm:
    """An arm of ``operators.ARMS`` for one of ``gradients.MODELS``."""
    if name in FSDP_ARMS:
        from hvd_gqsgd.bench.fsdp import FsdpArm  # takes seconds

        return FsdpArm(name, model)
    network = _network(model)
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
    return Arm(name, network, named, optimizer, compression, 2 if name == FP16 else 4)


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-3)


def _make_ddp(name: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> Arm:
    if not dist.is_initialized():
        raise RuntimeError("arms of DDP need a process group: call start_process_group() first")
    # PowerSGD's hook starts collectives from callbacks of others. With two buckets in flight the
    # ranks would start them in different orders, and Gloo would abort the program.
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
    elif name in ("DDP GlobalQSGD 8 bits", AUTO_DDP):
        compressor = GlobalQSGD(bits="auto" if name == AUTO_DDP else 8)
        ddp.register_comm_hook(compressor.ddp_state(), ddp_hook)
    return Arm(name, ddp, [], optimizer, compressor, size)


def start_process_group(interface: str | None) -> None:
    """Initializes PyTorch's default process group, over Gloo, with all ranks of Horovod.

    Args:
        interface: network interface of this rank; None: Gloo chooses one.
    """
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
