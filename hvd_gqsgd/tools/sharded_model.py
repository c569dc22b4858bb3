"""The performance model of a training step under FSDP2, on CPUs over Gloo.

The modules are reduced and gathered one after another, and nothing of that overlaps with computing,
so a step is the sum of its parts. By the terms of ``cost_model``, for S bytes of a module and n
ranks, each collective once a module, and that of weights twice:

    reduce-scatter of Gloo, an Allreduce    2 (n-1) alpha + 2 (n-1)/n S/beta + (n-1)/n S/gamma
    all-gather, or an Alltoall of codes     (n-1) alpha + (n-1)/n S/beta

To these come, with codes, a header, the exchange of norms and the kernels, and FSDP's own copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvd_gqsgd.tools.cost_model import Machine, allreduce_seconds

__all__ = [
    "SHARDED_SETTINGS",
    "ShardedSetting",
    "gradient_seconds",
    "sharded_step_seconds",
    "weight_seconds",
]

HEADER = 128
"""Bytes that the ranks agree on before each message of codes."""

BLOCK = 1024
"""Elements that share a norm."""

GATHERS = 2
"""Times that a module is gathered in a step: in the forward pass and in the backward pass."""


@dataclass(frozen=True)
class ShardedSetting:
    """A way to exchange gradients and weights."""

    name: str
    bits: int | None = None
    """Of gradients in codes; None: they are not."""
    weight_bits: int | None = None
    """Of weights in codes; None: they are float32."""
    reduced_bytes: int = 4
    """Of an element of a gradient that is not in codes."""


SHARDED_SETTINGS = (
    ShardedSetting("FSDP2 fp32"),
    ShardedSetting("FSDP2 bf16 gradients", reduced_bytes=2),
    ShardedSetting("FSDP2 GlobalQSGD 8 bits", 8),
    ShardedSetting("FSDP2 GlobalQSGD 4 bits", 4),
    ShardedSetting("FSDP2 GlobalQSGD 8 bits and weights", 8, 8),
)
"""Those that are compared, by the names of arms of ``hvd-gqsgd bench step``."""


def scatter_seconds(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds of an Alltoall or an all-gather of so many bytes on each rank or of all ranks."""
    beta = machine.beta_two_phase or machine.beta
    return (ranks - 1) * machine.alpha + (ranks - 1) / ranks * bytes_ / beta


def gradient_seconds(
    setting: ShardedSetting, modules: Sequence[int], ranks: int, machine: Machine
) -> float:
    """Seconds of the reduction of modules with so many elements; 0 for one rank."""
    if ranks == 1:
        return 0.0
    m, total = machine, 0.0
    for elements in modules:
        if setting.bits is None:
            total += allreduce_seconds(setting.reduced_bytes * elements, ranks, m)
            continue
        total += (
            allreduce_seconds(HEADER, ranks, m)
            + allreduce_seconds(4 * elements / BLOCK, ranks, m)
            + scatter_seconds(elements * setting.bits / 8, ranks, m)
            + elements * (m.norm + m.quantize + m.dequantize)
        )
    return total


def weight_seconds(
    setting: ShardedSetting, modules: Sequence[int], ranks: int, machine: Machine
) -> float:
    """Seconds of all gathers of modules with so many elements in a step; 0 for one rank."""
    if ranks == 1:
        return 0.0
    m, total = machine, 0.0
    for elements in modules:
        if setting.weight_bits is None:
            total += scatter_seconds(4 * elements, ranks, m)
            continue
        sent = elements * setting.weight_bits / 8 + 4 * elements / BLOCK
        total += (
            allreduce_seconds(HEADER, ranks, m)
            + scatter_seconds(sent, ranks, m)
            + elements / ranks * (m.norm + m.quantize)
            + elements * m.dequantize
        )
    return GATHERS * total


def sharded_step_seconds(
    setting: ShardedSetting, modules: Sequence[int], ranks: int, machine: Machine, compute: float
) -> float:
    """Seconds of a training step.

    Args:
        setting: that of gradients and weights.
        modules: the elements of each module.
        ranks: how many there are.
        machine: one of them, and its link.
        compute: seconds of the forward pass, the backward pass and the update of one rank alone.
    """
    copies = 4 * sum(modules) * (GATHERS + 1) * machine.copy
    return (
        compute + copies
        + gradient_seconds(setting, modules, ranks, machine)
        + weight_seconds(setting, modules, ranks, machine)
    )  # fmt: skip
