"""The plan of a run: which setting each step takes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from hvd_gqsgd.checks import check_choice, check_int

__all__ = ["FLAT", "SETTING_NAMES", "WIDTHS", "Plan", "check_plan"]

FLAT = " flat"
WIDTHS = ("16 bits", "8 bits", "4 bits per block")
SETTING_NAMES = ("fp32", *WIDTHS, *(width + FLAT for width in WIDTHS))
"""The settings that ``bits="auto"`` chooses among, uncompressed first. The ``FLAT`` ones take
``hierarchy="flat"`` where ``"auto"`` would exchange by node."""


def check_plan(plan: object) -> tuple[tuple[int, str], ...]:
    """Returns the option ``plan`` as tuples.

    Raises:
        TypeError: it is not a sequence of pairs of an int and a string.
        ValueError: it is empty, a step does not follow the one before, or a setting is unknown.
    """
    form = "pairs of the number of a step and a setting, as [(0, 'fp32'), (8, '8 bits')]"
    if not isinstance(plan, list | tuple):
        raise TypeError(f"plan must be {form}, got {plan!r}")
    pairs: list[tuple[int, str]] = []
    for pair in plan:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"plan must be {form}, got {pair!r} in it")
        step, name = pair
        check_int("a step of plan", step, pairs[-1][0] + 1 if pairs else 0, 2**31 - 1)
        check_choice("a setting of plan", name, SETTING_NAMES)
        pairs.append((step, name))
    if not pairs:
        raise ValueError(f"plan must be {form}, got {plan!r}")
    return tuple(pairs)


class Plan:
    """Pairs of the number of a step and the name of the setting from that step on.

    Args:
        entries: the pairs, by step.
    """

    def __init__(self, entries: Iterable[Sequence[Any]] = ()) -> None:
        self._entries = [(step, name) for step, name in entries]

    def add(self, step: int, name: str) -> None:
        """Adds a step that takes a setting, where it is another one than that of the step before.

        Steps from this one on are forgotten, as after a checkpoint was loaded.
        """
        while self._entries and self._entries[-1][0] >= step:
            self._entries.pop()
        if not self._entries or self._entries[-1][1] != name:
            self._entries.append((step, name))

    def at(self, step: int) -> str:
        """Returns the setting of a step; uncompressed before the first pair."""
        index = bisect_right([first for first, _ in self._entries], step)
        return self._entries[index - 1][1] if index else SETTING_NAMES[0]

    def pairs(self) -> list[list[Any]]:
        """Returns the pairs as lists, which JSON keeps as they are."""
        return [[step, name] for step, name in self._entries]
