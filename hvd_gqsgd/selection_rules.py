"""The rules of ``keep``, ``select``, ``error_feedback``, ``low_pass``, ``full_every`` and
``rounding``: which go with each other, and with other options."""

from __future__ import annotations

from typing import Any, Protocol

from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.codecs.by_name import CODECS

__all__ = ["check_selection"]


class Options(Protocol):
    """The attributes of :class:`hvd_gqsgd.options.Options` that the rules read."""

    @property
    def bits(self) -> Any: ...
    @property
    def dither(self) -> str: ...
    @property
    def exchange(self) -> str: ...
    @property
    def norm(self) -> str: ...
    @property
    def hierarchy(self) -> Any: ...
    @property
    def keep(self) -> float: ...
    @property
    def select(self) -> str: ...
    @property
    def error_feedback(self) -> str | None: ...
    @property
    def low_pass(self) -> float: ...
    @property
    def full_every(self) -> int | None: ...
    @property
    def rounding(self) -> str: ...
    @property
    def correlated(self) -> bool: ...
    @property
    def selected(self) -> bool: ...
    @property
    def disjoint(self) -> bool: ...
    @property
    def estimates(self) -> bool: ...
    @property
    def feeds_rounding(self) -> bool: ...


def check_selection(options: Options) -> None:
    """Checks options as a user has given them, each within its range.

    Raises:
        ValueError: two do not go together, or one has no effect.
    """
    feedback, select = options.error_feedback, options.select
    nearest = options.rounding == "nearest"
    if nearest:
        _check_nearest(options)
    without = ("marina",) if nearest else ("marina", "residual")
    if options.keep == 1 and (select != "random" or feedback in without):
        this = f"select={select!r}" if select != "random" else f"error_feedback={feedback!r}"
        remedy = "rounding='nearest', " if feedback == "residual" and select == "random" else ""
        raise ValueError(
            f"{this} has no effect with keep=1, which exchanges all elements: pass keep=1/64, "
            f"{remedy}or leave {this} out"
        )
    if options.low_pass != 1 and feedback != "residual" and (feedback or select != "leader"):
        raise ValueError(
            f"low_pass={options.low_pass} has no effect with error_feedback={feedback!r}: pass "
            "error_feedback='residual', or leave low_pass out"
        )
    if options.full_every is not None and feedback != "marina":
        raise ValueError(
            f"full_every={options.full_every} has no effect with error_feedback={feedback!r}: pass "
            "error_feedback='marina', or leave full_every out"
        )
    if not options.selected:
        return
    this = f"error_feedback={feedback!r}" if feedback else f"keep={options.keep}"
    if options.bits == "auto":
        raise ValueError(
            f"{this} does not go with bits='auto', which chooses among exchanges of whole "
            "gradients: pass a number of bits"
        )
    if options.hierarchy not in ("auto", "flat"):
        raise ValueError(
            f"hierarchy={options.hierarchy!r} does not go with {this}, which exchanges flat: "
            "leave hierarchy out"
        )
    biased = feedback is not None or select == "leader"
    if options.exchange in ("reduce_scatter", "gather") or (
        options.exchange == "one_phase" and biased
    ):
        this = this if feedback or not biased else f"select={select!r}"
        raise ValueError(
            f"exchange={options.exchange!r} does not go with {this}: leave exchange out"
        )
    if options.disjoint:
        _check_permutation(options)
    if options.estimates:
        _check_estimates(options)
    if options.feeds_rounding:
        _check_owing(options, this)


def _check_nearest(options: Options) -> None:
    if options.bits == "auto":  # first, as error feedback does not go with it either
        raise ValueError(
            "rounding='nearest' does not go with bits='auto', whose settings round by dither: pass "
            "a number of bits, or leave rounding out"
        )
    if options.error_feedback is None and options.select != "leader":
        raise ValueError(
            "rounding='nearest' is biased, and needs error feedback: pass "
            "error_feedback='residual', 'ef21' or 'econtrol', or leave rounding out"
        )
    if options.error_feedback == "marina":
        raise ValueError(
            "rounding='nearest' is biased, and does not go with error_feedback='marina': leave "
            "rounding out"
        )
    if options.dither != "linear":
        raise ValueError(
            f"rounding='nearest' takes linear codes, got dither={options.dither!r}: leave dither "
            "out"
        )
    if options.norm == "l2":
        raise ValueError("rounding='nearest' takes norm='max', got norm='l2': leave norm out")
    if not options.correlated:
        raise ValueError(
            "correlated=False has no effect with rounding='nearest', which draws no dither: leave "
            "correlated out"
        )


def _check_owing(options: Options, this: str) -> None:
    if options.exchange == "two_phase" and isinstance(options.bits, BlockBits):
        this = "rounding='nearest'" if options.rounding == "nearest" else this
        raise ValueError(
            f"exchange='two_phase' does not go with {this} and bits=BlockBits(...), whose widths "
            "are those of one rounding: leave exchange out"
        )


def _check_permutation(options: Options) -> None:
    if options.exchange != "auto":
        raise ValueError(
            f"exchange={options.exchange!r} does not go with select='permutation', which is an "
            "Allgather: leave exchange out"
        )
    if options.estimates and options.error_feedback != "marina":
        raise ValueError(
            f"error_feedback={options.error_feedback!r} does not go with select='permutation', "
            "which is an Allgather: pass error_feedback='residual' or 'marina', or leave it out"
        )


def _check_estimates(options: Options) -> None:
    feedback = options.error_feedback
    if feedback == "marina" and options.select == "leader":
        raise ValueError(
            "error_feedback='marina' does not go with select='leader', which is biased: pass "
            "select='permutation', or leave select out"
        )
    if feedback == "marina" and options.exchange not in ("auto", "allreduce"):
        raise ValueError(
            f"error_feedback='marina' does not go with exchange={options.exchange!r}: leave "
            "exchange out"
        )
    if options.norm == "l2":
        raise ValueError(
            f"error_feedback={feedback!r} takes norm='max', got norm='l2': leave norm out"
        )
    if not CODECS[options.dither].added:
        raise ValueError(
            f"error_feedback={feedback!r} takes linear codes, got dither={options.dither!r}: leave "
            "dither out"
        )
