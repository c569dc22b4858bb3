"""Checks of options. Errors name the option, the value and the accepted values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Real

__all__ = [
    "MOST_GROUP",
    "check_choice",
    "check_int",
    "check_number",
    "check_step",
    "checked_keep",
    "unknown_option",
]

MOST_GROUP = 2**16
"""The most elements of which one is exchanged, with ``keep``."""


def check_int(name: str, value: object, low: int, high: int, also: str = "") -> None:
    """Checks that ``value`` is an int from ``low`` to ``high``.

    ``also`` names other accepted values, with what joins them to the range, as ``" or None"``.

    Raises:
        TypeError: it is not an int; a bool is not one.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int{also}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}{also}, got {value}")


def check_step(step: object, also: str = "") -> None:
    """Checks the number of a step, as ``check_int``. It travels in 31 bits, half of which are left
    for the steps to come."""
    check_int("step", step, 0, 2**30, also)


def check_number(name: str, value: object, what: str) -> float:
    """Returns ``value`` as a float, so that 25 and 25.0 are equal; ``what`` describes the option.

    Raises:
        TypeError: it is no real number; a bool is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    return float(value)


def check_choice(name: str, value: object, choices: tuple[str, ...], also: str = "") -> None:
    """Checks that ``value`` is one of ``choices``; ``also`` names an alternative.

    Raises:
        TypeError: it is not a string.
        ValueError: it is another one.
    """
    alternative = f", or {also}" if also else ""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices}{alternative}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}{alternative}, got {value!r}")


def unknown_option(of: str, name: str, known: Iterable[str]) -> str:
    """Returns the message for an unknown option, with a suggestion of a similar name."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return (
        f"{of} got an unknown option {name!r}"
        + (f": did you mean {close[0]!r}? " if close else ". ")
        + f"Options are: {', '.join(names)}"
    )


def checked_keep(value: object) -> float:
    """Returns the option ``keep`` as the float next to 1 divided by an int.

    Raises:
        TypeError: it is not a number.
        ValueError: it is no such share.
    """
    keep = check_number("keep", value, "a share of elements, as 1/64")
    group = round(1 / keep) if 1e-9 < keep <= 1 else 0
    if not 1 <= group <= MOST_GROUP or abs(keep * group - 1) > 1e-9:
        meant = f": did you mean keep=1/{round(keep)}?" if 1 < keep <= MOST_GROUP else ""
        raise ValueError(
            f"keep must be 1 divided by an int from 1 to {MOST_GROUP}, as 1/64, got {value}{meant}"
        )
    return 1 / group
