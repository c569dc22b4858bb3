"""Widths per block: more bits for the blocks whose gradients are large, the same bits on the whole.

The rule of DQ-SGD (arXiv 2107.14575), more levels where the norm is larger, in space instead of in
time. A block with the global norm M_k has the width

    w_k = round(c + power * log2 M_k),    at least min_bits and at most max_bits,

and so about M_k^power levels, with the largest c that fits the budget. The squared error of a block
is about B M_k^2 / 4^w_k, so of all widths with one sum those with power 1 make the total least: the
error is then the same in all blocks. A smaller power keeps more of the precision of small
gradients, which optimizers that divide by the size of a gradient, as Adam does, depend on.

In an Allreduce the lanes of a block hold the sum of the ranks' codes, so that s = floor((2^w - 1) /
(2n)), and they do not straddle the words that are added.

Widths follow from the reduced norms alone, in integers (``native/core/block_bits.h``), so all ranks
have the same ones, and no dither decides on a width: codes stay unbiased.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hvd_gqsgd.checks import check_int, check_number
from hvd_gqsgd.codecs.bit_schedule import DynamicBits, check_power

__all__ = ["BlockBits"]

COLUMN = 32
"""Elements whose codes fill whole words at any width: ``kRows`` of ``native/core/block_bits.h``."""
MOST_BLOCK = 1024
POWER_UNIT = 256
BUDGET_UNIT = 1024


@dataclass(frozen=True)
class BlockBits:
    """A width for each block, which follows its global norm, within a budget of mean bits.

    The rule is that of DQ-SGD (arXiv 2107.14575), for blocks instead of steps. See
    ``hvd_gqsgd/codecs/block_bits.py`` and section 6 of ``docs/THEORY.md``.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of range.
    """

    budget: float | DynamicBits = 4.0
    """Mean bits per element that the codes take on the wire; norms come on top.
    ``DynamicBits(...)`` chooses a whole number of bits for each step."""
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
        budget = self.budget
        if not isinstance(budget, DynamicBits):
            budget = check_number("budget", budget, "a number of bits or DynamicBits(...)")
            object.__setattr__(self, "budget", budget)
        if not self.min_bits <= self.mean_bits <= self.max_bits:
            raise ValueError(
                f"budget must be from min_bits={self.min_bits} to max_bits={self.max_bits}, got "
                f"{self.budget!r}"
            )
        object.__setattr__(self, "power", check_power(self.power))
        check_int("block_size", self.block_size, COLUMN, MOST_BLOCK)
        if self.block_size % COLUMN:
            raise ValueError(
                f"block_size must be a multiple of {COLUMN} for widths per block, got "
                f"{self.block_size}"
            )
        _ = self.dynamic  # raises an error if no width is in both ranges

    @functools.cached_property  # the header of each bucket is compared with it
    def dynamic(self) -> DynamicBits | None:
        """The choice of each step's budget, among the widths that blocks may have; or None."""
        if not isinstance(self.budget, DynamicBits):
            return None
        least = max(self.budget.min_bits, self.min_bits)
        most = min(self.budget.max_bits, self.max_bits)
        return dataclasses.replace(self.budget, min_bits=least, max_bits=most)

    @property
    def mean_bits(self) -> float:
        """The budget, over all steps."""
        return self.budget.budget if isinstance(self.budget, DynamicBits) else self.budget

    @property
    def lane_bits(self) -> int:
        """The budget as a whole number of bits, rounded up, which ranks agree on."""
        return math.ceil(self.mean_bits)

    def at(self, bits: int) -> BlockBits:
        """Returns the rule of one step.

        Args:
            bits: the budget of the step in bits per element, which the ranks have agreed on.
        """
        return _at(self, bits)

    def rule(self, summands: int = 1) -> tuple[int, int, int, int]:
        """Returns the arguments of the native operators.

        Args:
            summands: number of codes that a lane holds the sum of.

        Returns:
            ``power`` in units of 1/256, least and largest width in bits, and ``summands``.
        """
        least = self._least(summands)
        return round(self.power * POWER_UNIT), least, self.max_bits, summands

    def _least(self, summands: int) -> int:
        """The least width whose lanes hold the sum of so many codes."""
        return max(self.min_bits, (2 * summands).bit_length() if summands > 1 else 0)

    def words_for(self, columns: Sequence[int], summands: int = 1) -> int:
        """Returns the number of 32-bit words on the wire.

        The words hold the budget, or the least width where that takes more. Codes that are added
        take lanes of 64-bit words, and so an even number.

        Args:
            columns: number of columns of each block, of 32 elements each.
            summands: number of codes that a lane holds the sum of.
        """
        words = round(self.mean_bits * BUDGET_UNIT) * sum(columns) // BUDGET_UNIT
        if summands == 1:
            return words
        lanes = 64 // self._least(summands)
        pairs = sum(-(-COLUMN * count // lanes) for count in columns)
        return 2 * max(-(-words // 2), pairs)


@functools.lru_cache(maxsize=256)  # one object for equal rules, whose layouts are cached by it
def _at(rule: BlockBits, bits: int) -> BlockBits:
    dynamic = isinstance(rule.budget, DynamicBits)
    return dataclasses.replace(rule, budget=float(bits)) if dynamic else rule
