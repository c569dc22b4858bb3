"""The times of steps on all ranks, and what several steps have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["UNKNOWN", "Seen", "median", "spread_of"]


class Seen(NamedTuple):
    """A step, in microseconds, each the maximum over the ranks."""

    busy: int
    """From the first gradient to the last mean."""
    held: int
    """The part of it that the exchange holds the training up for."""
    period: int
    """From step to step."""


UNKNOWN = Seen(0, 0, 0)


def median(steps: Sequence[Seen]) -> Seen:
    """The median of each time."""
    middle = len(steps) // 2
    return Seen(*(sorted(times)[middle] for times in zip(*steps, strict=True)))


def spread_of(steps: Sequence[Seen]) -> int:
    """About 0.7 standard deviations of ``busy``: three quarters of the distance between the
    quartiles of four steps and more, or half of that between the largest and the smallest."""
    times = sorted(seen.busy for seen in steps)
    if len(times) > 3:
        quarter = len(times) // 4
        return (times[-1 - quarter] - times[quarter]) * 3 // 4
    return (times[-1] - times[0]) // 2
