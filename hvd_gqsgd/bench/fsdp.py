"""Training steps of a model's shape under FSDP2, with PyTorch's collectives and with codes.

Each layer is a module of ``fully_shard``, whose weights are gathered in the forward pass and in the
backward pass. On CPUs these collectives do not overlap with computing.
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.bench.gradients import Named, layers_of
from hvd_gqsgd.bench.operators import FSDP_BF16, FSDP_OURS

__all__ = ["FsdpArm"]

WARM_UP = 3
"""Steps before the first that counts: one, and two more, as in ``rounds.interleaved``."""


class FsdpArm:
    """One way to train under FSDP2.

    Args:
        name: one of ``operators.FSDP_ARMS``.
        model: one of ``gradients.MODELS``.
    """

    def __init__(self, name: str, model: str) -> None:
        self.label = name
        self.network = nn.Sequential(*(_Layer(layer) for layer in layers_of(model)))
        mesh = init_device_mesh("cpu", (hvd.size(),))
        reduced = torch.bfloat16 if name == FSDP_BF16 else None
        policy = MixedPrecisionPolicy(reduce_dtype=reduced)
        for layer in self.network:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(self.network, mesh=mesh, mp_policy=policy)
        self._compressor: GlobalQSGD | None = None
        if name in FSDP_OURS:
            gradients, weights = FSDP_OURS[name]
            self._compressor = GlobalQSGD(**gradients)
            self._compressor.fsdp(self.network, **weights)
        self._optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3)
        self._now = {"gradient": 0.0, "weight": 0.0}
        self._steps: list[dict[str, float]] = []
        self._bytes: dict[str, int] = defaultdict(int)
        for layer in self.network:
            group: Any = layer._get_fsdp_state()._fsdp_param_group  # type: ignore[operator]
            group._reduce_scatter_comm = _Timed(group._reduce_scatter_comm, self, "gradient")
            group._all_gather_comm = _Timed(group._all_gather_comm, self, "weight")

    def step(self) -> None:
        """Forward, backward, exchange and update."""
        self._now = dict.fromkeys(self._now, 0.0)
        self._optimizer.zero_grad()
        # FSDP reduces the gradients of a layer once the gradient of its input is computed.
        self.network(torch.ones((), requires_grad=True)).backward()
        self._optimizer.step()
        self._steps.append(self._now)

    def exchange(self) -> None:
        """FSDP2 exchanges gradients only within the backward pass."""
        raise NotImplementedError

    def get_ready(self, exchange_alone: bool) -> None:
        """Does nothing: the backward pass computes the gradients."""

    def spent(self, part: str, seconds: float, nbytes: int) -> None:
        """Counts a collective of gradients or of weights."""
        self._now[part] += seconds
        self._bytes[part] += nbytes

    def megabytes_of(self, part: str) -> float:
        """Megabytes of gradients or of weights that a rank passes to collectives in a step."""
        nbytes = self._bytes[part]
        if self._compressor is not None:
            stats = self._compressor.stats()
            ours = stats.bytes_on_wire if part == "gradient" else stats.weight_bytes_on_wire
            nbytes = ours or nbytes
        return nbytes / max(len(self._steps), 1) / 1e6

    def megabytes(self) -> float:
        """Megabytes of gradients and weights that a rank passes to collectives in a step."""
        return self.megabytes_of("gradient") + self.megabytes_of("weight")

    def parts(self) -> dict[str, float]:
        """Median milliseconds of the slowest rank, and megabytes, by part; a collective call."""
        found: dict[str, float] = {}
        for part in self._now:
            own = np.median([step[part] for step in self._steps[WARM_UP:] or self._steps])
            message = torch.tensor([own * 1e3], dtype=torch.float64)
            slowest = hvd.allreduce(message, op=hvd.Max, name=f"bench.{part}")
            found |= {f"{part}_ms": slowest.item(), f"{part}_megabytes": self.megabytes_of(part)}
        return found


class _Layer(nn.Module):
    """Adds a number that is linear in the parameters; its gradient differs between ranks."""

    def __init__(self, layer: Sequence[Named]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(shape) for _, shape in layer)
        self.slopes = [_slopes(math.prod(shape)) for _, shape in layer]

    def forward(self, x: Tensor) -> Tensor:
        dots = [
            torch.dot(p.flatten(), slope)
            for p, slope in zip(self.weights, self.slopes, strict=True)
        ]
        return x + torch.stack(dots).sum()


@functools.cache  # shared by all arms and layers
def _slopes(numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(hvd.rank()))


class _Timed:
    """Wraps a communication of FSDP, and times it."""

    def __init__(self, comm: Any, arm: FsdpArm, part: str) -> None:
        self.allocate = comm.allocate
        self._comm, self._arm, self._part = comm, arm, part

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **given: Any) -> None:
        larger = max(output_tensor.nbytes, input_tensor.nbytes)
        begin = time.perf_counter()
        work = self._comm(output_tensor=output_tensor, input_tensor=input_tensor, **given)
        if work is not None:
            work.wait()
        self._arm.spent(self._part, time.perf_counter() - begin, larger)
