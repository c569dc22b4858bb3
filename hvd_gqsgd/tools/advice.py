"""Recommends a setting by the predicted seconds of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from hvd_gqsgd.tools.accuracy import relative_variance
from hvd_gqsgd.tools.cost_model import Machine
from hvd_gqsgd.tools.settings import FP32, Setting

__all__ = ["MARGIN", "break_even", "recommend", "recommended"]

MARGIN = 0.1
"""Least share of a step that a recommended setting saves, as the model is not more accurate."""


def recommended(steps: Mapping[Setting, float], ranks: int) -> Setting:
    """The setting that is recommended: fp32 unless another one is faster by ``MARGIN`` or more.

    Args:
        steps: the seconds of a step with each setting that is possible, fp32 among them.
        ranks: number of ranks.
    """
    best = _best(steps, ranks)
    pays = ranks > 1 and steps[best] <= steps[FP32] * (1 - MARGIN)
    return best if pays else FP32


def recommend(steps: Mapping[Setting, float], ranks: int) -> str:
    """The recommendation as a sentence; arguments as for ``recommended``."""
    if ranks == 1:
        return "Do not compress: one rank exchanges nothing."
    best, plain = recommended(steps, ranks), steps[FP32]
    if best == FP32:
        return (
            "Do not compress: no setting makes a step more than "
            f"{MARGIN:.0%} faster than fp32 ({plain * 1e3:.0f} ms)."
        )
    return (
        f"Use {best.name}, compression={best.compressor}: a step of {steps[best] * 1e3:.0f} ms "
        f"instead of {plain * 1e3:.0f} ms, {plain / steps[best]:.1f} times faster than fp32."
    )


def break_even(
    steps_on: Callable[[Machine], Mapping[Setting, float]], ranks: int, machine: Machine
) -> float:
    """The bandwidth, in bytes per second, below which the best setting is recommended.

    Args:
        steps_on: returns the steps of ``recommended`` on a machine.
        ranks: number of ranks.
        machine: the machine, whose bandwidth is varied.

    Returns:
        0 if no setting is recommended at any bandwidth; infinity if one is at every bandwidth.
    """

    def pays(beta: float) -> bool:
        steps = steps_on(replace(machine, beta=beta, beta_two_phase=None))
        return recommended(steps, ranks) != FP32

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
