"""The kinds of codes, numbered as for the native operators."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "EXPONENTIAL",
    "LINEAR",
    "NEAREST",
    "Code",
    "exponential",
    "linear",
    "nearest",
    "two_phase_code",
]

LINEAR, EXPONENTIAL, NEAREST = 0, 1, 2


class Code(NamedTuple):
    """A kind of codes, their width, and their levels a side: as native operators take them."""

    kind: int
    bits: int
    levels: int

    @property
    def dither(self) -> str:
        """The kind as the package's option ``dither``."""
        return "exponential" if self.kind == EXPONENTIAL else "linear"

    def __str__(self) -> str:
        return f"{'nearest' if self.kind == NEAREST else self.dither}-{self.bits}"

    @property
    def bias(self) -> int:
        """What lanes hold beside the code: s where codes are added, so that none is negative."""
        return 0 if self.kind == EXPONENTIAL else self.levels


def linear(bits: int, levels: int) -> Code:
    """Linear codes from -s to s."""
    return Code(LINEAR, bits, levels)


def nearest(bits: int, levels: int) -> Code:
    """Linear codes, rounded to nearest."""
    return Code(NEAREST, bits, levels)


def exponential(bits: int) -> Code:
    """Exponential codes, with one level a side for each exponent but 0."""
    return Code(EXPONENTIAL, bits, (1 << (bits - 1)) - 1)


def two_phase_code(dither: str, bits: int) -> Code:
    """Codes that are not added: linear ones have as many levels as a lane holds."""
    if dither == "exponential":
        return exponential(bits)
    return linear(bits, (1 << (bits - 1)) - 1)
