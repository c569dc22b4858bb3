"""The kinds of codes, numbered as for the native operators."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXPONENTIAL", "LINEAR", "Code", "exponential", "linear", "two_phase_code"]

LINEAR, EXPONENTIAL = 0, 1


class Code(NamedTuple):
    """A kind of codes, their width, and their levels a side: as native operators take them."""

    kind: int
    bits: int
    levels: int

    @property
    def dither(self) -> str:
        """The kind as the package's option ``dither``."""
        return {LINEAR: "linear", EXPONENTIAL: "exponential"}[self.kind]

    def __str__(self) -> str:
        return f"{self.dither}-{self.bits}"

    @property
    def bias(self) -> int:
        """What lanes hold beside the code: s where codes are added, so that none is negative."""
        return self.levels if self.kind == LINEAR else 0


def linear(bits: int, levels: int) -> Code:
    """Linear codes from -s to s."""
    return Code(LINEAR, bits, levels)


def exponential(bits: int) -> Code:
    """Exponential codes, with one level a side for each exponent but 0."""
    return Code(EXPONENTIAL, bits, (1 << (bits - 1)) - 1)


def two_phase_code(dither: str, bits: int) -> Code:
    """Codes that are not added: linear ones have as many levels as a lane holds."""
    if dither == "exponential":
        return exponential(bits)
    return linear(bits, (1 << (bits - 1)) - 1)
