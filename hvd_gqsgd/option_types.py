"""The types of options, and the options as keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from hvd_gqsgd.codecs.bit_schedule import DynamicBits
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.codecs.by_name import Registered

__all__ = [
    "Bits",
    "Dither",
    "ErrorFeedback",
    "Exchange",
    "Hierarchy",
    "Norm",
    "OptionKeywords",
    "OptionsButBits",
    "Plan",
    "Rounding",
    "Select",
]

Dither = Literal["linear", "exponential"] | Registered
Exchange = Literal["auto", "allreduce", "two_phase", "one_phase", "gather", "reduce_scatter"]
Norm = Literal["max", "l2"]
Hierarchy = Literal["auto", "flat", "node"] | tuple[int, ...]
Bits = int | DynamicBits | BlockBits | Literal["auto"]
Plan = Sequence[Sequence[Any]]
Select = Literal["random", "permutation", "leader"]
ErrorFeedback = Literal["residual", "ef21", "econtrol", "marina"]
Rounding = Literal["stochastic", "nearest"]


class OptionsButBits(TypedDict, total=False):
    """The options but ``bits`` as keywords, for a function with its own ``bits``."""

    dither: Dither
    exchange: Exchange
    norm: Norm
    block_size: int | None
    correlated: bool
    seed: int
    min_numel: int
    bucket_mb: float
    hierarchy: Hierarchy
    error: float | None
    plan: Plan | None
    keep: float
    select: Select
    error_feedback: ErrorFeedback | None
    low_pass: float
    full_every: int | None
    rounding: Rounding


class OptionKeywords(OptionsButBits, total=False):
    """The options as keywords: ``**options: Unpack[OptionKeywords]``."""

    bits: Bits
