"""The width of each step by the option ``bits``, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvd_gqsgd.codecs.bit_schedule import DynamicBits, Schedule, wire_bits
from hvd_gqsgd.codecs.block_bits import BlockBits

__all__ = ["FixedBits", "budget_of", "least_bits", "make_schedule"]


class FixedBits:
    """The same width always: a ``Schedule`` that learns nothing."""

    learns = False

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def width(self, ranks: int) -> int:
        """The width; whether it is enough for the ranks is the codec's to say."""
        return self._bits

    def update(self, width: int, squared_norm: float) -> None:
        """Does nothing."""

    def state(self) -> list[int]:
        """Nothing."""
        return []

    def adopt(self, words: Sequence[int]) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that there is nothing to load.

        Raises:
            TypeError: ``state`` is not a dict.
            ValueError: it is the state of another schedule.
        """
        if not isinstance(state, dict):
            raise TypeError(f"the state of a fixed width must be a dict, got {state!r}")
        if state:
            raise ValueError(
                "the state of a fixed width must be empty, and this is one of DynamicBits or of "
                f"bits='auto': give bits as when the state was saved; got {state!r}"
            )


def make_schedule(bits: int | DynamicBits | BlockBits) -> FixedBits | Schedule:
    """The schedule of the width of a step, or with ``BlockBits`` of the step's budget."""
    if isinstance(bits, DynamicBits):
        return Schedule(bits)
    if not isinstance(bits, BlockBits):
        return FixedBits(bits)
    return FixedBits(bits.lane_bits) if bits.dynamic is None else Schedule(bits.dynamic, cost=float)


def budget_of(bits: int | DynamicBits | BlockBits) -> float:
    """Mean bits an element on the wire that are asked for."""
    if isinstance(bits, BlockBits):
        return bits.mean_bits
    return bits.budget if isinstance(bits, DynamicBits) else wire_bits(bits)


def least_bits(bits: int | DynamicBits | BlockBits, summands: int) -> float:
    """Bits an element of the narrowest lanes that hold the sum of so many codes."""
    if isinstance(bits, DynamicBits):
        return wire_bits(Schedule(bits).usable(summands)[0])
    if not isinstance(bits, BlockBits):
        return wire_bits(bits)
    least = bits.rule(summands)[1]
    return float(least) if summands == 1 else 64 / (64 // least)
