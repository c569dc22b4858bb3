"""The performance model of a training step on nodes of several ranks, with one link a node.

On N nodes of L ranks, n = N L in all, and by the terms of ``cost_model``: beta is the bandwidth of
a node's link, and a rank sends to others of its node at the rate ``inside``. The ranks are in the
order of their nodes. A node sends over its link, of S bytes of a bucket:

    Allreduce in a ring                    2 (n-1)/n S
    Allreduce, sums within nodes first     2 (N-1)/N S
    two phases, among all ranks            L (n-L)/n S + (n-1)/n S
    by node, codes                         2 (N-1)/N S

An Allreduce takes the least of the first three, the third as Open MPI does. There b is the smaller
of beta and ``inside``, and A(N) the time of N ranks by ``cost_model``:

    ring                  2 (n-1) alpha + 2 (n-1)/n S/b + (n-1)/n S/gamma
    recursive doubling    log2(N) (alpha + L S/beta) + log2(L) (alpha + S/inside) + log2(n) S/gamma
    sums within nodes     log2(L) (2 alpha + 2 S/inside + S/gamma) + A(N)
    Alltoall              (n-1) alpha + max(L (n-L)/n S/beta, (n-1)/n S/inside)
    Allgather             (n-1) alpha + (n-1)/n S/b
    by node, within       (L-1) alpha + (L-1)/L S/inside; for float32, and for results
    by node, between      2 (N-1) alpha + 2 (N-1)/N S/beta

By node a rank also cuts a bucket of E elements in parcels (4 E copied bytes), adds up a shard (at
gamma, (L-1)/L 4 E bytes), quantizes E/L elements, averages as many, quantizes E/n of these again,
and decodes E. Hosts, gradients, norms, codes, means and results are an operation of Horovod each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from hvd_gqsgd.tools import cost_model
from hvd_gqsgd.tools.cost_model import Gradients, Machine, Parts, Stages
from hvd_gqsgd.tools.settings import SETTINGS, Setting, mean_over_steps, possible

__all__ = [
    "Cluster",
    "allgather_seconds",
    "allreduce_seconds",
    "alltoall_seconds",
    "exchange_seconds",
    "link_bytes",
    "step_seconds",
    "steps_of",
    "two_phase_seconds",
]


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal numbers of ranks."""

    nodes: int
    per_node: int
    """Ranks of a node."""

    @property
    def ranks(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.per_node

    @property
    def flat(self) -> bool:
        """Whether an exchange by node equals the flat one: with one node, or one rank on each."""
        return self.nodes == 1 or self.per_node == 1


def link_bytes(setting: Setting, bytes_: float, cluster: Cluster, by_node: bool) -> float:
    """Bytes that a node sends over its link for a bucket; for an Allreduce, the least."""
    n, nodes, per_node = cluster.ranks, cluster.nodes, cluster.per_node
    if nodes > 1 and setting.two_phase and (not by_node or cluster.flat):
        return (per_node * (n - per_node) + n - 1) / n * bytes_
    return 2 * (nodes - 1) / nodes * bytes_


def allreduce_seconds(bytes_: float, cluster: Cluster, machine: Machine) -> float:
    """Seconds of an Allreduce among all ranks, the fastest one."""
    n, m = cluster.ranks, machine
    if n == 1:
        return 0.0
    beta = _slowest(m.beta, cluster, m)
    ring = 2 * (n - 1) * m.alpha + (n - 1) / n * bytes_ * (2 / beta + 1 / m.gamma)
    between, within = (math.ceil(math.log2(k)) for k in (cluster.nodes, cluster.per_node))
    inside, added = within * (m.alpha + bytes_ / m.inside), bytes_ / m.gamma
    crossing = between * (m.alpha + cluster.per_node * bytes_ / m.beta)
    doubling = crossing + inside + (between + within) * added
    sums = 2 * inside + within * added + cost_model.allreduce_seconds(bytes_, cluster.nodes, m)
    return min(ring, doubling, sums)


def alltoall_seconds(bytes_: float, cluster: Cluster, machine: Machine) -> float:
    """Seconds of an Alltoall among all ranks, with ``bytes_`` on each rank."""
    n, per_node, m = cluster.ranks, cluster.per_node, machine
    crossing = per_node * (n - per_node) / n * bytes_ / (m.beta_two_phase or m.beta)
    inside = (n - 1) / n * bytes_ / m.inside if per_node > 1 else 0.0
    return (n - 1) * m.alpha + max(crossing, inside)


def allgather_seconds(bytes_: float, cluster: Cluster, machine: Machine) -> float:
    """Seconds of an Allgather among all ranks, with ``bytes_`` of all ranks together."""
    n, m = cluster.ranks, machine
    beta = _slowest(m.beta_two_phase or m.beta, cluster, m)
    return (n - 1) * m.alpha + (n - 1) / n * bytes_ / beta


def two_phase_seconds(bytes_: float, cluster: Cluster, machine: Machine) -> float:
    """Seconds of an Alltoall and an Allgather among all ranks."""
    return alltoall_seconds(bytes_, cluster, machine) + allgather_seconds(bytes_, cluster, machine)


def exchange_seconds(
    setting: Setting, gradients: Gradients, cluster: Cluster, machine: Machine, by_node: bool
) -> float:
    """Seconds from all gradients to all means.

    Args:
        setting: by node its codes go in two phases.
        gradients, cluster, machine: the exchange.
        by_node: send codes between nodes only; without quantization it has no effect.

    Raises:
        ValueError: the lanes cannot hold the sum of all ranks.
    """
    return mean_over_steps(
        setting, lambda each: sum(_parts(each, gradients, cluster, machine, by_node))
    )


def step_seconds(
    setting: Setting,
    gradients: Gradients,
    cluster: Cluster,
    machine: Machine,
    by_node: bool,
    forward: float,
    backward: float,
) -> float:
    """Seconds of a training step; see ``cost_model.step_seconds`` and ``exchange_seconds``."""

    def of_kind(kind: Setting) -> float:
        parts = _parts(kind, gradients, cluster, machine, by_node)
        return cost_model.step_of(parts, kind, gradients, machine, forward, backward)

    return mean_over_steps(setting, of_kind)


def steps_of(
    gradients: Gradients, cluster: Cluster, machine: Machine, forward: float, backward: float,
    settings: Sequence[Setting] = SETTINGS,
) -> dict[Setting, float]:  # fmt: skip
    """Seconds of a step with each setting that is possible, flat and by node, with such names."""
    return {
        way: step_seconds(way, gradients, cluster, machine, way.by_node, forward, backward)
        for setting in settings
        if possible(setting, cluster.ranks)
        for way in _ways(setting, cluster)
    }


def _ways(setting: Setting, cluster: Cluster) -> list[Setting]:
    """The setting flat and, where codes take two phases between nodes, by node."""
    if not setting.quantized:
        return [setting]
    options = f"{setting.options}, hierarchy="
    flat = replace(setting, name=f"{setting.name}, flat", options=f'{options}"flat"')
    if cluster.flat or not setting.two_phase or setting.keep < 1:
        return [flat]
    name = f"{setting.name}, by node"
    return [flat, replace(setting, name=name, options=f'{options}"node"', by_node=True)]


def _slowest(beta: float, cluster: Cluster, machine: Machine) -> float:
    """The slowest link of a ring of all ranks, given the bandwidth of those between nodes."""
    if cluster.per_node == 1:
        return beta
    return machine.inside if cluster.nodes == 1 else min(beta, machine.inside)


def _parts(
    setting: Setting, gradients: Gradients, cluster: Cluster, machine: Machine, by_node: bool
) -> Parts:
    allreduce = partial(allreduce_seconds, cluster=cluster, machine=machine)
    if not (by_node and setting.quantized) or cluster.flat:
        two_phase = partial(two_phase_seconds, cluster=cluster, machine=machine)
        return cost_model.flat_parts(
            setting, gradients, cluster.ranks, machine, allreduce, two_phase
        )
    m, nodes, per_node = machine, cluster.nodes, cluster.per_node
    _, each = cost_model.buckets_of(gradients)
    codes, own = each * setting.bits / 8, each / per_node

    def within(bytes_: float) -> float:
        return (per_node - 1) * (m.alpha + bytes_ / per_node / m.inside)

    cut_and_add = 4 * each * m.copy + (per_node - 1) * 4 * own / m.gamma
    stages = Stages(
        messages=allreduce(8 * cluster.ranks) + within(4 * each)
        + allreduce(4 * each / setting.block_size),
        encode=cut_and_add + own * (m.norm + m.quantize),
        codes=cost_model.two_phase_seconds(codes, nodes, m) + within(codes),
        between=own * m.dequantize + own / nodes * m.quantize,
        decode=each * m.dequantize,
        operations=(4, 2),
    )  # fmt: skip
    return cost_model.parts_of_stages(stages, gradients, m, allreduce)
