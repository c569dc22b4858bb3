"""A performance model of a training step. ``advice`` recommends a setting by it.

The n ranks are alike, and each has one link of its own; in ``node_model`` the ranks of a node share
one. An exchange of S bytes takes, by the performance model of Global-QSGD (arXiv 2305.18627), with
latency alpha, bandwidth beta and rate of reduction gamma:

    tree, in the paper   2 log2(n) alpha + 2 log2(n) S/beta + log2(n) S/gamma
    ring                 2 (n-1) alpha + 2 (n-1)/n S/beta + (n-1)/n S/gamma
    recursive doubling   log2(n) (alpha + S/beta + S/gamma)
    two phases           2 (n-1) alpha + 2 (n-1)/n S/beta

To these come the exchange of norms, the probes, the kernels, and Horovod's negotiation of each
operation. The module is pure Python: it works without PyTorch, Horovod and the native part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from hvd_gqsgd.tools.settings import (
    SETTINGS,
    Setting,
    mean_over_steps,
    possible,
)

__all__ = [
    "PRESETS",
    "Gradients",
    "Machine",
    "Parts",
    "Stages",
    "allreduce_seconds",
    "buckets_of",
    "chosen_stages",
    "exchange_seconds",
    "flat_parts",
    "parts_of_stages",
    "step_of",
    "step_seconds",
    "steps_of",
]


@dataclass(frozen=True)
class Machine:
    """One rank and its link, in seconds and bytes per second."""

    alpha: float
    """Latency of a message."""
    beta: float
    """Bandwidth of the link, in each direction."""
    beta_two_phase: float | None = None
    """Bandwidth of an Alltoall and an Allgather; None: ``beta``."""
    gamma: float = 5e9
    """Rate of reduction: bytes of operands per second."""
    operation: float = 2e-3
    """Horovod's time from an operation being ready to its start."""
    tensor: float = 20e-6
    """Horovod's time per tensor and step."""
    compressed_tensor: float = 100e-6
    """The compressor's own time per tensor and step."""
    norm: float = 0.14e-9
    """Block maximum, per element."""
    quantize: float = 0.21e-9
    """Per element."""
    dequantize: float = 0.17e-9
    """Per element."""
    choose: float = 0.2e-9
    """Choice of the largest element of each group by a leader, per element."""
    cast: float = 0.25e-9
    """Cast to float16 per element; the cast back takes the same."""
    copy: float = 0.1e-9
    """Copy to Horovod's fusion buffer, per byte."""
    exposed: float = 0.0
    """Share of the computing beside a transfer that delays the transfer, from 0 (spare cores) to 1
    (the cores that compute also send)."""
    inside: float = 10e9
    """Bandwidth within a node, in bytes per second, of each rank."""


_GPU = {"operation": 1e-3, "norm": 1.5e-12, "quantize": 2e-12, "dequantize": 2e-12,
        "cast": 2.5e-12, "copy": 1e-12, "gamma": 5e11}  # fmt: skip

PRESETS: Mapping[str, Machine] = {
    "nvlink": Machine(5e-6, 450e9, inside=300e9, **_GPU),
    "pcie": Machine(10e-6, 12e9, inside=12e9, **_GPU),
    "25gbe": Machine(20e-6, 25e9 / 8),
    "10gbe": Machine(30e-6, 10e9 / 8),
    "1gbe": Machine(50e-6, 1e9 / 8),
    "200mbit": Machine(200e-6, 200e6 / 8),
}
"""Machines by name. Those of ``nvlink`` and ``pcie`` are estimates: calibrate them."""


@dataclass(frozen=True)
class Gradients:
    """The gradients that are exchanged in a step."""

    elements: int
    tensors: int
    small_elements: int = 0
    """Elements of the tensors that are too small to be compressed."""
    small_tensors: int = 0
    """Number of these tensors."""

    @classmethod
    def of(cls, parameters: Iterable[Any], min_numel: int = 4096) -> Gradients:
        """The gradients of these parameters.

        Args:
            parameters: as of ``model.parameters()``, or numbers of elements. Parameters with
                ``requires_grad=False`` are left out.
            min_numel: tensors with fewer elements are not compressed.

        Raises:
            TypeError: an item is neither a tensor nor an int.
            ValueError: a number of elements is negative, or no parameter requires a gradient.
        """
        given = list(parameters)
        trained = [each for each in given if getattr(each, "requires_grad", True)]
        if given and not trained:
            raise ValueError(
                f"none of {len(given)} parameters has requires_grad=True: pass the parameters that "
                "are trained, or their numbers of elements"
            )
        sizes = [_numel(each) for each in trained]
        small = [size for size in sizes if size < min_numel]
        return cls(sum(sizes), len(sizes), sum(small), len(small))


BUCKET = 25 * 2**20
"""Bytes of float32 in a bucket."""

FUSED = 128 * 2**20
"""Most bytes that Horovod fuses into one operation."""

PROBE_BYTES = 56
"""Bytes that Horovod reduces in place of each compressed gradient."""


def _numel(parameter: Any) -> int:
    numel = parameter.numel() if hasattr(parameter, "numel") else parameter
    if isinstance(numel, bool) or not hasattr(numel, "__index__"):
        raise TypeError(
            "parameters must be tensors, as of model.parameters(), or ints, their numbers of "
            f"elements, got an item of type {type(parameter).__name__}"
        )
    if numel < 0:
        raise ValueError(f"a number of elements must be at least 0, got {numel}")
    return int(numel)


class Parts(NamedTuple):
    """Seconds of an exchange."""

    first: float
    """Before the first payload is sent."""
    travel: float
    """While payloads travel."""
    last: float
    """After the last one."""


class Stages(NamedTuple):
    """Seconds of the stages of one bucket."""

    messages: float
    """Messages before the codes, such as norms."""
    encode: float
    """Kernels before the codes."""
    codes: float
    """Messages of codes."""
    between: float
    """Kernels between the messages of codes."""
    decode: float
    """Kernels after the codes."""
    operations: tuple[int, int]
    """Operations up to the codes, and after these."""


def allreduce_seconds(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds of an Allreduce: a ring or recursive doubling, the faster of the two."""
    n, m = ranks, machine
    if n == 1:
        return 0.0
    doublings = math.ceil(math.log2(n))
    ring = 2 * (n - 1) * m.alpha + (n - 1) / n * bytes_ * (2 / m.beta + 1 / m.gamma)
    return min(ring, doublings * (m.alpha + bytes_ / m.beta + bytes_ / m.gamma))


def tree_seconds(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds of the paper's tree: 2 log2(n) alpha + 2 log2(n) S / beta + log2(n) S / gamma."""
    doublings = math.log2(ranks)
    return doublings * (2 * machine.alpha + 2 * bytes_ / machine.beta + bytes_ / machine.gamma)


def two_phase_seconds(bytes_: float, ranks: int, machine: Machine) -> float:
    """Seconds of an Alltoall and an Allgather."""
    beta = machine.beta_two_phase or machine.beta
    return 2 * (ranks - 1) * machine.alpha + 2 * (ranks - 1) / ranks * bytes_ / beta


def exchange_seconds(setting: Setting, gradients: Gradients, ranks: int, machine: Machine) -> float:
    """Seconds from all gradients to all means.

    Raises:
        ValueError: the lanes cannot hold the sum of this many ranks.
    """
    return mean_over_steps(setting, lambda each: sum(_parts(each, gradients, ranks, machine)))


def step_seconds(
    setting: Setting,
    gradients: Gradients,
    ranks: int,
    machine: Machine,
    forward: float,
    backward: float,
) -> float:
    """Seconds of a training step.

    The exchange begins with the gradients of the first bucket and overlaps with the rest of the
    backward pass.

    Args:
        setting, gradients, ranks, machine: the exchange.
        forward: seconds of the forward pass, and of the update, of one rank alone.
        backward: seconds of the backward pass of one rank alone.

    Raises:
        ValueError: the lanes cannot hold the sum of this many ranks.
    """

    def of_kind(kind: Setting) -> float:
        parts = _parts(kind, gradients, ranks, machine)
        return step_of(parts, kind, gradients, machine, forward, backward)

    return mean_over_steps(setting, of_kind)


def steps_of(
    gradients: Gradients, ranks: int, machine: Machine, forward: float, backward: float,
    settings: Sequence[Setting] = SETTINGS,
) -> dict[Setting, float]:  # fmt: skip
    """Seconds of a step with each setting that is possible; arguments as for ``step_seconds``."""
    return {
        setting: step_seconds(setting, gradients, ranks, machine, forward, backward)
        for setting in settings
        if possible(setting, ranks)
    }


def step_of(
    parts: Parts,
    setting: Setting,
    gradients: Gradients,
    machine: Machine,
    forward: float,
    backward: float,
) -> float:
    """Seconds of a training step, given the seconds of its exchange; see ``step_seconds``."""
    share = min(1.0, (BUCKET if setting.quantized else 0) / max(4 * gradients.elements, 1))
    beside = machine.exposed * (1 - share) * backward
    before = forward + share * backward + parts.first + parts.travel + beside
    return max(forward + backward, before) + parts.last


def buckets_of(gradients: Gradients) -> tuple[int, float]:
    """Number of buckets, and the elements of each."""
    elements = gradients.elements - gradients.small_elements
    buckets = max(1, math.ceil(4 * elements / BUCKET))
    return buckets, elements / buckets


def flat_parts(
    setting: Setting,
    gradients: Gradients,
    ranks: int,
    machine: Machine,
    allreduce: Callable[[float], float],
    two_phase: Callable[[float], float],
) -> Parts:
    """The exchange among all ranks.

    Args:
        setting, gradients, ranks, machine: the exchange.
        allreduce: seconds of an Allreduce, given its bytes.
        two_phase: seconds of an Alltoall and an Allgather, given their bytes.

    Raises:
        ValueError: the lanes cannot hold the sum of this many ranks.
    """
    g, m = gradients, machine
    if not setting.quantized:
        sent = g.elements * setting.bits / 8
        operations = max(1, math.ceil(sent / FUSED))
        cast = g.elements * m.cast if setting.bits == 16 else 0.0
        travel = operations * m.operation + allreduce(sent) + sent * m.copy
        return Parts(g.tensors * m.tensor + cast, travel, sent * m.copy + cast)
    if not possible(setting, ranks):
        raise ValueError(f"{setting.name} is too narrow for {ranks} ranks")
    _, each = buckets_of(g)
    kept, chosen = each * setting.keep, chosen_stages(setting, each, machine, allreduce)
    sent, received, twice = kept * setting.bits / 8, kept, setting.two_phase
    codes = two_phase(sent) if twice else allreduce(sent)
    if setting.disjoint:  # an Allgather is half of two phases
        codes, received, twice = two_phase(ranks * sent) / 2, ranks * kept, False
    stages = Stages(
        messages=chosen.messages + allreduce(4 * kept / setting.block_size),
        encode=chosen.encode + kept * (m.norm + m.quantize),
        codes=codes,
        between=kept * (m.dequantize + m.quantize) if twice else 0.0,
        decode=chosen.decode + received * m.dequantize,
        operations=(2 + chosen.operations[0], int(twice)),
    )
    return parts_of_stages(stages, g, m, allreduce)


def chosen_stages(
    setting: Setting, each: float, machine: Machine, allreduce: Callable[[float], float]
) -> Stages:
    """The seconds that a choice of elements adds to a bucket's stages; 0 if all are kept.

    Args:
        setting, machine: the exchange.
        each: elements of a bucket.
        allreduce: seconds of an Allreduce, given its bytes.
    """
    m = machine
    if setting.keep == 1 and not setting.differences:
        return Stages(0.0, 0.0, 0.0, 0.0, 0.0, (0, 0))
    messages, encode, decode = allreduce(128), each * m.norm, 4 * each * m.copy / 2
    if setting.led:  # places of a byte, and a sum and a copy of the residual
        messages += allreduce(each * setting.keep)
        encode += 12 * each * m.copy + each * m.choose
    if setting.differences:  # one is subtracted; three are changed, and one is multiplied
        encode += 12 * each * m.copy
        decode += 44 * each * m.copy
    return Stages(messages, encode, 0.0, 0.0, decode, (1 + setting.led, 0))


def parts_of_stages(
    stages: Stages, gradients: Gradients, machine: Machine, allreduce: Callable[[float], float]
) -> Parts:
    """The exchange of quantized gradients, bucket after bucket.

    Args:
        stages: the seconds of a bucket's stages.
        gradients, machine: the exchange.
        allreduce: seconds of an Allreduce, given its bytes.
    """
    g, m = gradients, machine
    tensors, (buckets, _) = g.tensors - g.small_tensors, buckets_of(g)
    python, (before, after) = tensors / buckets * m.compressed_tensor, stages.operations
    first = g.tensors * m.tensor + python + stages.encode + before * m.operation + stages.messages
    travel = (
        allreduce(4 * g.small_elements + PROBE_BYTES * tensors) + (1 + after) * m.operation
        + buckets * (stages.codes + stages.between) + (buckets - 1) * stages.messages
    )  # fmt: skip
    kernels = (buckets - 1) * (stages.encode + stages.decode + python)
    travel += m.exposed * kernels
    return Parts(first, max(travel, kernels), stages.decode + python)


def _parts(setting: Setting, gradients: Gradients, ranks: int, machine: Machine) -> Parts:
    return flat_parts(
        setting, gradients, ranks, machine,
        partial(allreduce_seconds, ranks=ranks, machine=machine),
        partial(two_phase_seconds, ranks=ranks, machine=machine),
    )  # fmt: skip
