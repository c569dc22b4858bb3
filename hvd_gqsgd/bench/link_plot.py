"""The figures of ``hvd-gqsgd model`` over link speed: ``--plot`` and ``--plot-links``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_gqsgd.bench.figure import STYLES, draw, log_ticks, new_figure, save
from hvd_gqsgd.bench.networks import Network
from hvd_gqsgd.tools.advice import break_even, recommended
from hvd_gqsgd.tools.cost_model import PRESETS, Machine, allreduce_seconds, steps_of
from hvd_gqsgd.tools.settings import BLOCKS_4, FP16, FP32, LINEAR_8, TWO_PHASE_8, Setting, possible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_gains", "plot_links", "power_sgd_seconds"]

RANK = 4

POWER_SGD = 16e-9
"""Arithmetic of PyTorch's ``powerSGD_hook`` of rank 4, in seconds per element.

Measured with ResNet-50's gradients, one rank and one thread, on an AMD EPYC with AVX2. Two ranks on
two cores take longer: the step of 810 ms in BENCHMARKS.md corresponds to about 27e-9.
"""

GBIT = 1e9 / 8
"""Bytes per second of 1 Gbit/s."""


def power_sgd_seconds(
    shapes: Sequence[Sequence[float]], ranks: int, machine: Machine, compute: float
) -> float:
    """Seconds of a step with PowerSGD of rank 4 in one bucket, so that nothing overlaps.

    As in PyTorch's hook, a tensor is sent uncompressed unless it is more than twice as large as its
    factors.
    """
    factors = rest = 0.0
    for shape in shapes:
        rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        if 2 * RANK * (rows + columns) < rows * columns:
            factors += RANK * (rows + columns)
        else:
            rest += rows * columns
    elements = sum(map(math.prod, shapes))
    sent = sum(allreduce_seconds(4 * part, ranks, machine) for part in (rest, factors / 2))
    sent += allreduce_seconds(4 * factors / 2, ranks, machine)
    return compute + POWER_SGD * elements + sent


def plot_links(network: Network, ranks: int, compute: float, machine: Machine, file: Path) -> None:
    """Draws the time of a step with each compressor, over the bandwidth of each rank's link.

    Marks the links of ``PRESETS``, the recommended setting, at the machine's link by a star, and
    the bandwidth below which compression is recommended.

    Args:
        network: the parameters.
        ranks: number of ranks.
        compute: seconds of the forward and the backward pass; the latter takes two thirds.
        machine: a rank and its link.
        file: the figure to write.
    """
    machines = _with_links(machine, 0.1, 100)
    speeds = [m.beta / GBIT for m in machines]
    eight = LINEAR_8 if possible(LINEAR_8, ranks) else TWO_PHASE_8
    arms = {
        "fp32": FP32, "fp16": FP16, "GlobalQSGD, 8 bits": eight,
        "GlobalQSGD, 4 bits per block": BLOCKS_4,
    }  # fmt: skip

    def steps_on(there: Machine) -> dict[Setting, float]:
        return steps_of(network.gradients, ranks, there, compute / 3, 2 * compute / 3)

    steps = [steps_on(there) for there in machines]
    figure, (axes,) = new_figure(4.6)
    best = [1e3 * each[recommended(each, ranks)] for each in steps]
    axes.plot(speeds, best, color="0.8", linewidth=9, label="recommended", zorder=1)
    for style, (label, setting) in zip(STYLES, arms.items(), strict=False):
        draw(axes, speeds, [1e3 * each[setting] for each in steps], style, label)
    power_sgd = [1e3 * power_sgd_seconds(network.shapes, ranks, m, compute) for m in machines]
    draw(axes, speeds, power_sgd, STYLES[len(arms)], "PowerSGD, rank 4")
    axes.axhline(1e3 * compute, color="0.6", linewidth=0.8)
    axes.annotate("computing alone", (speeds[0], 1e3 * compute), (0, -3), va="top", fontsize=8,
                  textcoords="offset points")  # fmt: skip
    axes.set(xscale="log", yscale="log", ylabel="time of a step (ms)")
    axes.set_title(f"{network.name}, {ranks} ranks, {1e3 * compute:g} ms of computing (predicted)")
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis)
    _mark_presets(axes, speeds)
    link, limit = machine.beta / GBIT, break_even(steps_on, ranks, machine) / GBIT
    if speeds[0] <= link <= speeds[-1]:
        here = steps_on(dataclasses.replace(machine, beta_two_phase=None))
        chosen = recommended(here, ranks)
        label = f"at {link:.3g} Gbit/s:\n{chosen.name}"
        axes.plot(link, 1e3 * here[chosen], "*k", markersize=15, zorder=4, label=label)
    if speeds[0] <= limit <= speeds[-1]:
        label = f"break-even: {limit:.2g} Gbit/s"
        axes.axvline(limit, color="black", linewidth=1, linestyle=(0, (6, 2)), label=label)
    axes.legend(loc="upper right", fontsize=9)
    save(figure, file)


def plot_gains(network: Network, compute: float, machine: Machine, file: Path) -> None:
    """Draws the speedup of the fastest setting over fp32, over the bandwidth, for numbers of ranks.

    Args:
        network, compute, machine, file: as for ``plot_links``.
    """
    machines = _with_links(machine, 0.1, 7200)
    speeds = [there.beta / GBIT for there in machines]
    figure, (axes,) = new_figure()
    for style, ranks in zip(STYLES, (2, 4, 8, 16, 64, 256, 1024), strict=False):
        gains = []
        for there in machines:
            steps = steps_of(network.gradients, ranks, there, compute / 3, 2 * compute / 3)
            gains.append(steps[FP32] / min(steps.values()))
        draw(axes, speeds, gains, style, f"{ranks} ranks")
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(xscale="log", ylabel="speedup over fp32 of the fastest setting")
    axes.set_title(f"{network.name}, {1e3 * compute:g} ms of computing (predicted)")
    axes.xaxis.set_major_formatter("{x:g}")
    _mark_presets(axes, speeds)
    axes.legend(loc="upper right", fontsize=9)
    save(figure, file)


def _with_links(machine: Machine, low: float, high: float, points: int = 61) -> list[Machine]:
    """The machine with links of bandwidths from ``low`` to ``high``, in Gbit/s."""
    speeds = [low * (high / low) ** (i / (points - 1)) for i in range(points)]
    return [dataclasses.replace(machine, beta=GBIT * x, beta_two_phase=None) for x in speeds]


def _mark_presets(axes: Axes, speeds: Sequence[float]) -> None:
    """Marks the links of ``PRESETS`` along the top, and names the axis of the bandwidth."""
    axes.set_xlabel("bandwidth of each rank's link (Gbit/s)")
    links = {name: machine.beta / GBIT for name, machine in PRESETS.items()}
    inside = {name: link for name, link in links.items() if speeds[0] <= link <= speeds[-1]}
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(inside.values()), list(inside), fontsize=8)
    top.minorticks_off()
    for link in inside.values():
        axes.axvline(link, color="0.6", linewidth=0.8, linestyle=(0, (1, 3)))
