"""Runs to drive a schedule of bit widths through."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvd_gqsgd.codecs.bit_schedule import Schedule, wire_bits


def falling(factor: float) -> Callable[[int], list[float]]:
    """log2|g| of norms that fall geometrically by a factor over the run."""
    return lambda total: [-math.log2(factor) * t / total for t in range(total)]


def noisy(total: int) -> list[float]:
    """log2|g| of lognormal norms with sigma 0.5."""
    rng = random.Random(total)
    return [rng.gauss(0, 0.5) / math.log(2) for _ in range(total)]


def jumping(begin: float, end: float) -> Callable[[int], list[float]]:
    """log2|g| of norms that are 2^16 times larger for a part of the run."""
    return lambda total: [16.0 * (begin * total <= t < end * total) for t in range(total)]


def jumping_noisily(total: int) -> list[float]:
    """Both."""
    return list(map(sum, zip(noisy(total), jumping(0.5, 0.9)(total), strict=True)))


# log2|g| of each step of a run of so many steps
RUNS: dict[str, Callable[[int], list[float]]] = {
    "constant": lambda total: [0.0] * total,
    "falling 100x": falling(100),
    "falling 1000x": falling(1000),
    "rising 1000x": falling(1 / 1000),
    "1/t": lambda total: [-math.log2(t + 1) for t in range(total)],
    "noisy": noisy,
    "jumping": jumping(0.33, 0.66),
    "jumping early": jumping(0.02, 0.9),
    "jumping late": jumping(0.9, 2),
    "jumping noisily": jumping_noisily,
}


def drive(schedule: Schedule, norms: Sequence[float], ranks: int = 1) -> list[int]:
    """The widths of steps whose gradients have these log2|g|."""
    widths = []
    for norm in norms:
        widths.append(schedule.width(ranks))
        schedule.update(widths[-1], 4.0**norm)
    return widths


def costs(widths: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Bits an element on the wire."""
    return np.array([wire_bits(width) for width in widths])
