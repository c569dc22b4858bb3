"""The performance model of a training step under FSDP2, on CPUs over Gloo.

The modules are reduced and gathered one after another, and nothing of that overlaps with computing,
so a step is the sum of its parts. A module of S bytes takes, once for gradients and twice for
weights, by the terms of ``cost_model`` for one rank a node, and of ``node_model`` for several:

    reduce-scatter of Gloo, an Allreduce    2 (n-1) alpha + 2 (n-1)/n S/beta + (n-1)/n S/gamma
    all-gather, or an Alltoall of codes     (n-1) alpha + (n-1)/n S/beta

To these come, with codes, a header, the exchange of norms and the kernels, and FSDP's own copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvd_gqsgd.tools.accuracy import relative_error
from hvd_gqsgd.tools.advice import MARGIN, choose
from hvd_gqsgd.tools.cost_model import Machine
from hvd_gqsgd.tools.node_model import (
    Cluster,
    allgather_seconds,
    allreduce_seconds,
    alltoall_seconds,
)
from hvd_gqsgd.tools.settings import (
    BLOCKS_4,
    EXPONENTIAL_8,
    FP32,
    LINEAR_4,
    TWO_PHASE_8,
    Setting,
)

__all__ = [
    "SHARDED_SETTINGS",
    "ShardedSetting",
    "gradient_seconds",
    "recommend_sharded",
    "sharded_step_seconds",
    "weight_seconds",
]

HEADER = 128
"""Bytes that the ranks agree on before each message of codes."""

BLOCK = 1024
"""Weights that share a norm."""

GATHERS = 2
"""Times that a module is gathered in a step: in the forward pass and in the backward pass."""


@dataclass(frozen=True)
class ShardedSetting:
    """A way to exchange gradients and weights."""

    name: str
    gradients: Setting
    """The setting of gradients, which are rounded once."""
    weight_bits: int | None = None
    """Bits of a weight on the wire; None: weights are float32."""

    @property
    def call(self) -> str:
        """The expression that chooses this setting for a ``model``."""
        if not self.gradients.quantized:
            reduced = "bfloat16" if self.gradients == BF16 else "float32"
            return f"MixedPrecisionPolicy(reduce_dtype=torch.{reduced})"
        weights = "" if self.weight_bits is None else f", weight_bits={self.weight_bits}"
        options = self.gradients.options.removesuffix(', exchange="two_phase"')
        return f"GlobalQSGD({options}).fsdp(model{weights})"

    def relative_error(self, ranks: int) -> float:
        """Expected error of the mean gradient; see ``accuracy``."""
        return relative_error(self.gradients, ranks, one_phase=True)


BF16 = Setting("bf16", 16, quantized=False, mantissa=7)

SHARDED_SETTINGS = (
    ShardedSetting("FSDP2 fp32", FP32),
    ShardedSetting("FSDP2 bf16 gradients", BF16),
    ShardedSetting("FSDP2 GlobalQSGD 8 bits", TWO_PHASE_8),
    ShardedSetting("FSDP2 GlobalQSGD 4 bits", LINEAR_4),
    ShardedSetting("FSDP2 GlobalQSGD 4 bits per block", BLOCKS_4),
    ShardedSetting("FSDP2 GlobalQSGD exponential", EXPONENTIAL_8),
    ShardedSetting("FSDP2 GlobalQSGD 8 bits and weights", TWO_PHASE_8, 8),
)
"""The settings that are compared. Arms of ``hvd-gqsgd bench step`` have the same names."""


def gradient_seconds(
    setting: ShardedSetting, modules: Sequence[int], cluster: Cluster, machine: Machine
) -> float:
    """Seconds to reduce the gradients of modules of these sizes; 0 for one rank."""
    if cluster.ranks == 1:
        return 0.0
    m, total, way = machine, 0.0, setting.gradients
    for elements in modules:
        sent = elements * way.bits / 8
        if not way.quantized:
            total += allreduce_seconds(sent, cluster, m)
            continue
        total += (
            allreduce_seconds(HEADER, cluster, m)
            + allreduce_seconds(4 * elements / way.block_size, cluster, m)
            + alltoall_seconds(sent, cluster, m)
            + elements * (m.norm + m.quantize + m.dequantize)
        )
    return total


def weight_seconds(
    setting: ShardedSetting, modules: Sequence[int], cluster: Cluster, machine: Machine
) -> float:
    """Seconds of all gathers in a step of modules of these sizes; 0 for one rank."""
    if cluster.ranks == 1:
        return 0.0
    m, total = machine, 0.0
    for elements in modules:
        if setting.weight_bits is None:
            total += allgather_seconds(4 * elements, cluster, m)
            continue
        sent = elements * setting.weight_bits / 8 + 4 * elements / BLOCK
        total += (
            allreduce_seconds(HEADER, cluster, m)
            + allgather_seconds(sent, cluster, m)
            + elements / cluster.ranks * (m.norm + m.quantize)
            + elements * m.dequantize
        )
    return GATHERS * total


def sharded_step_seconds(
    setting: ShardedSetting,
    modules: Sequence[int],
    cluster: Cluster,
    machine: Machine,
    compute: float,
) -> float:
    """Seconds of a training step.

    Args:
        setting: the setting of gradients and weights.
        modules: the elements of each module.
        cluster: the nodes and their ranks.
        machine: a rank and the link of its node.
        compute: seconds of the forward pass, the backward pass and the update of one rank alone.
    """
    copies = 4 * sum(modules) * (GATHERS + 1) * machine.copy
    return (
        compute + copies
        + gradient_seconds(setting, modules, cluster, machine)
        + weight_seconds(setting, modules, cluster, machine)
    )  # fmt: skip


def recommend_sharded(steps: Mapping[ShardedSetting, float], ranks: int) -> str:
    """A recommendation for FSDP2, as a sentence.

    Args:
        steps: the seconds of a step with each of ``SHARDED_SETTINGS``.
        ranks: number of ranks.
    """
    stock = SHARDED_SETTINGS[0]
    best = choose(steps, stock, lambda setting: setting.relative_error(ranks))
    if best == stock or ranks == 1:
        return f"FSDP2: do not compress, as no setting saves more than {MARGIN:.0%} of a step."
    return (
        f"FSDP2: use {best.call}: a step of {steps[best] * 1e3:.0f} ms instead of "
        f"{steps[stock] * 1e3:.0f} ms, {steps[stock] / steps[best]:.1f} times faster than fp32."
    )
