"""The figure of ``hvd-gqsgd model --plot-nodes``: the time of a step over the number of nodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hvd_gqsgd.bench.figure import STYLES, draw, log_ticks, new_figure, save
from hvd_gqsgd.bench.networks import Network
from hvd_gqsgd.tools.cost_model import Machine
from hvd_gqsgd.tools.node_model import Cluster, step_seconds
from hvd_gqsgd.tools.settings import FP32, TWO_PHASE_8

__all__ = ["PER_NODE", "plot_nodes"]

PER_NODE = 8
"""Ranks of a node, unless others are given."""

NODES = [2**k for k in range(8)]

GIGABITS = (1, 10, 100, 400)
"""Bandwidths of a node's link, in Gbit/s."""


def plot_nodes(
    network: Network, per_node: int, compute: float, machine: Machine, file: Path
) -> None:
    """Draws the time of a step with float32, and with 8 bits flat and by node.

    Args:
        network: the parameters.
        per_node: ranks of each node.
        compute: seconds of the forward and the backward pass; the latter takes two thirds.
        machine: a rank and its link; the bandwidth is not used.
        file: the figure to write.
    """
    figure, panels = new_figure(5.6, 2, 2)
    arms = {
        "fp32": (FP32, False, STYLES[0]),
        "GlobalQSGD, 8 bits, flat": (TWO_PHASE_8, False, STYLES[1]),
        "GlobalQSGD, 8 bits, by node": (TWO_PHASE_8, True, STYLES[2]._replace(width=2.5)),
    }
    for axes, gigabits in zip(panels, GIGABITS, strict=True):
        there = dataclasses.replace(machine, beta=gigabits * 1e9 / 8, beta_two_phase=None)
        for label, (setting, by_node, style) in arms.items():
            seconds = [
                step_seconds(setting, network.gradients, Cluster(nodes, per_node), there, by_node,
                             compute / 3, 2 * compute / 3)
                for nodes in NODES
            ]  # fmt: skip
            draw(axes, NODES, [1e3 * s for s in seconds], style, label)
        axes.set(xscale="log", yscale="log")
        axes.set_title(f"link of {gigabits} Gbit/s", fontsize=10)
        axes.set_xticks(NODES, [str(nodes) for nodes in NODES])
        axes.xaxis.minorticks_off()
        log_ticks(axes.yaxis)
    for below, left in zip(panels[-2:], panels[::2], strict=True):
        below.set_xlabel(f"nodes of {per_node} ranks")
        left.set_ylabel("time of a step (ms)")
    figure.suptitle(f"{network.name}, {1e3 * compute:g} ms of computing (predicted)", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    save(figure, file)
