"""The levels that lanes have for a sum of codes, and how few are enough."""

from __future__ import annotations

__all__ = ["ENOUGH_LEVELS", "LEAST_LEVELS", "levels_of"]

ENOUGH_LEVELS = 31
"""With fewer levels a side, ``exchange="auto"`` takes two phases. With 31 (8 bits, 4 ranks) the
examples reach the loss of fp32; with 15 (8 ranks) the language model loses 0.7 % of perplexity."""

LEAST_LEVELS = 2
"""The fewest levels a side of estimates. With one, the squared error of stochastic rounding is
above the square of the rounded number, and estimates go astray (tests/test_feedback.py); with two
they come near, slowly."""


def levels_of(bits: int, summands: int) -> int:
    """Levels a side in a lane that holds the sum of so many codes; 0 if it holds none."""
    return ((1 << bits) - 1) // (2 * summands)
