"""The expected error of a mean, by the variances of ``hvd_gqsgd/docs/THEORY.md``.

Gradients are taken to be normal, and independent between elements and ranks. With the standard
deviation 1, n ranks, blocks of B elements, s levels a side and P(k) the expected maximum of k
magnitudes, a level is P(n B) / s, and the errors relative to the mean square of the mean are:

    first rounding, correlated dither    (n+1)/(2n) (P(n B)/s)^2 v(s / P(n B))
    second rounding, variance e before   (P(B)/s)^2 (1+e) v(s / P(B))
    exponential, each rounding           0.082 of the square of the rounded number
    a permutation, one rank's element    (P(n B)/s)^2 v(s / P(n B))
    1 of m elements, error e             m - 1 + m e

There v(t) is the variance of rounding a normal number with the standard deviation t, both in
levels: 1/6 for large t. Errors of a width per block follow from the measured ``Setting.gain``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

from hvd_gqsgd.tools.settings import Setting, levels

__all__ = ["relative_error", "relative_variance", "squared_error"]

BLOCK = 1024
"""Elements that share a norm, with one width in all blocks."""

EXPONENTIAL = (0.75 - math.log(2)) / math.log(2)
"""Variance of rounding x to a power of two, relative to x^2, for log-uniform x."""

NEAREST = 3 / 8 / 12 / math.log(2)
"""Squared error of rounding x to the nearest, relative to x^2, for log-uniform x, with a distance
of 1 between the floating-point numbers from 1 to 2."""


def relative_error(setting: Setting, ranks: int, one_phase: bool = False) -> float:
    """Root of ``squared_error``: the norm of the error relative to the norm of the mean."""
    return math.sqrt(squared_error(setting, ranks, one_phase))


def squared_error(setting: Setting, ranks: int, one_phase: bool = False) -> float:
    """Expected squared error of the mean, relative to the squared mean.

    Args:
        setting: the setting.
        ranks: number of ranks, or of nodes where the ranks of a node are summed first.
        one_phase: whether the mean is rounded once, as under FSDP.

    Returns:
        0 for one rank, which exchanges nothing; infinity if lanes do not hold the sum of all ranks;
        NaN where a leader chooses, as residuals make up for the error of a step, and where ranks
        exchange differences, as the error depends on how gradients change.
    """
    if ranks == 1:
        return 0.0
    if setting.led or setting.differences:
        return math.nan
    if setting.keep < 1:
        rounding = squared_error(replace(setting, keep=1), ranks, one_phase)
        return (1 + rounding) / setting.keep - 1
    side = levels(setting, ranks)
    if side is None:  # each rank's gradients and each partial sum of a ring are rounded
        step = 2.0**-setting.mantissa
        return step**2 * NEAREST * (1 + (ranks + 1) / 2 - 1 / ranks)
    if side == 0:
        return math.inf
    twice = setting.two_phase and not one_phase
    if setting.disjoint:
        return _rounding(side / _peak(ranks * BLOCK))
    if setting.dither == "exponential":
        return EXPONENTIAL * ((2 + EXPONENTIAL) if twice else 1)
    error = (ranks + 1) / (2 * ranks) * _rounding(side / _peak(ranks * BLOCK))
    if twice:
        error += (1 + error) * _rounding(side / _peak(BLOCK))
    return error / setting.gain


def relative_variance(setting: Setting, ranks: int) -> float:
    """Bound of the squared error of a mean to the squared norm of its blocks, but for a factor of 4
    that is the same for all settings: the square of the distance of two levels, for each time that
    a number is rounded. 0 without quantization.

    See "Two phases" in ``docs/THEORY.md``.
    """
    side = levels(setting, ranks)
    if side is None:
        return 0.0
    if setting.dither == "exponential":  # x^2/8, and the same of a mean that has this error
        return 4 * (1 / 8 + (1 + 1 / 8) / 8)
    return (2 if setting.two_phase else 1) / side**2 / setting.gain


def _rounding(deviation: float) -> float:
    """Variance of rounding normal numbers stochastically, relative to their variance.

    Args:
        deviation: their standard deviation, in levels.
    """
    # f(1-f) of the fraction f has the Fourier series 1/6 - sum cos(2 pi k f) / (pi k)^2.
    terms = (
        math.exp(-2 * (math.pi * k * deviation) ** 2) / (math.pi * k) ** 2 for k in range(1, 50)
    )
    return (1 / 6 - sum(terms)) / deviation**2


def _peak(numbers: int) -> float:
    """The expected maximum of so many magnitudes, for the standard deviation 1; within 1 %."""
    return NormalDist().inv_cdf(1 - 0.28 / numbers)
