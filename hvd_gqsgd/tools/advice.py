"""Recommends a setting by the predicted seconds of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from hvd_gqsgd.tools.accuracy import squared_error
from hvd_gqsgd.tools.cost_model import Machine
from hvd_gqsgd.tools.settings import FP32, Setting

__all__ = ["MARGIN", "break_even", "choose", "recommend", "recommended"]

_T = TypeVar("_T")

MARGIN = 0.1
"""Least share of a step that a recommended setting saves, as the model is not more accurate."""


def choose(seconds: Mapping[_T, float], plain: _T, error: Callable[[_T], float]) -> _T:
    """The most accurate of the fastest settings, or ``plain`` if none is faster by ``MARGIN``.

    Two settings are as fast if they differ by less than ``MARGIN``. Of settings that are as
    accurate, the fastest one is chosen.

    Args:
        seconds: the seconds of a step with each setting.
        plain: the setting without compression.
        error: returns the expected error of a setting.
    """
    fastest, pays = min(seconds.values()), seconds[plain] * (1 - MARGIN)
    if fastest > pays:
        return plain
    enough = min(fastest / (1 - MARGIN), pays)
    fast = [setting for setting, taken in seconds.items() if taken <= enough]
    return min(fast, key=lambda setting: (error(setting), seconds[setting]))


def recommended(steps: Mapping[Setting, float], ranks: int) -> Setting:
    """The setting that is recommended, by ``choose``.

    Args:
        steps: the seconds of a step with each setting that is possible, fp32 among them.
        ranks: number of ranks.
    """
    if ranks == 1:
        return FP32
    return choose(steps, FP32, lambda setting: squared_error(setting, ranks))


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
