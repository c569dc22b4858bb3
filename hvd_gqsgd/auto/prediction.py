"""What a step would take with another setting, by the cost model and the step that was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hvd_gqsgd.tools.cost_model import PRESETS, Gradients, Machine
from hvd_gqsgd.tools.node_model import Cluster, step_seconds
from hvd_gqsgd.tools.settings import Setting

__all__ = ["predict"]

MACHINE = replace(PRESETS["10gbe"], operation=5e-4)
SLOWEST, FASTEST = 1e4, 1e13
"""Bandwidths in bytes per second."""


def predict(
    settings: Sequence[Setting],
    current: Setting,
    busy: int,
    held: int,
    gradients: Gradients,
    cluster: Cluster,
) -> list[int]:
    """Returns the predicted time from the first gradient to the last mean with each setting.

    The bandwidth is the one with which the cost model explains the measured time of the current
    setting. Where several do, as the backward pass hides the exchange, it is the highest.

    Args:
        settings: the settings to predict.
        current: the setting that was measured.
        busy: microseconds from the first gradient to the last mean, measured.
        held: microseconds of these that the exchange holds the training up for.
        gradients: the gradients of a step.
        cluster: the ranks, each of which has a link of its own where there is one on a node.
    """
    backward = max(busy - held, 0) / 1e6

    def at(beta: float, setting: Setting) -> float:
        machine: Machine = replace(MACHINE, beta=beta)
        return step_seconds(setting, gradients, cluster, machine, setting.by_node, 0.0, backward)

    low, high = SLOWEST, FASTEST
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle, current) >= busy / 1e6 else (low, middle)
    explained = at(low, current)
    return [max(1, busy + round((at(low, other) - explained) * 1e6)) for other in settings]
