"""Checks of options that depend on each other; each of them makes equal values identical."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

from hvd_gqsgd.checks import MOST_GROUP, check_choice, check_int, check_number
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.codecs.by_name import CODECS
from hvd_gqsgd.plan import check_plan

if TYPE_CHECKING:
    from hvd_gqsgd.options import Options

__all__ = [
    "BLOCK_SIZE",
    "OF_AUTO",
    "ErrorFeedback",
    "Select",
    "check_auto",
    "check_block_bits",
    "check_hierarchy",
    "check_keep",
]

Select = Literal["random", "leader"]
ErrorFeedback = Literal["residual", "ef21", "econtrol"]

BLOCK_SIZE = 1024  # unless bits=BlockBits(...)

OF_AUTO = ("error", "plan")
"""Options that go with ``bits="auto"`` alone."""


def check_auto(options: Options) -> None:
    """Checks the options of ``bits="auto"``."""
    if options.bits != "auto":
        for name in OF_AUTO:
            if getattr(options, name) is not None:
                raise ValueError(
                    f"{name} has no effect with bits={options.bits!r}: pass bits='auto', or leave "
                    f"{name} out"
                )
    if options.error is not None:
        error = check_number("error", options.error, "a relative squared error, or None")
        if not 0 < error < math.inf:
            raise ValueError(f"error must be a number above 0, got {options.error!r}")
        object.__setattr__(options, "error", error)
    if options.plan is not None:
        object.__setattr__(options, "plan", check_plan(options.plan))


def check_keep(options: Options) -> None:
    """Checks the options of an exchange of a part of the elements."""
    keep = check_number("keep", options.keep, "a share of elements, as 1/64")
    group = round(1 / keep) if 0 < keep <= 1 else 0
    if not 1 <= group <= MOST_GROUP or abs(keep * group - 1) > 1e-9:
        raise ValueError(
            f"keep must be 1 divided by an int from 1 to {MOST_GROUP}, as 1/64, got {keep}"
        )
    object.__setattr__(options, "keep", 1 / group)
    low_pass = check_number("low_pass", options.low_pass, "a weight, as 0.1")
    if not 0 < low_pass <= 1:
        raise ValueError(f"low_pass must be above 0 and at most 1, got {low_pass}")
    object.__setattr__(options, "low_pass", low_pass)
    check_choice("select", options.select, get_args(Select))
    if options.error_feedback is not None:
        check_choice("error_feedback", options.error_feedback, get_args(ErrorFeedback), "None")
    if group == 1:
        for name, value, default in (
            ("select", options.select, "random"), ("error_feedback", options.error_feedback, None),
        ):  # fmt: skip
            if value != default:
                raise ValueError(
                    f"{name}={value!r} has no effect with keep=1, which exchanges all "
                    f"elements: pass keep=1/64, or leave {name} out"
                )
    if low_pass != 1 and options.feedback != "residual":
        raise ValueError(
            f"low_pass={low_pass} has no effect with error_feedback={options.feedback!r}: pass "
            "error_feedback='residual', or leave low_pass out"
        )
    if group == 1:
        return
    if options.bits == "auto":
        raise ValueError(
            f"keep={options.keep} does not go with bits='auto', which chooses among exchanges of "
            "all elements: pass a number of bits"
        )
    if options.hierarchy not in ("auto", "flat"):
        raise ValueError(
            f"hierarchy={options.hierarchy!r} does not go with keep={options.keep}, which "
            "exchanges flat: leave hierarchy out"
        )
    if options.exchange in ("reduce_scatter", "gather") or (
        options.exchange == "one_phase" and options.feedback is not None
    ):
        raise ValueError(
            f"error_feedback={options.feedback!r} with keep={options.keep} does not go with "
            f"exchange={options.exchange!r}: pass keep=1"
        )
    if options.estimates and options.exchange not in ("auto", "allreduce"):
        raise ValueError(
            f"error_feedback={options.feedback!r} does not go with exchange={options.exchange!r}, "
            "whose second rounding is not in the estimates: leave exchange out"
        )
    if options.estimates and not CODECS[options.dither].added:
        raise ValueError(
            f"error_feedback={options.feedback!r} does not go with dither={options.dither!r}, "
            "whose codes cannot be added: leave dither out"
        )


def check_block_bits(options: Options, bits: BlockBits) -> None:
    """Checks that blocks have one size."""
    if options.block_size not in (BLOCK_SIZE, bits.block_size):
        raise ValueError(
            "block_size must be left out for bits=BlockBits(...), got "
            f"{options.block_size}: pass BlockBits(block_size={options.block_size})"
        )
    object.__setattr__(options, "block_size", bits.block_size)


def check_hierarchy(options: Options) -> None:
    """Checks the hierarchy."""
    if isinstance(options.hierarchy, list | tuple):
        for size in options.hierarchy:
            check_int("the ranks of each node of hierarchy", size, 1, 2**31 - 1)
        object.__setattr__(options, "hierarchy", tuple(options.hierarchy))
    else:
        sizes = "the number of ranks of each node, as (8, 8)"
        check_choice("hierarchy", options.hierarchy, ("auto", "flat", "node"), sizes)
    by_node = options.hierarchy not in ("auto", "flat")
    if by_node and options.exchange not in ("auto", "allreduce", "two_phase"):
        raise ValueError(
            f"hierarchy={options.hierarchy!r} has no effect with exchange={options.exchange!r}: "
            "pass hierarchy='flat', or leave it out"
        )
