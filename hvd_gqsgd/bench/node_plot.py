"""The figure of ``hvd-gqsgd model --plot-nodes``: the time of a step over the number of nodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hvd_gqsgd.tools.cost_model import FP32, TWO_PHASE_8, Gradients, Machine
from hvd_gqsgd.tools.node_model import Cluster, step_seconds

__all__ = ["PER_NODE", "plot_nodes"]

PER_NODE = 8
"""Ranks of a node, unless others are given."""

NODES = [2**k for k in range(8)]

GIGABITS = (1, 10, 100, 400)
"""Bandwidths of a node's link, in Gbit/s."""


def plot_nodes(
    model: str, gradients: Gradients, per_node: int, compute: float, machine: Machine, file: Path
) -> None:
    """Draws the time of a step with float32, and with 8 bits flat and by node.

    Args:
        model: name of the model.
        gradients, machine: the exchange; the bandwidth of the machine is not used.
        per_node: ranks of each node.
        compute: seconds of the forward and the backward pass; the latter takes two thirds.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7, 5.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    arms = {
        "GlobalQSGD, 8 bits, by node": (TWO_PHASE_8, True, "-", "0.6", 4),
        "GlobalQSGD, 8 bits, flat": (TWO_PHASE_8, False, "--", "0.0", 1.5),
        "fp32": (FP32, False, "-", "0.0", 1.5),
    }
    for axes, gigabits in zip(panels.flat, GIGABITS, strict=True):
        there = dataclasses.replace(machine, beta=gigabits * 1e9 / 8, beta_two_phase=None)
        for label, (setting, by_node, style, gray, width) in arms.items():
            seconds = [
                step_seconds(setting, gradients, Cluster(nodes, per_node), there, by_node,
                             compute / 3, 2 * compute / 3)
                for nodes in NODES
            ]  # fmt: skip
            axes.plot(NODES, [1e3 * s for s in seconds], style, color=gray, lw=width, label=label)
        axes.set(xscale="log", yscale="log")
        axes.set_title(f"{gigabits} Gbit/s for each node", fontsize=10)
        axes.set_xticks(NODES, [str(nodes) for nodes in NODES])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    for below, left in zip(panels[-1], panels[:, 0], strict=True):
        below.set_xlabel(f"nodes of {per_node} ranks")
        left.set_ylabel("time of a step (ms)")
    figure.suptitle(f"{model}, {1e3 * compute:g} ms of computing (predicted)", fontsize=11)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(file, dpi=85)
