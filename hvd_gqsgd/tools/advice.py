"""Does quantization pay, and with which setting? By the seconds of a step that a model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from hvd_gqsgd.tools.cost_model import FP32, Machine, Setting, relative_variance

__all__ = ["MARGIN", "break_even", "recommend"]

MARGIN = 0.1
"""Least gain of a setting that is recommended: the model is no more accurate than that."""


def recommend(steps: Mapping[Setting, float], ranks: int) -> str:
    """A recommendation, in one sentence.

    Args:
        steps: the seconds of a step with each setting that is possible, fp32 among them.
        ranks: number of ranks.
    """
    if ranks == 1:
        return "Do not compress: one rank exchanges nothing."
    best, plain = _best(steps, ranks), steps[FP32]
    if steps[best] > plain * (1 - MARGIN):
        return (
            "Do not compress: no setting makes a step more than "
            f"{MARGIN:.0%} faster than fp32 ({plain * 1e3:.0f} ms)."
        )
    return (
        f"Take {best.name}: a step of {steps[best] * 1e3:.0f} ms in place of {plain * 1e3:.0f} ms, "
        f"{plain / steps[best]:.1f} times faster than fp32."
    )


def break_even(
    steps_on: Callable[[Machine], Mapping[Setting, float]], ranks: int, machine: Machine
) -> float:
    """The bandwidth, in bytes per second, below which the best setting is recommended.

    Args:
        steps_on: as ``recommend`` takes them, on a machine.
        ranks: number of ranks.
        machine: with any bandwidth.

    Returns:
        0 if it is not recommended at any bandwidth, infinity if at all.
    """

    def pays(beta: float) -> bool:
        steps = steps_on(replace(machine, beta=beta, beta_two_phase=None))
        return steps[_best(steps, ranks)] <= steps[FP32] * (1 - MARGIN)

    low, high = 1e5, 1e13
    if not pays(low):
        return 0.0
    if pays(high):
        return math.inf
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


def _best(steps: Mapping[Setting, float], ranks: int) -> Setting:
    """The most accurate of the fastest settings but fp32, and of these the fastest.

    Two settings are as fast if they differ by less than ``MARGIN``.
    """
    others = {setting: seconds for setting, seconds in steps.items() if setting != FP32}
    fastest, pays = min(others.values()), steps[FP32] * (1 - MARGIN)
    enough = min(fastest / (1 - MARGIN), pays) if fastest <= pays else fastest
    fast = [setting for setting, seconds in others.items() if seconds <= enough]
    return min(fast, key=lambda setting: (relative_variance(setting, ranks), steps[setting]))
