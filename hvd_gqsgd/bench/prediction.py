"""Predicted steps of all settings, with their accuracy, and the recommended one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hvd_gqsgd.tools import node_model
from hvd_gqsgd.tools.accuracy import relative_error
from hvd_gqsgd.tools.advice import break_even, recommend, recommended
from hvd_gqsgd.tools.cost_model import Gradients, Machine, steps_of
from hvd_gqsgd.tools.node_model import Cluster
from hvd_gqsgd.tools.settings import FP32, SETTINGS, Setting, kept, levels
from hvd_gqsgd.tools.sharded_model import (
    SHARDED_SETTINGS,
    gradient_seconds,
    recommend_sharded,
    sharded_step_seconds,
    weight_seconds,
)

__all__ = ["passes", "predict", "predict_sharded"]


def passes(compute: float) -> tuple[float, float]:
    """Seconds of the forward pass, a third, and of the backward pass."""
    return compute / 3, 2 * compute / 3


def predict(
    gradients: Gradients, ranks: int, machine: Machine, compute: float, per_node: int = 1,
    keep: float = 1,
) -> dict[str, Any]:  # fmt: skip
    """Predicts a step with each setting that is possible.

    Args:
        gradients, ranks, machine: the exchange.
        compute: seconds of the forward and the backward pass; the latter takes two thirds.
        per_node: ranks of each node. With several, settings are predicted flat and by node.
        keep: a share of the elements, to predict the settings that exchange as many; 1: none.

    Returns:
        ``steps``, by the setting's name: ``ms``, ``times_faster`` than fp32, ``levels`` a side
        (None without quantization) and ``relative_error`` of the mean (None where a leader chooses,
        as residuals make up for it, and where ranks exchange differences); ``recommended``, the
        name of a setting; ``break_even``, the bandwidth in bytes per second below which a setting
        other than fp32 is recommended; and ``advice``, a sentence.
    """
    cluster = Cluster(ranks // per_node, per_node)

    def steps_on(there: Machine, settings: Sequence[Setting] = SETTINGS) -> dict[Setting, float]:
        if per_node == 1:
            return steps_of(gradients, ranks, there, *passes(compute), settings)
        return node_model.steps_of(gradients, cluster, there, *passes(compute), settings)

    def row(setting: Setting, seconds: float) -> dict[str, float | None]:
        summed = cluster.nodes if setting.by_node else ranks
        error = relative_error(setting, summed)
        return {
            "ms": seconds * 1e3,
            "times_faster": steps[FP32] / seconds,
            "levels": levels(setting, summed),
            "relative_error": None if math.isnan(error) else error,
        }

    steps = steps_on(machine)
    shown = dict(steps)
    if keep < 1:
        shown |= steps_on(machine, [*kept(keep, ranks), *kept(keep, ranks, 4)])
    return {
        "steps": {setting.name: row(setting, seconds) for setting, seconds in shown.items()},
        "recommended": recommended(steps, ranks).name,
        "break_even": break_even(steps_on, ranks, machine),
        "advice": recommend(steps, ranks),
    }


def predict_sharded(
    modules: Sequence[int], ranks: int, machine: Machine, compute: float, per_node: int = 1
) -> dict[str, Any]:
    """Predicts a step under FSDP2 with each setting.

    Args:
        modules: the elements of each module.
        ranks, machine, compute, per_node: as for ``predict``.

    Returns:
        ``steps``, by the setting's name: ``ms``, of these ``gradient_ms`` and ``weight_ms``,
        ``times_faster`` than with float32, ``levels`` a side and ``relative_error`` of the mean
        gradient; and ``advice``, a sentence.
    """
    exchange = (modules, Cluster(ranks // per_node, per_node), machine)
    seconds = {
        setting: sharded_step_seconds(setting, *exchange, compute) for setting in SHARDED_SETTINGS
    }
    steps = {
        setting.name: {
            "ms": time * 1e3,
            "gradient_ms": gradient_seconds(setting, *exchange) * 1e3,
            "weight_ms": weight_seconds(setting, *exchange) * 1e3,
            "times_faster": seconds[SHARDED_SETTINGS[0]] / time,
            "levels": levels(setting.gradients, ranks),
            "relative_error": setting.relative_error(ranks),
        }
        for setting, time in seconds.items()
    }
    return {"steps": steps, "advice": recommend_sharded(seconds, ranks)}
