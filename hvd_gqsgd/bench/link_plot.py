"""The figure of ``hvd-gqsgd model --plot-links``: the time of a step over the speed of the link."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from hvd_gqsgd.bench.gradients import shapes_of
from hvd_gqsgd.tools.cost_model import (
    FP16,
    FP32,
    LINEAR_4,
    TWO_PHASE_8,
    Gradients,
    Machine,
    allreduce_seconds,
    step_seconds,
)

__all__ = ["plot_links", "power_sgd_seconds"]

RANK = 4

POWER_SGD = 16e-9
"""Arithmetic of PyTorch's ``powerSGD_hook`` of rank 4, in seconds per element.

Measured with ResNet-50's gradients, one rank and one thread, on an AMD EPYC with AVX2. Two ranks on
two cores take longer: the step of 810 ms in BENCHMARKS.md corresponds to about 27e-9.
"""


def power_sgd_seconds(
    shapes: Sequence[tuple[int, ...]], ranks: int, machine: Machine, compute: float
) -> float:
    """Seconds of a step with PowerSGD of rank 4 in one bucket, so that nothing overlaps.

    As PyTorch's hook does, it sends a tensor uncompressed unless that is twice as large or more.
    """
    factors = rest = 0
    for shape in shapes:
        rows, columns = shape[0], math.prod(shape[1:])
        if 2 * RANK * (rows + columns) < rows * columns:
            factors += RANK * (rows + columns)
        else:
            rest += rows * columns
    elements = sum(map(math.prod, shapes))
    sent = sum(allreduce_seconds(4 * part, ranks, machine) for part in (rest, factors / 2))
    sent += allreduce_seconds(4 * factors / 2, ranks, machine)
    return compute + POWER_SGD * elements + sent


def plot_links(model: str, ranks: int, compute: float, machine: Machine, file: Path) -> None:
    """Draws the time of a step with each compressor, over the bandwidth of each rank's link.

    Args:
        model: one of ``gradients.MODELS``.
        ranks, machine: the exchange; the bandwidth of the machine is not used.
        compute: seconds of the forward and the backward pass; the latter takes two thirds.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    shapes = [shape for _, shape in shapes_of(model)]
    gradients = Gradients.of([math.prod(shape) for shape in shapes])
    low, high, points = 100e6 / 8, 100e9 / 8, 61
    bandwidths = [low * (high / low) ** (i / (points - 1)) for i in range(points)]
    machines = [dataclasses.replace(machine, beta=beta, beta_two_phase=None) for beta in bandwidths]
    arms = {
        "fp32": (FP32, "-", "0.0"),
        "fp16": (FP16, "--", "0.0"),
        "GlobalQSGD, 8 bits": (TWO_PHASE_8, "-.", "0.45"),
        "GlobalQSGD, 4 bits": (LINEAR_4, "-", "0.45"),
    }
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    speeds = [8 * beta / 1e9 for beta in bandwidths]

    def draw(label: str, seconds: list[float], style: str, gray: str) -> None:
        width = 3 if label.startswith("Global") else 1.5
        axes.plot(speeds, [1e3 * s for s in seconds], style, color=gray, lw=width, label=label)

    for label, (setting, style, gray) in arms.items():
        passes = (compute / 3, 2 * compute / 3)
        draw(label, [step_seconds(setting, gradients, ranks, m, *passes) for m in machines],
             style, gray)  # fmt: skip
    draw("PowerSGD, rank 4", [power_sgd_seconds(shapes, ranks, m, compute) for m in machines],
         ":", "0.0")  # fmt: skip
    axes.axhline(1e3 * compute, color="0.7", lw=0.8, zorder=0)
    axes.annotate("computing alone", (speeds[0], 1e3 * compute), (0, 3), color="0.4",
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(xscale="log", yscale="log", ylabel="time of a step (ms)")
    axes.set_xlabel("bandwidth of each rank's link (Gbit/s)")
    axes.set_title(f"{model}, {ranks} ranks, {1e3 * compute:g} ms of computing (predicted)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)
