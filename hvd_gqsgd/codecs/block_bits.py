"""Widths per block: more bits for the blocks whose gradients are large, the same bits on the whole.

The rule of DQ-SGD (arXiv 2107.14575), more levels where the norm is larger, in space instead of in
time. A block with the global norm M_k has the width

    w_k = round(c + power * log2 M_k),    at least min_bits and at most max_bits,

and so about M_k^power levels, with the largest c that fits the budget. The squared error of a block
is about B M_k^2 / 4^w_k, so of all widths with one sum those with power 1 make the total least: the
error is then the same in all blocks. A smaller power keeps more of the precision of small
gradients, which optimizers that divide by the size of a gradient, as Adam does, depend on.

Widths follow from the reduced norms alone, in integers (``native/core/block_bits.h``), so all ranks
have the same ones, and no dither decides on a width: codes stay unbiased.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvd_gqsgd.checks import check_int, check_number

__all__ = ["BlockBits", "check_budget"]

COLUMN = 32
"""Elements whose codes fill whole words at any width: ``kRows`` of ``native/core/block_bits.h``."""
MOST_BLOCK = 1024
POWER_UNIT = 256
BUDGET_UNIT = 1024


def check_budget(budget: object) -> float:
    """``budget`` as a float.

    Raises:
        TypeError: it is not a number, as where widths per block and per step are asked for at once.
    """
    if hasattr(budget, "budget"):
        raise TypeError(
            f"budget must be a number of bits, got {budget!r}: widths follow either blocks or "
            "steps, so pass bits=BlockBits(...) or bits=DynamicBits(...)"
        )
    return check_number("budget", budget, "a number of bits")


@dataclass(frozen=True)
class BlockBits:
    """A width for each block, within a budget of mean bits; see ``hvd_gqsgd.codecs.block_bits``.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of range.
    """

    budget: float = 4.0
    """Mean bits per element that the codes take on the wire; norms come on top."""
    power: float = 0.5
    """Levels are proportional to this power of the block's norm, from 0 to 2."""
    min_bits: int = 2
    """The least width of a block with elements other than zero, 2 to 16 bits."""
    max_bits: int = 12
    """The largest width, 2 to 16 bits."""
    block_size: int = 256
    """Elements of a block: a multiple of 32, up to 1024."""

    def __post_init__(self) -> None:
        check_int("min_bits", self.min_bits, 2, 16)
        check_int("max_bits", self.max_bits, 2, 16)
        budget = check_budget(self.budget)
        if not self.min_bits <= budget <= self.max_bits:
            raise ValueError(
                f"budget must be from min_bits={self.min_bits} to max_bits={self.max_bits}, got "
                f"{self.budget!r}"
            )
        power = check_number("power", self.power, "a number")
        if not 0 <= power <= 2:
            raise ValueError(f"power must be from 0 to 2, got {self.power!r}")
        check_int("block_size", self.block_size, COLUMN, MOST_BLOCK)
        if self.block_size % COLUMN:
            raise ValueError(
                f"block_size must be a multiple of {COLUMN} for widths per block, got "
                f"{self.block_size}"
            )
        object.__setattr__(self, "budget", budget)
        object.__setattr__(self, "power", power)

    @property
    def lane_bits(self) -> int:
        """The budget as a whole number of bits, rounded up, which ranks agree on."""
        return math.ceil(self.budget)

    @property
    def rule(self) -> tuple[int, int, int]:
        """Power, least and largest width, in the order of the native operators."""
        return round(self.power * POWER_UNIT), self.min_bits, self.max_bits

    def words_for(self, columns: int) -> int:
        """32-bit words for blocks of so many columns in all; enough for the least width."""
        return round(self.budget * BUDGET_UNIT) * columns // BUDGET_UNIT
